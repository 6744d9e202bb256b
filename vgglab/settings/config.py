"""The settings: ``Request`` is the only list of them, ``Settings`` the same without gaps; neither ever changes.

The parser (``parser.py``), ``config.json``, ``launch``, what a resumed run inherits and what a comparison shows are
made from the list. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from vgglab.devices import AMP_DTYPES, DEVICE_CHOICES
from vgglab.settings.flags import (
    AT_LEAST_0,
    AT_LEAST_1,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SIZE,
    WORKERS,
    flag,
    steps,
    switch,
)  # fmt: skip
from vgglab.settings.recipes import RECIPES
from vgglab.settings.schedule import SCHEDULES

MODELS = tuple(f"vgg{depth}{suffix}" for depth in (11, 13, 16, 19) for suffix in ("", "_bn"))
# What these choose needs torch; the tables with the functions are in data/ (sets, crops, decoders), model.py, optim.py.
DATA_SETS = ("digits", "fashion-mnist", "cifar10", "cifar100", "imagenette", "fake")
CROPS = ("standard", "scale-jitter", "trivial")
INITS = ("kaiming", "xavier", "normal")
OPTIMIZERS = ("sgd", "rmsprop")
DECODERS = ("pil", "fast")
HEADS = ("auto", "imagenet", "small")
# The headings of --help.
WHAT, HOW, WHERE, SAVING = "what to train", "how long, and how", "on what", "saving and resuming"
SEED_OF_FIX_SEED = 1 << 20  # the seed kit's
SEED_NUM_CLASSES = 1000  # in all four of the seed kit's commands, whatever the folder holds


@dataclass(frozen=True)
class Request:
    """What is asked of a run; None where the run chooses. Defaults are the seed kit's unless the help says more."""

    recipe: str | None = flag(
        "a named set of settings (vgglab/settings/recipes.py); any flag overrides what it says",
        choices=tuple(RECIPES),
        affects="others",
        section=WHAT,
    )
    data_path: str = flag(
        f"a folder with train/ and val/ in class folders, or a data set by name: {', '.join(DATA_SETS)} (digits is "
        "bundled, fake is generated to measure computing alone, the others are downloaded the first time)",
        "digits",
        implies=("num_classes",),
        section=WHAT,
    )
    num_classes: int | None = flag("classes; default: as many as the folder has", None, AT_LEAST_1)
    model: str = flag("the network", "vgg16", choices=MODELS, section=WHAT)
    device: str = flag(
        "where to train; auto takes the best there is",
        "auto",
        choices=DEVICE_CHOICES,
        affects="speed",
        inherited=False,
        section=WHERE,
    )
    batch_size: int = flag("images per card and step", 32, AT_LEAST_1, names=["-b"], section=HOW)
    epochs: int = flag("passes over the training images", 90, AT_LEAST_1, section=HOW)
    workers: int | None = flag(
        "loader processes per card; default: 16, but no more than this machine has cores",
        None,
        WORKERS,
        names=["-j"],
        affects="speed",
        inherited=False,
        section=WHERE,
    )
    image_size: int | None = flag(
        "side of the square images, in pixels; default: 224, or 32 for the named sets of small images", None, SIZE
    )
    decoder: str = flag(
        "how images are read: pil (as torchvision's reference, to the last bit) or fast (simplejpeg, and no more rows "
        "than the crop needs); auto: fast where it can be",
        "auto",
        choices=("auto", *DECODERS),
    )
    on_bad_image: str = flag(
        "a file that cannot be read ends the run, or is left out, counted and listed in the run's log/",
        "fail",
        choices=("fail", "skip"),
    )
    head: str = flag("classifier: the paper's, a small one, or by image size", "auto", choices=HEADS)
    dropout_rate: float = flag("both dropouts of the classifier", 0.0, FRACTION, section=HOW)
    init: str = flag(
        "first weights of the convolutions: kaiming (torchvision's), xavier, or normal (the paper's N(0, 0.01), from "
        "which deep networks without batch norm do not start)",
        "kaiming",
        choices=INITS,
        affects="start",
    )
    pretrained: bool = switch(
        "start from torchvision's published ImageNet weights", affects="start", inherited=False, section=WHAT
    )

    lr: float = flag(
        "learning rate for 256 images; scaled by batch size x ranks / 256", 0.01, NOT_NEGATIVE, section=HOW
    )
    optimizer: str = flag("the optimizer", "sgd", choices=OPTIMIZERS)
    momentum: float = flag("momentum", 0.9, FRACTION)
    nesterov: bool = switch("Nesterov momentum (sgd)")
    rmsprop_alpha: float = flag(
        "smoothing of squared gradients (rmsprop); torchvision's reference has the same", 0.9, FRACTION
    )
    rmsprop_eps: float = flag("added to the root (rmsprop)", 0.0316, POSITIVE)
    weight_decay: float = flag("weight decay", 1e-4, NOT_NEGATIVE, names=["--wd"])
    bn_weight_decay: bool = switch("apply weight decay to batch norm too")
    bias_weight_decay: bool | None = switch(
        "apply weight decay to biases; default: yes, as the seed kit", negation="--no-bias-weight-decay"
    )
    lr_schedule: str = flag("how the rate falls after warm-up", "step", choices=tuple(SCHEDULES))
    warmup: int = flag("epochs over which the rate rises to its base", 5, AT_LEAST_0)
    end_lr: float = flag("final learning rate (cosine), reached one epoch after the last", 0.0, NOT_NEGATIVE)
    lr_step_size: int | None = flag("step: epochs between two drops; default: drops at 30, 60 and 80", None, AT_LEAST_1)
    lr_gamma: float = flag("step and plateau: what each drop multiplies the rate by", 0.1, POSITIVE)
    lr_patience: int = flag("plateau: evaluations without a better top-1 before a drop", 5, AT_LEAST_1)

    crops: str = flag(
        "training images: standard (a random part, mirrored or not), scale-jitter (the paper's: the shorter side "
        "drawn from 256 to 512, for crops of 224), trivial (standard, then one of TrivialAugment's operations)",
        "standard",
        choices=CROPS,
    )
    label_smoothing: float = flag("share of the target that is spread over all classes", 0.0, FRACTION)
    mixup: float = flag("blend pairs of images, by Beta(this, this); 0: no", 0.0, NOT_NEGATIVE)
    cutmix: float = flag(
        "paste a part of another image, its area by Beta(this, this); 0: no; with --mixup one of the two, by lot",
        0.0,
        NOT_NEGATIVE,
    )
    ema: float = flag(
        "test a moving average of the weights, this much of it kept at each step (less in the first steps); 0: no",
        0.0,
        FRACTION,
    )

    amp: bool = switch(
        "mixed precision: bfloat16 on cpu, float16 with static loss scale 128 on cards",
        names=["--torch-amp"],
        affects="others",
        inherited=False,
        implies=("amp_dtype",),
    )
    amp_dtype: str | None = flag("mixed precision in this type (implies --amp)", None, choices=AMP_DTYPES)
    tf32: bool | None = switch(
        "float32 matrix products in TF32 on cards that have it; default: no, or what ENFLAME_ENABLE_TF32 says (T20)",
        negation="--no-tf32",
        inherited=False,
    )
    fast: bool = switch(
        "the fastest honest path of the device, which rounds otherwise: mixed precision where the hardware has it, "
        "--channels-last and --fused",
        affects="others",
        implies=("amp_dtype",),
        section=WHERE,
    )
    channels_last: bool | None = switch(
        "images and weights in memory with the channels of a pixel side by side; default: no, or what --fast says",
        negation="--no-channels-last",
        inherited=False,
    )
    fused: bool | None = switch(
        "the optimizer's step in one kernel for all weights; default: no, or what --fast says",
        negation="--no-fused",
        inherited=False,
    )
    compile: bool = switch("torch.compile the network; the first steps take a minute longer")
    sync_bn: bool = switch("batch norm over all ranks")
    broadcast_buffers: bool = switch("send rank 0's buffers to all ranks before each step")
    nproc: int = flag(
        "ranks to start on this machine, one a card", 1, AT_LEAST_1, affects="launch", inherited=False, section=WHERE
    )
    max_restarts: int = flag(
        "how many times to restart all ranks, from the last checkpoint, after one has died",
        0,
        AT_LEAST_0,
        affects="launch",
        inherited=False,
    )
    world_size: int = flag("ranks; a launcher's WORLD_SIZE has precedence", 1, AT_LEAST_1, inherited=False)
    dist_url: str = flag("how the ranks find each other", "env://", affects="place", inherited=False)
    fix_seed: bool = switch(f"--seed {SEED_OF_FIX_SEED}", affects="others", inherited=False, implies=("seed",))
    seeds: str | None = flag(
        "train several times: how many seeds, such as 5, or which, such as 3,17,23",
        affects="place",
        inherited=False,
        section=HOW,
    )
    seed: int | None = flag("seed of everything random; default: drawn and recorded", None, SEED, section=HOW)

    training_step_per_epoch: int = flag("end each epoch after so many steps; -1: all", -1, steps)
    eval_step_per_epoch: int = flag(
        "end each evaluation after so many batches; -1: all", -1, steps, affects="figures", inherited=False
    )
    skip_steps: int = flag("first steps left out of the images/s figures", 10, AT_LEAST_0, affects="record")
    print_freq: int = flag("steps between log lines", 10, AT_LEAST_1, affects="record")
    eval_freq: int = flag(
        "epochs between evaluations and checkpoints (the last always has both)", 1, AT_LEAST_1, affects="figures"
    )
    output_dir: str = flag("the run directory is made in <this>/runs", ".", affects="place", inherited=False)
    run_dir: str | None = flag(
        "use exactly this run directory instead", affects="place", inherited=False, section=SAVING
    )
    timers: bool = switch(
        "measure the parts of each step, and average gradients apart from the backward pass",
        affects="speed",
        inherited=False,
    )
    trace: int = flag(
        "write a profiler's trace of so many steps, after --skip-steps, into the run directory",
        0,
        AT_LEAST_0,
        affects="speed",
        inherited=False,
    )
    tensorboard: bool = switch(
        "write TensorBoard scalars into the run directory", affects="record", inherited=False, section=SAVING
    )
    resume: str | None = flag(
        "go on from a checkpoint file, a run directory, or auto: the newest intact one of --run-dir (in place) or of "
        "<output-dir>/runs, from the start where there is none; flags not given are as they were there",
        affects="place",
        inherited=False,
        section=SAVING,
    )
    checkpoint_every: int = flag(
        "steps between checkpoints, besides those after an evaluation; 0: none",
        0,
        AT_LEAST_0,
        affects="record",
        section=SAVING,
    )
    start_epoch: int = flag(
        "first epoch, counted from 0, where no checkpoint says it", 0, AT_LEAST_0, affects="start", inherited=False
    )
    test_only: bool = switch(
        "only evaluate the weights of --resume or --pretrained", affects="figures", inherited=False, section=SAVING
    )
    cache_dataset: bool = switch(
        "accepted; listings of large folders are always kept, and checked against the folder",
        affects="others",
        inherited=False,
    )

    # The seed kit's dead ends: accepted so that an old command line gets an answer.
    apex: bool = switch("not here: use --amp", affects="others", inherited=False)
    apex_opt_level: str | None = flag("not here: use --amp", affects="others", inherited=False)
    enable_horovod: bool = switch("not here: use --nproc", affects="others", inherited=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as ``config.json`` holds them."""
        started_by = settings_that_affect("launch")
        return {name: value for name, value in asdict(self).items() if name not in started_by}


@dataclass(frozen=True)
class Settings(Request):
    """Everything that decides what a run does, without gaps."""

    num_classes: int = 0
    workers: int = 0
    image_size: int = 0
    seed: int = 0
    run_dir: str = ""


def complete(request: Request, **filled_in: Any) -> Settings:
    """The settings that a request comes to."""
    return Settings(**{**vars(request), **filled_in})


def settings_that_affect(*kinds: str) -> set[str]:
    """The names of the settings that affect one of these, of ``flags.AFFECTS``."""
    return {item.name for item in fields(Request) if item.metadata["policy"].affects in kinds}
