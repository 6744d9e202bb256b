"""Recipes, and what the modern one adds: mixup, label smoothing, averaged weights, plateaus, crops."""

import random
from dataclasses import fields, replace

import pytest
import torch
from conftest import TINY
from torch import nn

from vgglab.data.decode import ArrayPicture
from vgglab.data.transform import CROPS, JitteredCrop, Preprocessing, RandomCrop, TrivialAugmentCrop
from vgglab.devices import open_device
from vgglab.devices.compat import load_tensors
from vgglab.lab.plan import plan_training
from vgglab.model import build
from vgglab.optim import Objective, build_optimizer
from vgglab.settings.config import Request
from vgglab.settings.parser import parse_flags
from vgglab.settings.recipes import RECIPES
from vgglab.settings.schedule import SCHEDULES, Schedule

ORIGINAL_COMMAND = (
    "--device=cpu --data-path=imagenet_raw --batch-size=192 --epochs=90 --model=vgg16 --workers=8 "
    "--training_step_per_epoch=-1 --eval_step_per_epoch=-1 --dropout_rate=0.5 --lr=0.01 --print-freq=20 --skip_steps=5"
).split()


ON_CPU = ("--device=cpu",)  # resuming picks the best device, and results differ between devices


def learning_rates(run):
    return [event["lr"] for event in run.events("train")]


def losses(run):
    return [event["loss"] for event in run.events("train")]


def test_seed_recipe_equals_the_original_command():
    by_name = parse_flags(["--recipe=seed", "--device=cpu", "--data-path=imagenet_raw"]).as_dict()
    assert by_name.pop("recipe") == "seed"
    by_flags = parse_flags(ORIGINAL_COMMAND).as_dict()
    by_flags.pop("recipe")
    assert by_name == by_flags


@pytest.mark.parametrize("order", [1, -1])
def test_flag_overrides_recipe_in_any_order(order):
    config = parse_flags(["--recipe=modern", "--lr=0.5"][::order])
    assert (config.lr, config.mixup) == (0.5, 0.2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_a_command_line(recipe):
    by_flags = parse_flags(RECIPES[recipe].flags.split())
    assert parse_flags([f"--recipe={recipe}"]) == replace(by_flags, recipe=recipe)
    assert RECIPES[recipe].data in ("imagenet", "digits")


@pytest.mark.parametrize("name", CROPS)
def test_crop_depends_only_on_seed_and_flip(name, monkeypatch):
    picture = ArrayPicture(
        torch.arange(48 * 40, dtype=torch.int64).reshape(48, 40).remainder(251).to(torch.uint8), "pil"
    )
    with_flip = Preprocessing(flip=True)
    crop, unflipped = CROPS[name](32, with_flip), CROPS[name](32, with_flip._replace(flip=False))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)  # torch.manual_seed calls it, to seed every card
    before, torch_before = random.getstate(), torch.random.get_rng_state()
    crops = [crop(picture, seed) for seed in range(8)]
    assert all(torch.equal(pixels, crop(picture, seed)) for seed, pixels in enumerate(crops))
    assert len({pixels.numpy().tobytes() for pixels in crops}) > 1
    assert any(not torch.equal(pixels, unflipped(picture, seed)) for seed, pixels in enumerate(crops))
    assert random.getstate() == before
    assert torch.equal(torch.random.get_rng_state(), torch_before)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name])
def test_every_recipe_trains(train, recipe):
    result = train(f"--recipe={recipe}", "--epochs=1", "--image-size=32", "--batch-size=4")
    assert result.code == 0, result.err
    assert result.run.report()["recipe"] == recipe
    assert result.run.config["weight_decay"] == parse_flags([f"--recipe={recipe}"]).weight_decay
    [event] = result.run.events("eval")
    assert event["num_images"] == 9


def blend_batch(**settings):
    config = parse_flags([f"--{name.replace('_', '-')}={value}" for name, value in settings.items()])
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    objective = Objective(config, open_device("cpu"))
    random.seed(3)
    mixed, targets = objective.blend(images, labels)
    return objective, images, labels, mixed, targets


def test_mixup_averages_neighbours_and_cutmix_pastes_them():
    _, images, labels, mixed, targets = blend_batch(mixup=1.0)
    share, others = targets.ratio.item(), images.roll(1, 0)
    assert 0 < share < 1
    assert torch.allclose(mixed, share * images + (1 - share) * others)
    assert targets.mixed_labels.tolist() == labels.roll(1).tolist()
    _, images, _, mixed, targets = blend_batch(cutmix=1.0)
    is_own = (mixed == images).all(dim=1)  # (N, S, S)
    is_other = (mixed == images.roll(1, 0)).all(dim=1)
    assert (is_own | is_other).all()
    assert targets.ratio.item() == pytest.approx(is_own.float().mean().item())
    assert 0 < targets.ratio.item() < 1


