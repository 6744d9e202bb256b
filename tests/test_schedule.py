"""Learning rates and parameter groups, compared with the formulas of the original example, implemented here again."""

import inspect
import math

import pytest
import torch

from vgglab.model import build
from vgglab.optim import OPTIMIZERS, OptimizerSpec, build_optimizer
from vgglab.settings.parser import parse_flags
from vgglab.settings.schedule import SCHEDULES, learning_rate

README = ["--batch-size=192", "--lr=0.01", "--epochs=90"]


def original_formula(schedule, epoch, base, warmup=5, epochs=90, end=0.0):
    if epoch < warmup:
        return base * (epoch + 1) / warmup
    if schedule == "step":
        num_drops = (epoch >= 30) + (epoch >= 60) + (epoch >= 80)
        return base * 0.1**num_drops
    progress = (epoch - warmup) / (epochs - warmup)
    if schedule == "linear":
        return base * (1 - progress)
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if "lr_patience" not in SCHEDULES[name].settings])
@pytest.mark.parametrize("world_size", [1, 8])
def test_all_90_epochs_of_the_readme_follow_the_original_formula(schedule, world_size):
    config = parse_flags([*README, f"--lr-schedule={schedule}"])
    base = 0.01 * 192 * world_size / 256
    for epoch in range(90):
        expected = original_formula(schedule, epoch, base)
        assert learning_rate(config, epoch, world_size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", [*SCHEDULES])
def test_depends_on_epochs_tells_whether_more_epochs_change_the_rates(schedule):
    """A resumed run relies on it to warn about changed settings."""
    rates = [
        [learning_rate(parse_flags([*README, f"--lr-schedule={schedule}", f"--epochs={epochs}"]), epoch, 1)
         for epoch in range(90)]
        for epochs in (90, 120)
    ]  # fmt: skip
    assert (rates[0] != rates[1]) == SCHEDULES[schedule].depends_on_epochs


@pytest.mark.parametrize(("name", "num_state_tensors"), [("sgd", 1), ("rmsprop", 2)])
def test_an_optimizer_keeps_as_many_tensors_as_the_plan_assumes(name, num_state_tensors):
    config = parse_flags([f"--optimizer={name}"])
    network = build("vgg11", num_classes=3, head="small")
    optimizer = build_optimizer(config, network)
    network(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    for parameter in network.parameters():
        kept = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value) and value.dim()]
        assert len(kept) == num_state_tensors == OPTIMIZERS[name].num_state_tensors(config)
        momentum = {"momentum_buffer"} if "momentum" in OPTIMIZERS[name].settings else set()
        entries = {*OPTIMIZERS[name].state_keys, *momentum}  # needed to resume a run
        assert entries == optimizer.state[parameter].keys()
    assert sorted(OPTIMIZERS) == ["rmsprop", "sgd"]  # each has a case above


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_with_a_fused_step_is_registered_as_such(name):
    """Otherwise ``--fast`` would not use it."""
    supports_fused = "fused" in inspect.signature(OPTIMIZERS[name].optimizer).parameters
    assert OPTIMIZERS[name].supports_fused or not supports_fused


def test_an_optimizer_must_say_whether_its_factors_change_at_every_step():
    """If it does not say so, a card that needs constant factors does not refuse it."""
    with pytest.raises(TypeError, match="changes_every_step"):
        OptimizerSpec(torch.optim.Adam, ())


def test_cosine_decays_towards_end_lr():
    config = parse_flags([*README, "--lr-schedule=cosine", "--end-lr=0.001"])
    assert learning_rate(config, 89, 1) == pytest.approx(original_formula("cosine", 89, 0.0075, end=0.001))


def test_without_warmup_the_first_epoch_has_the_base_rate():
    assert learning_rate(parse_flags([*README, "--warmup=0"]), 0, 1) == pytest.approx(0.0075)


@pytest.mark.parametrize(("decay_norms", "expected"), [(False, 0.0), (True, 0.0005)])
def test_row_32_batch_norm_decays_only_when_requested(decay_norms, expected):
    """The original example looked for "bn" in the parameter names, but no VGG layer has such a name."""
    config = parse_flags(["--wd=0.0005", f"--bn-weight-decay={decay_norms}"])
    network = build("vgg11_bn", num_classes=3, head="small")
    groups = build_optimizer(config, network).param_groups
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay_of) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        is_norm = network.get_submodule(name.rpartition(".")[0]).__class__.__name__ == "BatchNorm2d"
        assert decay_of[id(parameter)] == (expected if is_norm else 0.0005), name
