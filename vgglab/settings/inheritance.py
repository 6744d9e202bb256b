"""Which settings a resumed run inherits from its checkpoint, and which ones it changes."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields, replace
from typing import Any, Sequence

from vgglab.errors import UserError
from vgglab.settings.config import Request, settings_that_affect
from vgglab.settings.parser import check_conflicts
from vgglab.settings.schedule import SCHEDULES


def inherit(request: Request, given: Sequence[str], saved: dict[str, Any]) -> Request:
    """Return a copy of the request whose inheritable settings, except those in ``given``, come from the resumed run.

    Raises:
        UserError: a setting in the checkpoint is invalid, or cannot be combined with one that was given.
    """
    request = replace(request, **inherited_settings(given, saved))
    check_conflicts(request)
    return request


def inherited_settings(given: Sequence[str], saved: dict[str, Any]) -> dict[str, Any]:
    """Return the inheritable settings of a run, except those in ``given``. Raises UserError if one is invalid."""
    settings = {field.name: field for field in fields(Request)}
    chosen = {*given, *(settings[name].metadata["implies"] for name in given)}
    return {
        field.name: check_setting(field, saved[field.name])
        for field in settings.values()
        if field.name in saved and field.name not in chosen and field.metadata["is_inherited"]
    }


def check_setting(field: Field, value: Any) -> Any:
    """Check a setting read from a file as its flag would be checked, and return its value."""
    if value is None:
        return field.default
    try:
        parsed = field.metadata["parse"](str(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UserError(f"the saved setting {field.name} is invalid: {error}") from None
    if parsed not in field.metadata["options"].get("choices", (parsed,)):
        raise UserError(f"the saved setting {field.name} is invalid: {value!r}")
    return parsed


FLAG_FOR = {"world_size": "nproc"}  # settings whose value users choose with another flag


def changed_settings(checkpoint: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return ``--lr 0.01, was 0.1`` for each setting that affects the weights and differs from the checkpoint."""
    before, names = checkpoint.get("config", {}), settings_that_affect("weights")
    if not SCHEDULES[config["lr_schedule"]].depends_on_epochs:
        names.remove("epochs")  # more epochs change nothing in the earlier ones
    return [
        f"--{FLAG_FOR.get(name, name).replace('_', '-')} {config[name]}, was {before[name]}"
        for name in config
        if name in names and name in before and before[name] != config[name]
    ]