def test_loss_of_a_blend_is_cross_entropy_with_soft_targets():
    objective, _, labels, _, targets = blend_batch(cutmix=1.0, label_smoothing=0.1)
    logits, share = torch.randn(4, 3), targets.ratio
    hot = nn.functional.one_hot
    soft = share * hot(labels, 3) + (1 - share) * hot(labels.roll(1), 3)
    soft = 0.9 * soft + 0.1 / 3
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    assert objective(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_batch_is_unchanged_without_blending():
    objective, images, labels, mixed, targets = blend_batch(lr=0.1)
    assert mixed is images
    logits = torch.randn(4, 3)
    assert objective(logits, targets) == nn.functional.cross_entropy(logits, labels)


def test_blends_depend_on_the_step_also_after_resuming(train):
    flags = ("--mixup=1", "--cutmix=1", "--ema=0.9", "--seed=1", "--print-freq=1", "--epochs=2")
    whole, again = train(*flags).run, train(*flags).run
    assert losses(whole) == losses(again)
    first = train(*flags, "--epochs=1").run
    rest = train(f"--resume={first.path}", "--epochs=2", "--print-freq=1", base=ON_CPU).run
    assert losses(first) + losses(rest) == losses(whole)
    assert rest.events("eval")[-1]["loss"] == whole.events("eval")[-1]["loss"]
    assert losses(train("--seed=1", "--print-freq=1", "--epochs=2").run) != losses(whole)


def test_averaged_weights_are_evaluated_and_raw_weights_trained(train):
    run = train("--ema=0.5", "--seed=1", "--lr=1", "--epochs=1").run
    saved = load_tensors(run.checkpoint("last"))
    name = "classifier.6.weight"
    assert not torch.equal(saved["model"][name], saved["trained"][name])
    again = train("--test-only", f"--resume={run.path}").run
    assert again.events("eval")[0]["loss"] == run.events("eval")[0]["loss"]
    plain = train("--seed=1", "--lr=1", "--epochs=1").run
    assert torch.equal(load_tensors(plain.checkpoint("last"))["model"][name], saved["trained"][name])
    assert plain.events("eval")[0]["loss"] != run.events("eval")[0]["loss"]


def test_averaged_weights_follow_the_formula(train):
    """Weights after each of 4 steps, averaged here."""
    flags = ("--seed=1", "--lr=1", "--training-step-per-epoch=1", "--ema=0.5")
    name, average = "classifier.6.bias", None
    first = None
    for number in range(4):
        saved = load_tensors(train(*flags, f"--epochs={number + 1}").run.checkpoint("last"))
        weights = saved["trained"][name]
        if number == 0:
            # Biases start at 0.
            average, first = torch.zeros_like(weights), weights
        decay = min(0.5, (1 + number + 1) / (10 + number + 1))
        average = decay * average + (1 - decay) * weights
        assert torch.allclose(saved["model"][name], average, rtol=1e-4, atol=1e-7)
    assert not torch.equal(first, weights)


def test_plateau_lowers_the_rate_after_patience_also_when_resumed(train):
    flags = ("--lr-schedule=plateau", "--lr-patience=2", "--lr=1e-9", "--seed=1", "--training-step-per-epoch=1")
    base = 1e-9 * 4 / 256
    expected = [base, base, base, base / 10, base / 10, base / 100]  # no improvement after the first evaluation
    whole = train(*flags, "--epochs=6").run
    assert learning_rates(whole) == pytest.approx(expected)
    first = train(*flags, "--epochs=2").run
    rest = train(f"--resume={first.path}", "--epochs=6", base=ON_CPU).run
    assert learning_rates(first) + learning_rates(rest) == pytest.approx(expected)


def test_any_schedule_with_patience_lowers_the_rate_at_plateaus(train, images, monkeypatch):
    """Only the name ``plateau`` did; the rate of another schedule never dropped, and its plan had no warning."""
    halving = Schedule(lambda config, base, epoch, num_drops: base / 2**num_drops, ("lr_patience",))
    monkeypatch.setitem(SCHEDULES, "halving", halving)
    lr_schedule = next(field for field in fields(Request) if field.name == "lr_schedule")
    monkeypatch.setitem(lr_schedule.metadata["options"], "choices", tuple(SCHEDULES))
    flags = ("--lr-schedule=halving", "--lr-patience=1", "--lr=1e-9", "--seed=1", "--training-step-per-epoch=1")
    base = 1e-9 * 4 / 256
    run = train(*flags, "--epochs=4").run
    assert learning_rates(run) == pytest.approx([base, base, base / 2, base / 4], abs=0)
    plan = plan_training(parse_flags([*TINY, *flags, f"--data-path={images}"]), 1.0, given=("data_path",))
    assert any(text.startswith("--lr-schedule halving: drops in the rate depend on") for text in plan.warnings)


def test_other_schedules_and_warm_up_count_no_drops(train):
    flags = ("--lr-patience=1", "--lr=1e-9", "--seed=1", "--training-step-per-epoch=1")
    first = train(*flags, "--lr-schedule=cosine", "--epochs=3").run
    assert load_tensors(first.checkpoint("last"))["num_drops"] == 0
    warming = train(*flags, "--lr-schedule=plateau", "--warmup=3", "--epochs=5").run
    base = 1e-9 * 4 / 256
    assert learning_rates(warming) == pytest.approx([base / 3, base * 2 / 3, base, base, base / 10])


def test_resume_rejects_other_decay_and_accepts_other_momentum(train):
    earlier = train("--model=vgg11_bn").run
    result = train("--epochs=2", "--no-bias-weight-decay", f"--resume={earlier.path}", base=ON_CPU)
    assert result.code == 2
    assert "weight decay on a different set of parameters; check --bias-weight-decay" in result.err
    without_momentum = train("--optimizer=rmsprop", "--momentum=0", "--lr=0.0001").run
    resumed = train("--epochs=2", "--momentum=0.9", f"--resume={without_momentum.path}", base=ON_CPU)
    assert resumed.code == 0, resumed.err


def test_hardware_settings_are_not_inherited(train):
    earlier = train("--channels-last").run
    again = train("--epochs=2", f"--resume={earlier.path}", base=ON_CPU).run
    assert again.config["channels_last"] is False
    assert any("--channels-last False, was True" in text for text in again.report()["warnings"])
    fast = train("--epochs=2", "--fast", f"--resume={train().run.path}", base=ON_CPU).run
    assert fast.config["channels_last"] is True


def test_biases_can_be_excluded_from_weight_decay():
    config = parse_flags(["--no-bias-weight-decay", "--wd=0.01"])
    network = build("vgg11_bn", num_classes=3, head="small")
    groups = build_optimizer(config, network).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert decay_of[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0), name
    assert len(decay_of) == len(list(network.parameters()))


@pytest.mark.parametrize("init", ["kaiming", "xavier", "normal"])
def test_initial_weights_have_the_expected_standard_deviation(init):
    torch.manual_seed(0)
    conv = build("vgg16", num_classes=3, head="small", init=init).features[17]  # 256 to 512 channels
    expected = {"kaiming": (2 / (512 * 9)) ** 0.5, "xavier": (2 / (768 * 9)) ** 0.5, "normal": 0.01}[init]
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.01)
    assert conv.bias.abs().max() == 0


