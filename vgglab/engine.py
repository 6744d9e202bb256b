"""The training loop. It knows no hardware, no flags' spelling and no pictures.

What differs between devices is in the device's verbs, what differs between experiments in the config;
everything it has to say it writes as events into the run directory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vgglab import checkpoint
from vgglab.checkpoint import TrainingState
from vgglab.config import Config
from vgglab.data.loader import Batches, eval_batches, mix_seeds, train_batches
from vgglab.data.sets import DataSets
from vgglab.devices.base import Device
from vgglab.errors import blaming
from vgglab.model import build, load_pretrained
from vgglab.runs import SCHEMA, RunWriter
from vgglab.schedule import build_optimizer, learning_rate, set_learning_rate


@dataclass
class Job:
    """Everything a run needs, built and checked before the run directory is made."""

    model: nn.Module  # as trained: over several ranks it averages gradients
    network: nn.Module  # the bare network in it
    optimizer: Optimizer
    state: TrainingState
    batches: Batches | None  # None with --test-only
    held_out: Batches
    warnings: list[str]


def prepare(config: Config, device: Device, sets: DataSets, saved: dict[str, Any] | None) -> Job:
    """Build the network, its optimizer and the batches; take up the checkpoint ``saved``, if there is one.

    Raises:
        UserError: a checkpoint that does not fit, weights that cannot be had, a batch larger than the set.
    """
    warnings = []
    device.seed(int(config.seed or 0))  # the same first weights on every rank
    batches = None if sets.train is None else train_batches(sets, config, device)
    network: nn.Module = build(
        config.model, num_classes=config.num_classes, dropout_rate=config.dropout_rate, head=config.head
    )
    if config.pretrained:
        fresh = load_pretrained(network, config.model)
        if fresh:
            warnings.append(f"--pretrained: {', '.join(fresh)} start fresh, their shape differs from ImageNet's")
    if saved is not None:
        with blaming(f"--resume {config.resume}"):
            checkpoint.restore_model(saved, network, config.model)
    model, network = device.wrap(network)
    optimizer = build_optimizer(config, network)
    state = TrainingState(epoch=config.start_epoch)
    if saved is not None and not config.test_only:
        with blaming(f"--resume {config.resume}"):
            state = checkpoint.restore_training(saved, optimizer, config.optimizer)
        warnings += [f"--resume: {change}" for change in checkpoint.changed_settings(saved, config.as_dict())]
    return Job(model, network, optimizer, state, batches, eval_batches(sets, config, device), warnings)


def train(job: Job, config: Config, device: Device, run: RunWriter) -> None:
    """Train, evaluating and saving every ``eval_freq`` epochs and after the last.

    Raises:
        UserError: an image that cannot be read.
    """
    model, optimizer, batches, state = job.model, job.optimizer, job.batches, job.state
    assert batches is not None
    loss_of = nn.CrossEntropyLoss()
    clock = Clock(images_per_step=config.batch_size * device.world_size)
    last_skipped_step = state.step + config.skip_steps  # a run's first steps are slow, also a resumed one's
    if config.resume and device.rank == 0:
        checkpoint.carry_best(config.resume, run.path / "checkpoints")

    if state.epoch >= config.epochs:
        text = f"nothing left to train: the checkpoint has {state.epoch} of {config.epochs} epochs"
        run.event("warning", text=text)
        evaluate(job, device, run)

    for epoch in range(state.epoch, config.epochs):
        # Each epoch starts from a seed of its own, so that one after a resume equals one without.
        device.seed(epoch_seed(config, device, epoch))
        set_learning_rate(optimizer, learning_rate(config, epoch, device.world_size))
        model.train()
        clock.restart()
        for step_in_epoch, (images, labels) in clock.waiting_for(batches.epoch(epoch)):
            images, labels = device.move(images, labels)  # (N, 3, S, S), (N,)
            with device.autocast():
                logits = model(images)  # (N, num_classes)
                loss = loss_of(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            device.backward(loss)
            device.step(optimizer, model, [loss, logits])
            state.step += 1

            is_due = step_in_epoch % config.print_freq == 0 or step_in_epoch == len(batches)
            if is_due or state.step == last_skipped_step:  # behind the skipped steps the clock starts anew
                correct = (logits.detach().argmax(1) == labels).float().mean()
                figures = device.sum(torch.stack([loss.detach().float(), correct]))
                mean_loss, mean_correct = device.fetch(figures / device.world_size)  # the loop's only host read
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

        state.epoch = epoch + 1
        if state.epoch % config.eval_freq == 0 or state.epoch == config.epochs:
            is_best = evaluate(job, device, run)
            if device.rank == 0:
                folder = run.path / "checkpoints"
                settings = {**config.as_dict(), "simulated": device.is_simulated}
                checkpoint.save(folder, job.network, optimizer, state, settings, is_best)
            run.event("checkpoint", epoch=epoch, step=state.step, is_best=is_best)

    num_steps = state.step - (last_skipped_step - config.skip_steps)
    if 0 < num_steps <= config.skip_steps:
        run.event("warning", text=f"no images/s: {num_steps} steps, all within --skip-steps {config.skip_steps}")


def epoch_seed(config: Config, device: Device, epoch: int) -> int:
    """What dropout draws from in this epoch on this rank; 32 bits, which any card takes."""
    return mix_seeds(int(config.seed or 0), epoch, device.rank) % 2**32


def announce(job: Job, config: Config, sets: DataSets, run: RunWriter) -> None:
    """The first event: what is about to happen, so that a reader can tell how far it is."""
    run.event(
        "start",
        schema=SCHEMA,
        data=sets.name,
        num_train_images=len(sets.train) if sets.train else 0,
        num_eval_images=len(sets.val),
        num_classes=config.num_classes,
        num_parameters=sum(p.numel() for p in job.network.parameters()),
        epochs=config.epochs,
        first_epoch=job.state.epoch,
        first_step=job.state.step,
        steps_per_epoch=len(job.batches) if job.batches else 0,
        best=job.state.best,
    )


@torch.no_grad()
def evaluate(job: Job, device: Device, run: RunWriter) -> bool:
    """Top-1, top-5 and mean loss over the held-out images, each counted once; true if top-1 is the best so far.

    With fewer than five classes, top-5 is top-n of the n there are.
    """
    network, batches, state = job.network, job.held_out, job.state
    _share_buffers(network, device)
    last_epoch = state.epoch - 1 if state.epoch else None  # counted from 0; none where nothing was trained
    run.event("eval_start", epoch=last_epoch, num_batches=len(batches))
    network.eval()
    totals = torch.zeros(4)  # [loss, top-1 hits, top-5 hits, images], summed on the card
    for images, labels in batches.epoch(0):
        images, labels = device.move(images, labels)
        with device.autocast():
            logits = network(images)
        totals = totals.to(logits.device) + _count(logits.float(), labels)
        device.flush([totals])
    loss_sum, hits1, hits5, num_images = device.fetch(device.sum(totals))
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
    """``[sum of losses, top-1 hits, top-5 hits, images]`` of one batch, float32, on the card."""
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, up to 5), best first
    hits = (top == labels[:, None]).float()
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(loss) * len(labels)])


@dataclass
class Clock:
    """Measures from one log line to the next. Read it only after the device was waited for."""

    images_per_step: int
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    data_seconds: float = 0.0

    def restart(self) -> None:
        self.started, self.steps, self.data_seconds = time.perf_counter(), 0, 0.0

    def waiting_for(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """Number the batches from 1 and add up the time spent waiting for them."""
        iterator, number = iter(batches), 0
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.data_seconds += time.perf_counter() - asked
            self.steps += 1
            number += 1
            yield number, batch

    def read(self) -> dict[str, Any]:
        """The interval that ends now; the next one starts."""
        seconds = time.perf_counter() - self.started
        num_images = self.steps * self.images_per_step
        interval = {
            "images_per_second": num_images / seconds,
            "interval_images": num_images,
            "interval_steps": self.steps,
            "interval_seconds": seconds,
            "data_seconds": self.data_seconds,
        }
        self.restart()
        return interval
