"""``gcu-sim``: the adapter ``gcu_eager.py`` on the simulated card of ``sim/``, for machines without a GCU card."""

from __future__ import annotations

from typing import Any

from vgglab.devices import DeviceOptions, sim
from vgglab.devices.gcu_eager import EagerGcu
from vgglab.errors import UserError


def open_adapter(kind: str, options: DeviceOptions) -> SimulatedGcu:
    """Return the adapter for the simulated card. Raises UserError if this process cannot simulate one."""
    return SimulatedGcu(options)


class SimulatedGcu(EagerGcu):
    """A GCU card simulated on the CPU; its runs and their metrics are marked as simulated."""

    kind = "gcu-sim"

    def __init__(self, options: DeviceOptions) -> None:
        try:
            sim.install()
            sim.card.num_cards()
        except (sim.CannotSimulate, ValueError) as error:
            raise UserError(f"--device gcu-sim: {error}") from None
        super().__init__(options, sim)  # which says that it is simulated

    def _hardware(self) -> str:
        return f"{super()._hardware()} (simulated)"

    def usage(self) -> dict[str, Any]:
        return {**super().usage(), "host_reads": sim.num_host_reads()}
