"""The training loop. It knows no hardware, no flags' spelling and no pictures.

What differs between devices is in the device's verbs, what differs between experiments in the config;
everything it has to say it writes as events into the run directory.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab import checkpoint, interrupts
from vgglab.average import Average
from vgglab.checkpoint import TrainingState
from vgglab.config import Config
from vgglab.data.loader import Batches, eval_batches, mix_seeds, train_batches
from vgglab.data.sets import DataSets
from vgglab.data.transform import normalised
from vgglab.devices.base import Device
from vgglab.errors import UserError, blaming
from vgglab.inheritance import changed_settings
from vgglab.interrupts import Leaving
from vgglab.model import build, load_pretrained
from vgglab.objective import Objective
from vgglab.pace import Clock, Watch
from vgglab.recording import RankWriter
from vgglab.runs import SCHEMA
from vgglab.schedule import build_optimizer, learning_rate, set_learning_rate
from vgglab.tracing import Tracer


@dataclass
class Job:
    """Everything a run needs, built and checked before the run directory is made."""

    model: nn.Module  # as trained: over several ranks it averages gradients
    network: nn.Module  # the bare network in it
    optimizer: Optimizer
    state: TrainingState
    objective: Objective
    average: Average | None  # of the weights, tested in their place
    batches: Batches | None  # None with --test-only
    held_out: Batches
    warnings: list[str]

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated."""
        return self.network if self.average is None else self.average.network


def prepare(config: Config, device: Device, sets: DataSets, saved: dict[str, Any] | None) -> Job:
    """Build the network, its optimizer and the batches; take up the checkpoint ``saved``, if there is one.

    Raises:
        UserError: a checkpoint that does not fit, weights that cannot be had, a batch larger than the set.
    """
    warnings = []
    device.seed(int(config.seed or 0))  # the same first weights on every rank
    batches = None if sets.train is None else train_batches(sets, config, device)
    network: nn.Module = build(
        config.model,
        num_classes=config.num_classes,
        dropout_rate=config.dropout_rate,
        head=config.head,
        init=config.init,
    )
    if config.pretrained:
        fresh = load_pretrained(network, config.model)
        if fresh:
            warnings.append(f"--pretrained: {', '.join(fresh)} start fresh, their shape differs from ImageNet's")
    if saved is not None:
        with blaming(f"--resume {config.resume}"):
            checkpoint.restore_model(saved, network, config.model, to_train=not config.test_only)
    model, network = device.wrap(network)
    if config.ema and not device.can_average:
        raise UserError(f"--ema: not offered on {device.kind}; leave it out")
    average = Average(network, config.ema) if config.ema and not config.test_only else None
    if average is not None and saved is not None:
        average.network.load_state_dict(saved["model"])
    optimizer = build_optimizer(config, network, device.fuses)
    state = TrainingState(epoch=config.start_epoch)
    if saved is not None and not config.test_only:
        with blaming(f"--resume {config.resume}"):
            state = checkpoint.restore_training(saved, optimizer, config.optimizer)
            device.load_scaler_state(saved.get("scaler", {}))
        warnings += [f"--resume: {change}" for change in changed_settings(saved, config.as_dict())]
    held_out, objective = eval_batches(sets, config, device), Objective(config, device)
    return Job(model, network, optimizer, state, objective, average, batches, held_out, warnings)


def train(job: Job, config: Config, device: Device, run: RankWriter) -> None:
    """Train, evaluating and saving every ``eval_freq`` epochs and after the last.

    Raises:
        UserError: an image that cannot be read; a loss that is not finite; no room for the last checkpoint.
        Leaving: a signal asked for it; the checkpoint is written.
    """
    num_traced = config.trace if device.rank == 0 else 0
    with closing(Tracer(run.path, config.skip_steps, num_traced)) as tracer:
        _train(job, config, device, run, tracer)


