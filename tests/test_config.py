"""The parser: the original example's flags and defaults, and errors for invalid flags."""

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from conftest import PROJECT

from vgglab.errors import UserError
from vgglab.optim import OPTIMIZERS
from vgglab.settings.config import Request
from vgglab.settings.parser import parse_flags, settings_warnings
from vgglab.settings.schedule import SCHEDULES, Schedule

# Flags and defaults of the original example, except those that vgglab changed: the number of classes (that of the
# folder), the workers (16, at most one per core), the device (auto), the folder (the bundled digits) and the drops (30,
# 60, 80).
ORIGINAL_DEFAULTS = {
    "model": "vgg16", "batch_size": 32, "epochs": 90, "lr": 0.01, "optimizer": "sgd", "momentum": 0.9,
    "nesterov": False, "weight_decay": 1e-4, "bn_weight_decay": False, "dropout_rate": 0.0,
    "lr_schedule": "step", "warmup": 5, "end_lr": 0.0, "lr_gamma": 0.1, "print_freq": 10, "eval_freq": 1,
    "output_dir": ".", "resume": None, "start_epoch": 0, "test_only": False, "pretrained": False,
    "cache_dataset": False, "sync_bn": False, "broadcast_buffers": False, "fix_seed": False, "amp": False,
    "training_step_per_epoch": -1, "eval_step_per_epoch": -1, "skip_steps": 10, "world_size": 1,
    "dist_url": "env://", "apex": False, "enable_horovod": False,
}  # fmt: skip

ORIGINAL_FLAGS = """--data-path=x --num_classes=5 --model=vgg16 --device=cpu -b=2 --batch-size=2 --epochs=3 -j=1
--workers=1 --lr=0.1 --optimizer=sgd --momentum=0.8 --nesterov --wd=0.1 --weight-decay=0.1 --bn-weight-decay
--dropout_rate=0.1 --lr-schedule=step --warmup=1 --end-lr=0 --lr-step-size=3 --lr-gamma=0.2 --print-freq=1
--eval-freq=1 --output-dir=o --resume=r --start-epoch=1 --test-only --cache-dataset --sync-bn --broadcast-buffers
--fix-seed --torch-amp --amp --training_step_per_epoch=3 --eval_step_per_epoch=3 --skip_steps=1 --world-size=1
--dist-url=env://""".split()


def test_defaults_match_the_original_example():
    config = parse_flags([]).as_dict()
    assert {name: config[name] for name in ORIGINAL_DEFAULTS} == ORIGINAL_DEFAULTS


@pytest.mark.parametrize("swap", ["-_", "_-"])
def test_original_flags_accept_dashes_and_underscores(swap):
    def respell(flag):
        name, equals, value = flag.partition("=")
        return "--" + name[2:].replace(*swap) + equals + value if name.startswith("--") else flag

    assert parse_flags([respell(flag) for flag in ORIGINAL_FLAGS]) == parse_flags(ORIGINAL_FLAGS)
    assert parse_flags(["--pretrained"]).pretrained