def position_image(height, width):
    """Pixels that encode their position: red is the row, green the column."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    return torch.stack([rows, columns, rows * 0], dim=-1).to(torch.uint8)


def test_scale_jitter_covers_the_papers_scales():
    crop, sides = JitteredCrop(32, flip=False), []
    for seed in range(200):
        pixels = crop(ArrayPicture(position_image(120, 240), "pil"), seed).float()
        assert pixels.shape == (32, 32, 3)
        sides.append((pixels[-1, 0, 0] - pixels[0, 0, 0]).item() * 32 / 31)
    # 224 of 512 and of 256 are 0.44 and 0.88 of the shorter side.
    assert 0.40 < min(sides) / 120 < 0.5
    assert 0.8 < max(sides) / 120 < 0.92


def test_trivial_augment_depends_only_on_the_image_seed():
    crop = TrivialAugmentCrop(RandomCrop(32, (0.5, 1.0), True))
    picture = ArrayPicture(position_image(40, 48), "pil")
    state = torch.random.get_rng_state()
    first = [crop(picture, seed) for seed in range(8)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(crop(picture, seed), pixels) for seed, pixels in enumerate(first))
    plain = [RandomCrop(32, (0.5, 1.0), True)(picture, seed) for seed in range(8)]
    assert sum(not torch.equal(*pair) for pair in zip(first, plain)) >= 5  # identity is one of the operations
