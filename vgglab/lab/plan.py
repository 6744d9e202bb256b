"""Plan a run before it starts: time, steps, checkpoints, disk space, learning rates.

    python -m vgglab.plan --recipe seed --images-per-second 590 --ranks 8
    python -m vgglab.plan --recipe modern --data-path imagenet --run runs/<a short measured run>
    python -m vgglab.plan --recipe quick --images-per-second 100 --json   # the last line of stdout is one JSON object

Accepts every training flag. Without ``--data-path``, recipes are planned for a data set the size of ImageNet, except
``quick``, which is planned for the digits. ``--images-per-second`` is the speed of one card; n cards are assumed to be
n times as fast, or n x ``--scaling`` times as fast if that flag is given.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

from vgglab.data.sets import open_sets
from vgglab.errors import UserError
from vgglab.lab.shapes import shapes_only
from vgglab.model import CONFIGURATIONS, build
from vgglab.optim import OPTIMIZERS
from vgglab.settings.config import Request
from vgglab.settings.parser import parse_flags, settings_warnings
from vgglab.settings.recipes import RECIPES
from vgglab.settings.schedule import SCHEDULES, learning_rate
from vgglab.view.progress import duration
from vgglab.view.tables import html_facts

IMAGENET = {"train": 1_281_167, "val": 50_000, "classes": 1000}
FORWARD_SHARE = 1 / 3  # of a training step's operations; the backward pass takes the other two thirds
MAX_RATE_RATIO = 4.0  # largest ratio to the recipe's rate
MAX_CARDS = 8  # the original example scales the rate for up to this many cards
# Rules of thumb: the rate is slightly above the original example's 0.06 on eight cards; the number of convolutions is
# that of VGG11 (paper, section 3.1).
MAX_RATE_WITHOUT_NORM, MAX_CONVOLUTIONS_WITH_NORMAL_INIT = 0.1, 8


class Plan(NamedTuple):
    """The result of ``plan_training``; ``vgglab plan --json`` prints its fields. Times in seconds, sizes in bytes."""

    data: str
    num_train_images: int
    num_eval_images: int
    ranks: int
    global_batch_size: int
    epochs: int
    steps_per_epoch: int
    steps: int
    images_per_second: float  # of all ranks together
    training_seconds: float  # without evaluation
    evaluation_seconds: float  # assuming that evaluating an image takes a third as long as training on it
    total_seconds: float
    num_checkpoints: int  # number written; at most three are kept
    checkpoint_bytes: int  # size of one checkpoint
    disk_bytes: int  # last, previous, best, and the one being written
    rates: list[tuple[int, float]]  # (epoch, from 0; learning rate) at each change
    warnings: list[str]

    def __repr__(self) -> str:
        return "\n".join(f"{name:<14}{text}" for name, text in _facts(self))

    def _repr_html_(self) -> str:
        return html_facts(_facts(self))


def plan_training(
    config: Request, images_per_second: float, ranks: int = 1, scaling: float = 1.0, given: Sequence[str] = ()
) -> Plan:
    """Estimate the duration, steps, disk space and learning rates of a training run.

    Args:
        config: the settings of the run.
        images_per_second: training speed of one card.
        ranks: number of cards.
        scaling: parallel efficiency, above 0: the speed of all ranks, divided by ``ranks`` times the speed of one card.
        given: names of the settings that were given in addition to the recipe.

    Raises:
        UserError: data set not found, or smaller than one batch; also for --test-only, --resume and --seeds.
    """
    if config.test_only or config.resume or config.seeds:
        raise UserError(
            "--test-only, --resume and --seeds: a plan covers one training run from the start; leave them out"
        )
    data, num_train, num_eval, num_classes, image_size = _data(config, given)
    global_batch = config.batch_size * ranks
    steps_per_epoch = num_train // global_batch
    if config.training_step_per_epoch != -1:
        steps_per_epoch = min(steps_per_epoch, config.training_step_per_epoch)
    if steps_per_epoch == 0:
        raise UserError(
            f"--batch-size {config.batch_size} x {ranks} ranks: larger than the training set ({num_train} images)"
        )
    rate = images_per_second * ranks * (scaling if ranks > 1 else 1.0)
    epochs = range(config.start_epoch, config.epochs)
    steps = steps_per_epoch * len(epochs)
    num_evaluations = sum((epoch + 1) % config.eval_freq == 0 or epoch + 1 == config.epochs for epoch in epochs)
    evaluated = num_eval
    if config.eval_step_per_epoch != -1:
        evaluated = min(num_eval, config.eval_step_per_epoch * global_batch)
    training_seconds = steps * global_batch / rate
    evaluation_seconds = num_evaluations * evaluated * FORWARD_SHARE / rate
    size = _checkpoint_bytes(config, num_classes, image_size)
    return Plan(
        data=data,
        num_train_images=num_train,
        num_eval_images=num_eval,
        ranks=ranks,
        global_batch_size=global_batch,
        epochs=len(epochs),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        images_per_second=rate,
        training_seconds=training_seconds,
        evaluation_seconds=evaluation_seconds,
        total_seconds=training_seconds + evaluation_seconds,
        num_checkpoints=num_evaluations + (steps // config.checkpoint_every if config.checkpoint_every else 0),
        checkpoint_bytes=size,
        disk_bytes=4 * size,
        rates=_rates(config, ranks),
        warnings=_warnings(config, ranks),
    )


def _data(config: Request, given: Sequence[str]) -> tuple[str, int, int, int, int]:
    """Return the description, numbers of training and held-out images, number of classes, and image size."""
    if "data_path" not in given and config.recipe is not None and RECIPES[config.recipe].data == "imagenet":
        return "ImageNet", IMAGENET["train"], IMAGENET["val"], IMAGENET["classes"], config.image_size or 224
    sets = open_sets(config)
    assert sets.train is not None
    return sets.name, len(sets.train), len(sets.val), sets.num_classes, sets.image_size


def _checkpoint_bytes(config: Request, num_classes: int, image_size: int) -> int:
    """Return the bytes of a checkpoint: weights, batch-norm statistics, their averages (--ema), and optimizer state."""
    with shapes_only():
        model = build(
            config.model, num_classes=num_classes, head=config.head, image_size=image_size, init_weights=False
        )
    num_parameters = sum(weight.numel() for weight in model.parameters())
    num_statistics = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    copies = 2 if config.ema else 1
    num_state_tensors = OPTIMIZERS[config.optimizer].num_state_tensors(config)
    return 4 * (num_parameters * (copies + num_state_tensors) + num_statistics * copies)


def _rates(config: Request, ranks: int) -> list[tuple[int, float]]:
    rates = [(epoch, learning_rate(config, epoch, ranks)) for epoch in range(config.start_epoch, config.epochs)]
    return [current for previous, current in zip([(0, None), *rates], rates) if current[1] != previous[1]]


def _warnings(config: Request, ranks: int) -> list[str]:
    lines = settings_warnings(config, OPTIMIZERS)
    rate = config.lr * config.batch_size * ranks / 256
    if config.recipe:
        recipe = parse_flags([f"--recipe={config.recipe}"])
        factor = rate / (recipe.lr * recipe.batch_size * min(ranks, MAX_CARDS) / 256)
        if not 1 / MAX_RATE_RATIO < factor < MAX_RATE_RATIO:
            lines.append(
                f"the learning rate is {rate:.3g} (scaled by batch size and ranks), {factor:.2g} x that of --recipe "
                f"{config.recipe} (scaled for at most {MAX_CARDS} cards): adjust --lr, or increase --warmup if too high"
            )
    base_name, norm, _ = config.model.partition("_bn")
    num_convolutions = sum(layer != "M" for layer in CONFIGURATIONS[base_name])
    if not norm and rate > MAX_RATE_WITHOUT_NORM:
        lines.append(
            f"--model {config.model} has no batch norm and is unlikely to learn at a learning rate of {rate:.3g}"
        )
    if not norm and config.init == "normal" and num_convolutions > MAX_CONVOLUTIONS_WITH_NORMAL_INIT:
        lines.append(
            f"--init normal: without batch norm, {config.model} does not learn from initial weights this small; "
            "use kaiming or xavier"
        )
    if "lr_patience" in SCHEDULES[config.lr_schedule].settings:
        schedule = f"--lr-schedule {config.lr_schedule}"
        lines.append(f"{schedule}: drops in the rate depend on held-out accuracy, so they cannot be planned")
    return lines


def _facts(plan: Plan) -> list[tuple[str, str]]:
    cards = "1 card" if plan.ranks == 1 else f"{plan.ranks} cards"
    evaluation, rates = duration(plan.evaluation_seconds), plan.rates
    if len(rates) > 12:
        rates = rates[:: len(rates) // 10]  # 10 to 19 of them, evenly spaced
    return [
        ("data", f"{plan.data}: {plan.num_train_images:,} training and {plan.num_eval_images:,} held-out images"),
        (
            "steps",
            f"{plan.steps:,} with {plan.global_batch_size} images each: {plan.epochs} epochs of "
            f"{plan.steps_per_epoch:,} steps",
        ),
        (
            "time",
            f"{duration(plan.total_seconds)} at {plan.images_per_second:,.0f} images/s on {cards}, "
            f"including {evaluation} for evaluation",
        ),
        (
            "checkpoints",
            f"{plan.num_checkpoints} written, {plan.checkpoint_bytes / 1e9:.2f} GB each; at most three are kept, "
            f"plus the one being written: up to {plan.disk_bytes / 1e9:.2f} GB on disk",
        ),
        ("learning rate", ", ".join(f"{rate:.3g} from epoch {epoch + 1}" for epoch, rate in rates)),
        *(("warning", text) for text in plan.warnings),
    ]