def _train(job: Job, config: Config, device: Device, run: RankWriter, tracer: Tracer) -> None:
    model, optimizer, batches, state = job.model, job.optimizer, job.batches, job.state
    assert batches is not None
    images_per_step = config.batch_size * device.world_size
    clock, watch = Clock(images_per_step, device, config.timers), Watch(device)
    last_skipped_step = state.step + config.skip_steps  # a run's first steps are slow, also a resumed one's
    if config.resume and device.rank == 0:
        checkpoint.carry_best(config.resume, run.path / "checkpoints")

    if state.epoch >= config.epochs:
        text = f"nothing left to train: the checkpoint has {state.epoch} of {config.epochs} epochs"
        run.event("warning", text=text)
        evaluate(job, device, run, state.epoch - 1)

    for epoch in range(state.epoch, config.epochs):
        set_learning_rate(optimizer, learning_rate(config, epoch, device.world_size, state.num_drops))
        model.train()
        clock.restart()
        first_batch = min(state.images // images_per_step, len(batches))
        arriving = device.feed(batches.epoch(epoch, first_batch, run.skipped))
        for batch, (images, labels) in clock.waiting_for(arriving, first_batch):
            # Each step draws from a seed of its own, so that one after a resume equals one without.
            device.seed(step_seed(config, device, state.step))
            images = normalised(images, device.channels_last)  # (N, S, S, 3) bytes to (N, 3, S, S) floats; labels (N,)
            images, targets = job.objective.blend(images, labels)
            clock.lap("copy")
            with device.autocast():
                logits = model(images)  # (N, num_classes)
                loss = job.objective(logits, targets)
            clock.lap("forward")
            clock.was_handed_over()  # from here on the ranks wait for one another
            optimizer.zero_grad(set_to_none=True)
            device.backward(loss)
            clock.lap("backward")
            device.average_gradients(model)
            clock.lap("all_reduce")
            device.step(optimizer, model, [loss, logits])
            if job.average is not None:
                job.average.update(job.network, state.step + 1)
            clock.lap("optimizer")
            clock.step_has_ended()
            tracer.step_has_ended()
            state.step, state.images = state.step + 1, batch * images_per_step

            is_saved = config.checkpoint_every > 0 and state.step % config.checkpoint_every == 0
            is_logged = is_saved or batch % config.print_freq == 0 or batch == len(batches)
            is_logged = is_logged or state.step == last_skipped_step  # behind the skipped steps the clock starts anew
            if is_logged or watch.is_due():
                dtype = torch.get_default_dtype()  # not the loss's, which mixed precision may have made coarse
                correct = (logits.detach().argmax(1) == labels).to(dtype).mean()
                mine = torch.stack([loss.detach().to(dtype), correct])
                mean_loss, mean_correct, own_loss = watch.look(mine)  # the loop's only host read
                _refuse_nan(mean_loss, state)
            if is_logged:
                run.rank_event(step=state.step, loss=own_loss, **clock.own(), **device.usage())
                run.event(
                    "train",
                    epoch=epoch,
                    step=state.step,
                    loss=mean_loss,
                    acc1=100 * mean_correct,
                    lr=optimizer.param_groups[0]["lr"],
                    is_measured=state.step > last_skipped_step,
                    **clock.read(),
                )
            if watch.all_leave:
                _save_and_leave(job, config, device, run)
            if is_saved:
                _save(job, config, device, run)

        if state.epoch + 1 == config.epochs or (state.epoch + 1) % config.eval_freq == 0:
            try:
                is_best = evaluate(job, device, run, epoch)
            except Leaving:
                _save_and_leave(job, config, device, run)  # all its images seen, its evaluation still to come
            state.epoch, state.images = epoch + 1, 0
            if config.lr_schedule == "plateau" and epoch >= config.warmup:
                state.was_evaluated(is_best, config.lr_patience)
            _save(job, config, device, run, is_best)
        else:
            state.epoch, state.images = epoch + 1, 0

    num_steps = state.step - (last_skipped_step - config.skip_steps)
    if 0 < num_steps <= config.skip_steps:
        run.event("warning", text=f"no images/s: {num_steps} steps, all within --skip-steps {config.skip_steps}")


def step_seed(config: Config, device: Device, step: int) -> int:
    """What dropout draws from in this step on this rank; 32 bits, which any card takes."""
    return mix_seeds(int(config.seed or 0), step, device.rank) % 2**32


def _save(job: Job, config: Config, device: Device, run: RankWriter, is_best: bool = False) -> None:
    """Rank 0 writes the checkpoint. One that does not fit on the disk ends the run only if it is the last."""
    state = job.state
    if device.rank != 0:
        return
    settings = {**config.as_dict(), "simulated": device.is_simulated}
    folder = run.path / "checkpoints"
    try:
        average = None if job.average is None else job.average.network
        checkpoint.save(folder, job.network, job.optimizer, device.scaler_state(), state, settings, is_best, average)
    except checkpoint.NotFinite as error:
        raise UserError(f"{error} is not finite after step {state.step}; {_ADVICE}") from None
    except checkpoint.CannotSave as error:
        left = "the one before is intact" if (folder / "last.pt").exists() else "there is none before it"
        text = f"the checkpoint of step {state.step} was not written ({error}); {left}"
        if state.epoch == config.epochs:
            run.accepted("checkpoints")  # said here
            lost = f"also not written: {run.losses()}; " if run.lost else ""
            raise UserError(f"{folder}: {text}; {lost}make room, then {_resume_advice(run)}") from None
        run.refused("checkpoints", text)
    else:
        run.accepted("checkpoints")  # a later one is as good
        run.event("checkpoint", epoch=state.epoch - (state.images == 0), step=state.step, is_best=is_best)


def _save_and_leave(job: Job, config: Config, device: Device, run: RankWriter) -> NoReturn:
    _save(job, config, device, run)
    if device.rank != 0:
        raise Leaving
    saved = "its checkpoint could not be written" if "checkpoints" in run.lost else "checkpoint saved"
    raise Leaving(f"after step {job.state.step}, {saved}; {_resume_advice(run)}")


def _resume_advice(run: RankWriter) -> str:
    """How to go on in the same run directory, from the beginning where it has no checkpoint."""
    return f"continue with --run-dir {run.path} --resume auto"


_ADVICE = "the last checkpoint is from before that; lower --lr or lengthen --warmup"


def _refuse_nan(loss: float, state: TrainingState) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the loss is not finite ({loss}) at step {state.step}; {_ADVICE}")


def announce(job: Job, config: Config, sets: DataSets, run: RankWriter) -> None:
    """The first event: what is about to happen, so that a reader can tell how far it is."""
    run.event(
        "start",
        schema=SCHEMA,
        data=sets.name,
        is_fake=sets.is_fake,
        num_train_images=len(sets.train) if sets.train else 0,
        num_eval_images=len(sets.val),
        num_classes=config.num_classes,
        num_parameters=sum(p.numel() for p in job.network.parameters()),
        epochs=config.epochs,
        first_epoch=job.state.epoch,
        first_step=job.state.step,
        num_steps=_num_steps(job, config),
        steps_per_epoch=len(job.batches) if job.batches else 0,
        best=job.state.best,
    )


def _num_steps(job: Job, config: Config) -> int:
    """Optimizer steps of the whole run, those before a resume included."""
    if not job.batches:
        return 0
    done_of_epoch = min(job.state.images // (config.batch_size * config.world_size), len(job.batches))
    left = (config.epochs - job.state.epoch) * len(job.batches) - done_of_epoch
    return job.state.step + max(left, 0)


@torch.no_grad()
def evaluate(job: Job, device: Device, run: RankWriter, last_epoch: int | None = None) -> bool:
    """Top-1, top-5 and mean loss over the held-out images, each counted once; true if top-1 is the best so far.

    ``last_epoch`` is the last that was trained, counted from 0. With fewer than five classes, top-5 is top-n.

    Raises:
        Leaving: a rank was asked to leave, so all stop here together.
    """
    network, batches, state = job.tested, job.held_out, job.state
    _share_buffers(network, device)
    run.event("eval_start", epoch=last_epoch, num_batches=len(batches))
    network.eval()
    totals = torch.zeros(4)  # [loss, top-1 hits, top-5 hits, images], summed on the card
    for images, labels in device.feed(batches.epoch(0, on_skipped=run.skipped)):
        if interrupts.leave_requested():
            break
        with device.autocast():
            logits = network(normalised(images, device.channels_last))
        totals = totals.to(logits.device) + _count(logits.to(totals.dtype), labels)
        device.flush([totals])
    asked_to_leave = torch.tensor([float(interrupts.leave_requested())]).to(totals.device)
    *figures, num_leaving = device.fetch(device.sum(torch.cat([totals, asked_to_leave])))
    if num_leaving:
        raise Leaving
    loss_sum, hits1, hits5, num_images = figures
    if num_images == 0:
        raise UserError("--on-bad-image skip: none of the held-out images can be read; python -m vgglab.data check")
    result = {"acc1": 100 * hits1 / num_images, "acc5": 100 * hits5 / num_images}
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


def _share_buffers(network: nn.Module, device: Device) -> None:
    """All ranks take rank 0's batch-norm statistics: those that are saved are those that are tested."""
    if device.world_size > 1:
        for buffer in network.buffers():
            buffer.copy_(device.sum(buffer if device.rank == 0 else torch.zeros_like(buffer)))
        device.flush(list(network.buffers()))


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """``[sum of losses, top-1 hits, top-5 hits, images]`` of one batch, in the type of ``logits``, on the card."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, up to 5), best first
    hits = (top == labels[:, None]).to(loss.dtype)
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(loss) * len(labels)])
