"""Ranks started by ``srun``: set the environment variables of torchrun from those of Slurm."""

from __future__ import annotations

import os
from typing import MutableMapping

from vgglab.errors import UserError


def adopt_slurm_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Under ``srun`` with one task per card, set the environment variables that torchrun would set.

    Does nothing unless srun itself started several tasks: inside torchrun, or in a plain shell in an allocation,
    Slurm's variables describe something else.

    Raises:
        UserError: neither ``MASTER_ADDR`` nor ``SLURM_STEP_NODELIST`` is set.
    """
    is_step = "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1
    if "RANK" in environment or not is_step:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_WORLD_SIZE"] = environment.get("SLURM_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    # As is usual with Slurm, derive the port from the job ID, so that jobs on a node do not collide.
    environment.setdefault("MASTER_PORT", str(15000 + int(environment.get("SLURM_JOB_ID", 0)) % 20000))


def first_host(nodes: str) -> str:
    """The first host in Slurm's compact notation: ``gpu003`` for ``gpu[003-007,9],cpu1``. Raises UserError if empty."""
    if not nodes:
        raise UserError("SLURM_STEP_NODELIST is not set; set MASTER_ADDR to the name of the first node")
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.split(",")[0]
    number = rest.partition("]")[0].split(",")[0].split("-")[0]
    return prefix + number
