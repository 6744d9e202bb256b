"""The settings: ``Request`` defines them all; ``Settings`` is the same with every value filled in. Both are immutable.

The parser (``parser.py``), ``config.json``, ``launch``, the inheritance of a resumed run and the comparison of runs are
derived from the fields of ``Request``. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from vgglab.devices import AMP_DTYPES, DEVICE_CHOICES
from vgglab.settings.choices import CROPS, DATA_SETS, DECODERS, HEADS, INITS, MODELS, OPTIMIZERS
from vgglab.settings.flags import (
    AT_LEAST_0,
    AT_LEAST_1,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    SEED,
    SIZE,
    WORKERS,
    described,
    flag,
    steps,
    switch,
)  # fmt: skip
from vgglab.settings.recipes import RECIPES
from vgglab.settings.schedule import SCHEDULES, schedules_with

FIXED_SEED = 1 << 20  # as in the original example
ORIGINAL_NUM_CLASSES = 1000  # in all four commands of the original example, regardless of the data


@dataclass(frozen=True)
class Request:
    """The settings as requested; None leaves the choice to the run. Most defaults are those of the original example."""

    recipe: str | None = flag(
        "a named set of settings (vgglab/settings/recipes.py); other flags override it",
        choices=tuple(RECIPES),
        affects="others",
    )
    data_path: str = flag(
        "a folder with train/CLASS/ and val/CLASS/, or the name of a data set, downloaded on first use: "
        + described(DATA_SETS),
        "digits",
        implies="num_classes",
    )
    num_classes: int | None = flag("number of classes; default: as in the data set", None, AT_LEAST_1)
    model: str = flag("the network", "vgg16", choices=MODELS)
    device: str = flag(
        "device to train on; auto selects the first one available", "auto", choices=DEVICE_CHOICES, affects="speed"
    )
    batch_size: int = flag("images per card and step", 32, AT_LEAST_1, names=["-b"])
    epochs: int = flag("passes over the training images", 90, AT_LEAST_1)
    workers: int | None = flag(
        "loader processes per card; default: 16, or the number of CPU cores per rank if that is smaller",
        None,
        WORKERS,
        names=["-j"],
        affects="speed",
    )
    image_size: int | None = flag(
        "side of the square images, in pixels; default: 224, or 32 for data sets of small images", None, SIZE
    )
    decoder: str = flag("image decoder", "auto", choices={"auto": "the first one that is installed", **DECODERS})
    on_bad_image: str = flag(
        "what to do with an image that cannot be read: fail, or skip (skipped images are listed in the run's log/)",
        "fail",
        choices=("fail", "skip"),
    )
    head: str = flag("classifier", "auto", choices=HEADS)
    dropout_rate: float = flag("dropout rate of the two hidden layers of the classifier", 0.0, FRACTION)
    init: str = flag("initial weights", "kaiming", choices=INITS, affects="start")
    pretrained: bool = switch("start from torchvision's published ImageNet weights", affects="start", inherited=False)

    lr: float = flag(
        "learning rate for a global batch of 256 images; scaled in proportion to the global batch size",
        0.01,
        NON_NEGATIVE,
    )
    optimizer: str = flag("the optimizer", "sgd", choices=OPTIMIZERS)
    momentum: float = flag("momentum", 0.9, FRACTION)
    nesterov: bool = switch("Nesterov momentum (sgd)")
    rmsprop_alpha: float = flag(
        "decay rate of the mean squared gradient (rmsprop); default as in torchvision's reference", 0.9, FRACTION
    )
    rmsprop_eps: float = flag("epsilon in the denominator (rmsprop)", 0.0316, POSITIVE)
    weight_decay: float = flag("weight decay", 1e-4, NON_NEGATIVE, names=["--wd"])
    bn_weight_decay: bool = switch("apply weight decay to batch norm too")
    bias_weight_decay: bool | None = switch(
        "apply weight decay to biases; default: yes, as in the original example", negation="--no-bias-weight-decay"
    )
    lr_schedule: str = flag("how the learning rate decreases after warm-up", "step", choices=tuple(SCHEDULES))
    warmup: int = flag("epochs of linear warm-up of the learning rate", 5, AT_LEAST_0)
    end_lr: float = flag(
        f"final learning rate ({schedules_with('end_lr')}); the epoch after the last would reach it", 0.0, NON_NEGATIVE
    )
    lr_step_size: int | None = flag(
        f"epochs between drops ({schedules_with('lr_step_size')}); default: drops at epochs 30, 60 and 80",
        None,
        AT_LEAST_1,
    )
    lr_gamma: float = flag(f"multiply the rate by this at each drop ({schedules_with('lr_gamma')})", 0.1, POSITIVE)
    lr_patience: int = flag(
        f"evaluations without a new best top-1 before the rate drops ({schedules_with('lr_patience')})", 5, AT_LEAST_1
    )

    crops: str = flag("augmentation of training images", "standard", choices=CROPS)
    label_smoothing: float = flag("label smoothing: share of the target spread over all classes", 0.0, FRACTION)
    mixup: float = flag("mixup strength alpha: lambda ~ Beta(alpha, alpha); 0 disables it", 0.0, NON_NEGATIVE)
    cutmix: float = flag(
        "cutmix strength alpha: area ~ Beta(alpha, alpha); 0 disables it; with --mixup, one of the two is chosen at "
        "random for each batch",
        0.0,
        NON_NEGATIVE,
    )
    ema: float = flag(
        "evaluate a moving average of the weights with this decay per step (smaller in the first steps); 0 disables it",
        0.0,
        FRACTION,
    )

    amp: bool = switch(
        "mixed precision: bfloat16 on the CPU, float16 on cards (loss scale 128, halved on overflow)",
        names=["--torch-amp"],
        affects="others",
        inherited=False,
        implies="amp_dtype",
    )
    amp_dtype: str | None = flag("data type of mixed precision (implies --amp)", None, choices=AMP_DTYPES)
    tf32: bool | None = switch(
        "compute float32 convolutions and matrix products in TF32, on cards that support it; default: off, or as set "
        "by ENFLAME_ENABLE_TF32 (T20)",
        negation="--no-tf32",
        inherited=False,
    )
    fast: bool = switch(
        "fastest supported mode of the device: mixed precision where the hardware supports it, --channels-last and "
        "--fused; results differ by rounding",
        affects="others",
        implies="amp_dtype",
    )
    channels_last: bool | None = switch(
        "channels-last (NHWC) memory layout; default: off, unless --fast turns it on",
        negation="--no-channels-last",
        inherited=False,
    )
    fused: bool | None = switch(
        "update all weights in one kernel; default: off, unless --fast turns it on",
        negation="--no-fused",
        inherited=False,
    )
    compile: bool = switch("compile the network with torch.compile, which adds about a minute to the first steps")
    sync_bn: bool = switch("synchronise batch norm over all ranks")
    broadcast_buffers: bool = switch("broadcast rank 0's buffers to all ranks before each step")
    nproc: int = flag("ranks to start on this machine, one per card", 1, AT_LEAST_1, affects="launch")
    max_restarts: int = flag(
        "how many times to restart all ranks from the last checkpoint if one exits abnormally",
        0,
        AT_LEAST_0,
        affects="launch",
    )
    world_size: int = flag("number of ranks; a launcher's WORLD_SIZE takes precedence", 1, AT_LEAST_1, inherited=False)
    dist_url: str = flag("init method for the process group", "env://", affects="location")
    fix_seed: bool = switch(f"same as --seed {FIXED_SEED}", affects="others", inherited=False, implies="seed")
    seeds: str | None = flag(
        "train once for each seed: a number of seeds such as 5, or a list such as 3,17,23", affects="location"
    )
    seed: int | None = flag("random seed; default: drawn at random and recorded", None, SEED)

    training_step_per_epoch: int = flag("steps per epoch; -1: all", -1, steps)
    eval_step_per_epoch: int = flag("batches per evaluation; -1: all", -1, steps, affects="metrics", inherited=False)
    skip_steps: int = flag("number of initial steps excluded from images/s", 10, AT_LEAST_0, affects="record")
    print_freq: int = flag("steps between log lines", 10, AT_LEAST_1, affects="record")
    eval_freq: int = flag(
        "epochs between evaluations and checkpoints (the last epoch always has both)", 1, AT_LEAST_1, affects="metrics"
    )
    output_dir: str = flag("folder in which runs/<run> is created", ".", affects="location")
    run_dir: str | None = flag("use exactly this run directory", affects="location")
    timers: bool = switch(
        "time the phases of each step; gradients are then averaged after the backward pass, not during it",
        affects="speed",
    )
    trace: int = flag(
        "write a profiler trace of this many steps, after --skip-steps, into the run directory",
        0,
        AT_LEAST_0,
        affects="speed",
    )
    tensorboard: bool = switch("write TensorBoard scalars into the run directory", affects="record", inherited=False)
    resume: str | None = flag(
        "checkpoint file or run directory to resume from, or auto: the newest valid checkpoint in --run-dir (the run "
        "continues there) or in <output-dir>/runs; if there is none, the run starts from scratch; most settings that "
        "are not given are taken from the checkpoint",
        affects="location",
    )
    checkpoint_every: int = flag(
        "steps between additional checkpoints; 0: only after evaluations", 0, AT_LEAST_0, affects="record"
    )
    start_epoch: int = flag(
        "first epoch (counted from 0) if no checkpoint is resumed", 0, AT_LEAST_0, affects="start", inherited=False
    )
    test_only: bool = switch(
        "only evaluate the weights of --resume or --pretrained", affects="metrics", inherited=False
    )
    cache_dataset: bool = switch(
        "accepted and ignored; image folders are rescanned at every start",
        affects="others",
        inherited=False,
    )

    # Flags of the original example that are not supported: accepted so that the error says what to use instead.
    apex: bool = switch("not supported: use --amp", affects="others", inherited=False)
    apex_opt_level: str | None = flag("not supported: use --amp", affects="others", inherited=False)
    enable_horovod: bool = switch("not supported: use --nproc", affects="others", inherited=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as in ``config.json``: plain values, without those that only affect the launch."""
        launch_settings = settings_that_affect("launch")
        return {name: value for name, value in asdict(self).items() if name not in launch_settings}


@dataclass(frozen=True)
class Settings(Request):
    """All settings of a run, with every value filled in."""

    num_classes: int = 0
    workers: int = 0
    image_size: int = 0
    seed: int = 0
    run_dir: str = ""


def complete(request: Request, **values: Any) -> Settings:
    """Return the settings for a request, with the missing values filled in."""
    return Settings(**{**vars(request), **values})


def settings_that_affect(*kinds: str) -> set[str]:
    """The names of the settings that affect one of ``kinds``, which are listed in ``flags.AFFECTS``."""
    return {field.name for field in fields(Request) if field.metadata["affects"] in kinds}
