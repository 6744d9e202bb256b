"""Training: ``Trainer.step`` is one optimizer step, ``Trainer.fit`` the loop around it.

Devices differ only in the methods of ``Device``, and experiments differ only in their settings. Results are written to
the run directory, as events.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from vgglab.data.loader import eval_batches, mix_seeds, train_batches
from vgglab.data.transform import normalised
from vgglab.devices.collectives import broadcast_buffers, weights_agree
from vgglab.devices.tracing import Tracer
from vgglab.errors import NOT_FINITE_ADVICE, UserError, error_context
from vgglab.model import build, load_pretrained
from vgglab.optim import OPTIMIZERS, Objective, WeightAverage, build_optimizer, set_learning_rate
from vgglab.settings.schedule import SCHEDULES, learning_rate

if TYPE_CHECKING:  # types of the trainer's arguments
    from vgglab.data.sets import DataSets
    from vgglab.devices.base import Device
    from vgglab.pace import Pace
    from vgglab.runs.checkpoint import Checkpoint
    from vgglab.runs.writer import RankWriter
    from vgglab.settings.config import Settings


@dataclass
class TrainingState:
    """The progress of a run: ``epoch`` full epochs, ``images`` images of the current one, ``step`` steps in total.

    Checkpoints contain all fields.
    """

    epoch: int = 0
    images: int = 0
    step: int = 0
    best: dict[str, float] | None = None  # acc1 and acc5 in percent, each the highest so far
    num_poor: int = 0  # evaluations in a row without a new best top-1, since the last drop of the learning rate
    num_drops: int = 0  # drops of the learning rate so far (schedules with lr_patience)


class StepResult(NamedTuple):
    """Results of a training step. They are on the device: reading a value waits until the step is done."""

    logits: Tensor  # (N, num_classes)
    scalars: dict[str, Tensor]  # the loss of this rank's batch and other scalars (); averaged over the ranks and logged


class Trainer:
    """A network, its optimizer and its data on one rank.

    Attributes:
        model: the network; with several ranks, inside a wrapper that averages gradients.
        network: the same without the wrapper.
        average: a moving average of the weights, which is evaluated in their place; or None.
        batches: the training batches; None with ``test_only``.
        state: the progress.
        warnings: warnings before the first step, one line each.
    """

    def __init__(self, config: Settings, device: Device, sets: DataSets, saved: Checkpoint | None = None) -> None:
        """Build everything before the run directory is created; restore the checkpoint ``saved``, if given.

        Raises:
            UserError: the checkpoint does not match the settings, weights cannot be downloaded, or a batch is larger
                than the data set.
        """
        self.config, self.device, self.sets = config, device, sets
        self.warnings = [*device.warnings, *sets.warnings]
        device.seed(config.seed)  # the same initial weights on every rank
        self.batches = None if sets.train is None else train_batches(sets, config, device)
        self.held_out = eval_batches(sets, config, device)
        self.model, self.network = device.wrap(self._build_network(saved))
        changes_every_step = config.ema or OPTIMIZERS[config.optimizer].changes_every_step
        if changes_every_step and not (device.allows_changing_factors or config.test_only):
            if config.ema:
                raise UserError(f"--ema: not supported on {device.kind}; use --ema 0")
            raise UserError(f"--optimizer {config.optimizer}: not supported on {device.kind}; use sgd, or --test-only")
        self.average = WeightAverage(self.network, config.ema) if config.ema and not config.test_only else None
        if self.average is not None and saved is not None:
            self.average.network.load_state_dict(saved["model"])
        self.optimizer = build_optimizer(config, self.network, device.fused)
        self.objective = Objective(config, device)
        self.state = TrainingState(epoch=config.start_epoch)
        self.ranks_agree = True
        if saved is not None and not config.test_only:
            with error_context(f"--resume {config.resume}"):
                self.state = TrainingState(**saved.restore_training(self.optimizer, config.optimizer))
                device.load_scaler_state(saved.get("scaler", {}))

    def _build_network(self, saved: Checkpoint | None) -> nn.Module:
        config = self.config
        network = build(
            config.model,
            num_classes=config.num_classes,
            dropout_rate=config.dropout_rate,
            head=config.head,
            init=config.init,
        )
        if config.pretrained:
            new_layers = load_pretrained(network, config.model)
            if new_layers:
                names = ", ".join(new_layers)
                self.warnings.append(
                    f"--pretrained: random initial weights for {names}, because the published weights differ in shape"
                )
        if saved is not None:
            with error_context(f"--resume {config.resume}"):
                saved.restore_model(network, config.model, for_training=not config.test_only)
        return network

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Perform one optimizer step; ``images``, uint8 ``(N, S, S, 3)``, and ``labels (N,)`` are on the device."""
        device = self.device
        # Dropout, mixup and cutmix: a seed of 32 bits, which every card accepts; the same with and without a resume.
        device.seed(mix_seeds(self.config.seed, self.state.step, device.rank) % 2**32)
        images = normalised(images, device.channels_last)  # (N, 3, S, S) floats
        images, targets = self.objective.blend(images, labels)
        with device.autocast():
            logits = self.model(images)
            loss = self.objective(logits, targets)
        self.optimizer.zero_grad(set_to_none=True)
        device.backward(loss)
        device.average_gradients(self.model)
        result = StepResult(logits, {"loss": loss})  # gradients are still multiplied by device.loss_scale()
        device.step(self.optimizer, self.model, [*result.scalars.values(), logits])
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.network, self.state.step)
        return result

    def fit(self, run: RankWriter, pace: Pace) -> None:
        """Train; evaluate and save every ``eval_freq`` epochs and after the last.

        Raises:
            UserError: an image cannot be read, or the loss or a weight is not finite.
            StopRequested: a signal was received; a checkpoint has been saved.
        """
        config, state = self.config, self.state
        if state.epoch >= config.epochs:
            text = f"nothing left to train: the checkpoint is at epoch {state.epoch} and --epochs is {config.epochs}"
            run.event("warning", text=text)
            self.evaluate(run, state.epoch - 1)
        first_step = state.step
        num_traced = config.trace if self.device.rank == 0 else 0
        with closing(Tracer(run.path, config.skip_steps, num_traced)) as tracer:
            loop = Loop(self, run, pace, tracer)
            for epoch in range(state.epoch, config.epochs):
                rate = learning_rate(config, epoch, self.device.world_size, state.num_drops)
                set_learning_rate(self.optimizer, rate)
                loop.train_epoch(epoch)
                if epoch + 1 == config.epochs or (epoch + 1) % config.eval_freq == 0:
                    self._evaluate_and_save(run, epoch)
                state.epoch, state.images = epoch + 1, 0
        num_steps = state.step - first_step
        if 0 < num_steps <= config.skip_steps:
            text = f"no speed measured: all {num_steps} steps fell within --skip-steps {config.skip_steps}"
            run.event("warning", text=text)

    def _evaluate_and_save(self, run: RankWriter, epoch: int) -> None:
        is_best = self.evaluate(run, epoch)
        state = self.state
        state.epoch, state.images = epoch + 1, 0
        if "lr_patience" in SCHEDULES[self.config.lr_schedule].settings and epoch >= self.config.warmup:
            state.num_poor = 0 if is_best else state.num_poor + 1
            if state.num_poor >= self.config.lr_patience:
                state.num_poor, state.num_drops = 0, state.num_drops + 1
        run.save_checkpoint(self, is_best)

    def save_and_stop(self, run: RankWriter) -> NoReturn:
        """Save, unless the run only evaluates, and stop; say whether saving succeeded and how to continue."""
        if self.config.test_only or self.state.epoch >= self.config.epochs:
            run.stop()
        run.save_checkpoint(self)
        saved = "but the checkpoint could not be written" if run.has_lost_checkpoints else "checkpoint saved"
        run.stop(f"after step {self.state.step}, {saved}; {run.resume_advice}")

    def record_start(self, run: RankWriter) -> None:
        """Write the first event, which describes what the run will do, so that its progress can be shown."""
        config, sets, state = self.config, self.sets, self.state
        steps_per_epoch = len(self.batches) if self.batches else 0
        done_in_epoch = min(state.images // (config.batch_size * config.world_size), steps_per_epoch)
        num_remaining = max(0, (config.epochs - state.epoch) * steps_per_epoch - done_in_epoch)
        run.event(
            "start",
            data=sets.name,
            is_fake=sets.is_fake,
            num_train_images=len(sets.train) if sets.train else 0,
            num_eval_images=len(sets.val),
            num_classes=config.num_classes,
            num_parameters=sum(p.numel() for p in self.network.parameters()),
            epochs=config.epochs,
            first_epoch=state.epoch,
            first_step=state.step,
            num_steps=state.step + num_remaining,  # of the whole run, including those before a resume
            steps_per_epoch=steps_per_epoch,
            best=state.best,
        )

    @torch.no_grad()
    def evaluate(self, run: RankWriter, last_epoch: int | None = None) -> bool:
        """Evaluate on the held-out images: top-1, top-5 and mean loss. Returns whether top-1 is the best so far.

        ``last_epoch`` is the last trained epoch, counted from 0. With n < 5 classes, top-5 means top-n.

        Raises:
            StopRequested: a rank was asked to stop, so all ranks stop here; what was trained has been saved.
        """
        device, batches, state = self.device, self.held_out, self.state
        network = self.network if self.average is None else self.average.network
        if self.ranks_agree and not weights_agree(self.network, device):
            self.ranks_agree = False  # one warning is enough
            text = "the weights of the ranks differ: an update differed between ranks; rank 0's weights are saved"
            run.event("warning", text=text)
        broadcast_buffers(network, device)
        run.event("eval_start", epoch=last_epoch, num_batches=len(batches))
        network.eval()
        totals = torch.zeros(4)  # [loss, top-1 hits, top-5 hits, images], summed on the card
        for images, labels in device.feed(batches.epoch(0, on_skipped=run.skipped)):
            if run.stop_requested():
                break
            with device.autocast():
                logits = network(normalised(images, device.channels_last))
            totals = totals.to(logits.device) + _count_hits(logits.to(totals.dtype), labels)
            device.flush([totals])
        stop_flag = torch.tensor([float(run.stop_requested())]).to(totals.device)
        *sums, num_stopping = device.fetch(device.sum(torch.cat([totals, stop_flag])))
        if num_stopping:
            self.save_and_stop(run)
        loss_sum, top1_hits, top5_hits, num_images = sums
        if num_images == 0:
            raise UserError("--on-bad-image skip: none of the held-out images can be read; run vgglab data check")
        result = {"acc1": 100 * top1_hits / num_images, "acc5": 100 * top5_hits / num_images}
        is_best = state.best is None or result["acc1"] > state.best["acc1"]
        state.best = {name: max(value, (state.best or result)[name]) for name, value in result.items()}
        run.event(
            "eval",
            epoch=last_epoch,
            step=state.step,
            loss=loss_sum / num_images,
            num_images=int(num_images),
            **result,
        )
        return is_best


class Loop:
    """Runs the training epochs: the steps and, between them, logging, checkpoints and checks for stop requests."""

    def __init__(self, trainer: Trainer, run: RankWriter, pace: Pace, tracer: Tracer) -> None:
        self.trainer, self.run, self.pace, self.tracer = trainer, run, pace, tracer
        # The first steps of a run are slow, even after a resume.
        self.last_skipped_step = trainer.state.step + trainer.config.skip_steps

    def train_epoch(self, epoch: int) -> None:
        """Train on the remaining batches of this epoch."""
        trainer, clock, batches = self.trainer, self.pace.clock, self.trainer.batches
        assert batches is not None
        config, state = trainer.config, trainer.state
        trainer.model.train()
        clock.restart()
        first_batch = min(state.images // clock.images_per_step, len(batches))
        device_batches = trainer.device.feed(batches.epoch(epoch, first_batch, self.run.skipped))
        with self.pace.timing_phases(trainer):
            for batch, (images, labels) in clock.batches(device_batches, first_batch):
                result = trainer.step(images, labels)
                clock.end_step()
                self.tracer.end_step()
                state.images = batch * clock.images_per_step

                should_save = config.checkpoint_every > 0 and state.step % config.checkpoint_every == 0
                should_log = should_save or batch % config.print_freq == 0 or batch == len(batches)
                should_log = should_log or state.step == self.last_skipped_step  # logging restarts the clock
                if should_log or self.pace.coordinator.is_due():
                    self._log_and_sync(epoch, result, labels, should_log)
                if self.pace.coordinator.should_stop:
                    trainer.save_and_stop(self.run)
                if should_save:
                    self.run.save_checkpoint(trainer)
                    if trainer.device.world_size > 1:
                        trainer.device.true_on_all_ranks(True)  # wait for rank 0
                    clock.restart()  # the time for saving belongs to no step

    def _log_and_sync(self, epoch: int, result: StepResult, labels: Tensor, should_log: bool) -> None:
        """Average the scalars of ``result`` over the ranks and check for stop requests; log if ``should_log``."""
        dtype = torch.get_default_dtype()  # not that of the loss, which may be 16-bit with mixed precision
        scalars = {**result.scalars, "acc1": (result.logits.detach().argmax(1) == labels).to(dtype).mean()}
        values = torch.stack([value.detach().to(dtype) for value in scalars.values()])
        means, own_values = self.pace.coordinator.sync(values)  # the loop's only read from the device
        averaged, own = dict(zip(scalars, means)), dict(zip(scalars, own_values))
        loss, acc1 = averaged.pop("loss"), averaged.pop("acc1")
        trainer, step = self.trainer, self.trainer.state.step
        if not math.isfinite(loss):
            raise UserError(f"the loss is not finite ({loss}) at step {step}; {NOT_FINITE_ADVICE}")
        if should_log:
            self.run.rank_event(step=step, loss=own["loss"], **self.pace.clock.own_metrics(), **trainer.device.usage())
            self.run.event(
                "train",
                epoch=epoch,
                step=step,
                loss=loss,
                acc1=100 * acc1,
                lr=trainer.optimizer.param_groups[0]["lr"],
                is_measured=step > self.last_skipped_step,
                **self.pace.clock.read_interval(),
                **({"scalars": averaged} if averaged else {}),
            )


def _count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``[sum of losses, top-1 hits, top-5 hits, images]`` of a batch, on the device, as ``logits.dtype``."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, up to 5), best first
    hits = (top == labels[:, None]).to(loss.dtype)
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(loss) * len(labels)])
