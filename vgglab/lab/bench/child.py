"""A separate process that performs training steps in one mode, on request.

On a noisy machine, two processes with interleaved steps are disturbed equally. Process-wide settings, such as how
the C library handles freed memory, do not affect the other process.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any, Iterator, NamedTuple

import torch
from torch import nn

from vgglab.data.loader import Batch, train_batches
from vgglab.data.sets import open_sets
from vgglab.data.transform import normalised
from vgglab.devices import open_device
from vgglab.devices.base import Device
from vgglab.devices.compat import without_compiler
from vgglab.devices.memory import is_out_of_memory, limit_to_free_memory
from vgglab.errors import UserError
from vgglab.lab.ceilings import product_flop_per_second
from vgglab.model import build, head_for
from vgglab.optim import device_options, set_learning_rate
from vgglab.settings.config import complete
from vgglab.settings.parser import parse_flags
from vgglab.settings.schedule import learning_rate
from vgglab.trainer import Trainer


class Mode(NamedTuple):
    """A training mode: vgglab with these flags, or a plain PyTorch loop."""

    name: str
    flags: tuple[str, ...] = ()
    is_plain: bool = False  # a float32 loop like that of torchvision's reference script
    is_prepared: bool = True  # the process is set up as for training with vgglab
    uses_torchvision: bool = False  # the network is torchvision's, too


class Network(NamedTuple):
    """The network to train: everything needed to build it in another process."""

    model: str
    num_classes: int
    image_size: int
    head: str
    uses_torchvision: bool

    def build(self, dropout_rate: float = 0.5, init_weights: bool = True) -> nn.Module:
        options = {"num_classes": self.num_classes, "init_weights": init_weights}
        if not self.uses_torchvision:
            return build(self.model, dropout_rate=dropout_rate, head=self.head, **options)
        from torchvision import models

        if not hasattr(models, self.model):
            raise UserError(f"--against torchvision: torchvision has no {self.model}; choose another network")
        return getattr(models, self.model)(**options)


class Ready(NamedTuple):
    """The first answer of the process, sent when it is ready for requests."""

    device: dict[str, Any]  # from device.describe()
    network: Network
    num_warm_up_steps: int


class Failure(NamedTuple):
    """The last answer of the process, if it cannot do what was requested."""

    reason: str
    out_of_memory: bool = False


# The first step allocates memory and the optimizer's state; on a card, the next few still load kernels.
WARM_UP_ON_HOST, WARM_UP_ON_CARD = 1, 5
PEAK_REPEATS = 2  # of each matrix product, for each "peak" request


def serve(connection: Connection, mode: Mode, flags: list[str]) -> None:
    """Serve requests from the connection until one is None; the reply to that one is the device usage.

    ``Ready`` is sent before the first request. The reply to a number of steps is the list of their times in seconds;
    the reply to ``"peak"`` is the FLOP/s of a matrix product in the mode's precision. A ``Failure`` can replace any
    reply.
    """
    try:
        request = parse_flags([*flags, *mode.flags])
        device = open_device(request.device, **device_options(request))
        if mode.is_prepared:
            device.open()
        runs_on_host = device.is_host or device.is_simulated
        if runs_on_host:
            limit_to_free_memory()
        sets = open_sets(request)
        head = head_for(request.model, sets.image_size, request.head)
        config = complete(
            request, seed=0, workers=0, num_classes=sets.num_classes, image_size=sets.image_size, head=head
        )
        batch = next(iter(train_batches(sets, config, device).epoch(0)))
        network = Network(config.model, config.num_classes, config.image_size, config.head, mode.uses_torchvision)
        num_warm_up_steps = WARM_UP_ON_HOST if runs_on_host else WARM_UP_ON_CARD
        connection.send(Ready(device.describe(), network, num_warm_up_steps))
        if mode.is_plain:
            _plain_loop(connection, network.build(config.dropout_rate), device, batch)
        else:
            trainer = Trainer(config, device, sets)
            set_learning_rate(trainer.optimizer, learning_rate(config, 0, device.world_size))
            trainer.model.train()
            batches = (batch for _ in _steps(connection, device))
            for images, labels in device.feed(batches):  # copies each batch to the device, as the training loop does
                trainer.step(images, labels)
    except UserError as error:
        connection.send(Failure(str(error)))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        connection.send(Failure(f"--batch-size {request.batch_size}: out of memory on {request.device}", True))
    except (KeyboardInterrupt, EOFError):
        pass


def _steps(connection: Connection, device: Device) -> Iterator[None]:
    """Yield once for each requested step and time it until its work on the device is done.

    Other requests are answered here, too. The request None ends the iteration.
    """
    usage: dict[str, Any] = {}
    while True:
        request = connection.recv()
        if request is None:
            connection.send(usage or device.usage())
            return
        if request == "peak":
            usage = usage or device.usage()  # read before the matrices of the measurement add to it
            connection.send(product_flop_per_second(device, device.amp_dtype or "float32", PEAK_REPEATS))
            continue
        seconds = []
        for _ in range(request):
            started = time.perf_counter()
            yield
            device.fetch(device.sum(torch.zeros(1)))  # returns when all earlier work is done
            seconds.append(time.perf_counter() - started)
        connection.send(seconds)


def _plain_loop(connection: Connection, network: nn.Module, device: Device, batch: Batch) -> None:
    images, labels = device.move(batch.images, batch.labels)
    images = normalised(images)
    model, _ = device.wrap(network)
    model.train()
    optimizer = without_compiler(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in _steps(connection, device):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