def test_underscores_in_values_are_kept():
    assert parse_flags(["--data-path", "my_data-set", "--output_dir=a_b"]).data_path == "my_data-set"
    assert parse_flags(["--output_dir=a_b"]).output_dir == "a_b"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs=0"], "--epochs: '0' is not a whole number of at least 1"),
        (["--epochs=2.5"], "--epochs: '2.5' is not"),
        (["--lr=-0.1"], "--lr: '-0.1' is not a number of at least 0"),
        (["--lr=nan"], "--lr: 'nan'"),
        (["--lr=inf"], "--lr: 'inf'"),
        (["--batch-size=0"], "--batch-size"),
        (["--model=vgg12"], "--model: invalid choice: 'vgg12'.*vgg11"),
        (["--device=tpu"], "--device: invalid choice"),
        (["--dropout_rate=1"], r"--dropout-rate: '1' is not in \[0, 1\)"),
        (["--training_step_per_epoch=0"], "--training-step-per-epoch: '0' is neither -1"),
        (["--image-size=16"], "--image-size: '16' is not.*from 32"),
        (["--lr-schedule=nonsense"], "--lr-schedule: invalid choice"),
        (["--num_clases=3"], "--num-clases: no such flag; did you mean --num-classes?"),
        (["--frobnicate"], "--frobnicate: no such flag"),
        (["digits"], "'digits' is not expected here.*--data-path digits"),
        (["--seed=99999999999999999999"], "--seed: "),
        (["--warmup=" + "9" * 400], "--warmup: "),
        (["--weight-decay=1e308"], "--weight-decay.*: .1e308"),
        (["--workers=10000"], "--workers"),
        (["--image-size=1000000"], "--image-size: "),
        (["--epoch=3"], "--epoch: no such flag; did you mean --epochs?"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--test-only"], "--test-only: nothing to evaluate"),
        (["--seed=5", "--fix-seed"], "--fix-seed: sets --seed 1048576"),
        (["--seed=-1"], "--seed: '-1' is not"),
        (["--pretrained", "--resume=x"], "--pretrained: conflicts with --resume"),
        (["--start-epoch=90"], "--start-epoch 90: must be below --epochs 90"),
        (["--nesterov", "--momentum=0"], "--nesterov: needs"),
    ],
)
def test_error_names_the_flag_and_allowed_values(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_flags(argv)
    assert "\n" not in str(caught.value)


def test_list_of_flags_is_unchanged():
    """Removing or renaming a flag needs a line in the changelog and a change here."""
    assert sorted(Request().as_dict()) == sorted(
        "amp amp_dtype apex apex_opt_level batch_size bias_weight_decay bn_weight_decay broadcast_buffers "
        "cache_dataset channels_last checkpoint_every compile crops cutmix data_path decoder device dist_url "
        "dropout_rate ema enable_horovod end_lr epochs eval_freq eval_step_per_epoch fast fix_seed fused head "
        "image_size init label_smoothing lr lr_gamma lr_patience lr_schedule lr_step_size mixup model momentum "
        "nesterov num_classes on_bad_image optimizer output_dir pretrained print_freq recipe resume rmsprop_alpha "
        "rmsprop_eps run_dir seed seeds skip_steps start_epoch sync_bn tensorboard test_only tf32 timers trace "
        "training_step_per_epoch warmup weight_decay workers world_size".split()
    )


def test_choices_match_their_tables_and_others_raise(monkeypatch):
    """An unknown schedule silently became cosine, an unknown decoder Pillow."""
    from vgglab import model, optim
    from vgglab.data import decode, named, transform
    from vgglab.settings import choices, schedule

    assert tuple(model.model_names()) == choices.MODELS
    assert set(choices.INITS) == set(model.INITS)
    assert set(choices.OPTIMIZERS) == set(optim.OPTIMIZERS)
    assert tuple(named.NAMED_SETS) == tuple(choices.DATA_SETS)
    assert tuple(choices.DECODERS) == tuple(decode.DECODERS)  # in the order of preference
    assert set(choices.CROPS) == set(transform.CROPS)
    assert set(choices.HEADS) == {"auto", *model.HEADS}
    settings = parse_flags([])
    settings = replace(settings, warmup=0, lr_schedule="nonsense", optimizer="nonsense")
    with pytest.raises(KeyError):
        schedule.learning_rate(settings, 3, 1)
    with pytest.raises(KeyError):
        optim.build_optimizer(settings, model.vgg11(num_classes=2, head="small"))
    with pytest.raises(UserError, match="unknown init 'zeros'"):
        model.vgg11(init="zeros")
    with pytest.raises(KeyError):
        decode.open_picture(__file__, "webp")


def test_settings_are_immutable():
    with pytest.raises(FrozenInstanceError):
        parse_flags([]).epochs = 1


def test_every_setting_is_used():
    """A flag that is accepted and recorded but never read would silently do nothing."""
    modules = [file for file in (PROJECT / "vgglab").rglob("*.py") if file.parent.name != "settings"]
    code = "\n".join(file.read_text() for file in [*modules, PROJECT / "vgglab" / "settings" / "schedule.py"])
    # The parser handles these: it rejects them, warns about them, or sets other settings.
    handled = {"apex", "apex_opt_level", "enable_horovod", "cache_dataset", "recipe", "fix_seed"}
    handled |= {setting for optimizer in OPTIMIZERS.values() for setting in optimizer.settings}
    names = {item.name for item in fields(Request)} - handled
    assert [name for name in sorted(names) if not re.search(rf"\b(config|request|settings)\.{name}\b", code)] == []


def test_setting_without_effect_gives_a_warning():
    """``--end-lr`` with the step schedule was recorded and did nothing."""
    config = parse_flags(["--end-lr=0.1", "--rmsprop-eps=0.1", "--lr-gamma=0.2"])
    of_sgd = "--rmsprop-eps has no effect with --optimizer sgd"
    assert settings_warnings(config, OPTIMIZERS) == ["--end-lr has no effect with --lr-schedule step", of_sgd]
    config = replace(config, lr_schedule="cosine", optimizer="rmsprop")
    assert settings_warnings(config, OPTIMIZERS) == ["--lr-gamma has no effect with --lr-schedule cosine"]


def settings_read_by(schedule):
    """The settings that a schedule reads, if the others have their defaults or one of them has another value."""
    read = set()

    class Recorded(Request):
        def __getattribute__(self, setting):
            read.add(setting)
            return super().__getattribute__(setting)

    for changed in ({}, *({field.name: 2} for field in fields(Request))):
        config = Recorded(**changed)
        rates = [schedule.rate(config, 0.01, epoch, num_drops) for epoch in range(5, 90) for num_drops in (0, 1)]
        if rates[::2] != rates[1::2]:
            read.add("lr_patience")  # it determines when the number of drops increases
    return read


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_lists_the_settings_it_uses(name):
    """A setting that is missing from the list gives no warning with the schedules that do not use it."""
    read = settings_read_by(SCHEDULES[name])
    assert read - {"epochs", "warmup"} == {*SCHEDULES[name].settings}
    assert ("epochs" in read) == SCHEDULES[name].depends_on_epochs


def test_a_setting_that_is_read_only_with_another_one_is_found():
    schedule = Schedule(lambda config, base, epoch, num_drops: base * (config.end_lr if config.lr_patience == 2 else 1))
    assert settings_read_by(schedule) == {"lr_patience", "end_lr"}
