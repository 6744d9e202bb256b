"""Declaring and parsing flags, and the errors for invalid values; used by the parsers of all commands."""

from __future__ import annotations

import argparse
import math
from dataclasses import field
from typing import Any, Callable, Mapping, NoReturn

from vgglab.errors import UserError


def number(convert: Callable[[str], Any], low: float, high: float, allowed: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # false for nan
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return value

    parse.allowed = allowed  # type: ignore[attr-defined]  # for --help-all
    return parse


AT_LEAST_0 = number(int, 0, 10**9, "a whole number of at least 0")
AT_LEAST_1 = number(int, 1, 10**9, "a whole number of at least 1")
SIZE = number(int, 32, 4096, "a whole number from 32 (VGG halves the image five times) to 4096")
WORKERS = number(int, 0, 1024, "a whole number from 0 to 1024")
NON_NEGATIVE = number(float, 0.0, 1e30, "a number of at least 0")  # 1e30 still fits in float32
POSITIVE = number(float, 1e-30, 10.0, "a number above 0 and at most 10")
FRACTION = number(float, 0.0, 1 - 2**-53, "in [0, 1)")


SEED = number(int, 0, 2**32 - 1, "a whole number from 0 to 4294967295")


def steps(text: str) -> int:
    if text == "-1":
        return -1
    try:
        return AT_LEAST_1(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither -1 (all) nor a whole number of at least 1") from None


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "yes")


# What a setting affects. This decides whether a resumed run reports a change and a comparison shows a difference.
AFFECTS = {
    "weights": "what is learned; changing such a setting on resume makes the rest of the run a different experiment",
    "start": "the initial weights; no effect after a resume",
    "metrics": "which metrics of the network are measured, and when",
    "speed": "the speed of the run, and the device",
    "record": "what is recorded in the run directory",
    "location": "where the run directory is",
    "launch": "how the ranks are started; not recorded",
    "others": "nothing directly; it determines other settings",
}
NEVER_INHERITED = {"speed", "location", "launch"}


def flag(
    help: str,
    default: Any = None,
    parse: Callable[[str], Any] = str,
    affects: str = "weights",
    inherited: bool = True,
    implies: str = "",
    **options: Any,
) -> Any:
    """Declare a setting: its help, default and parser; ``names`` are additional names of the flag.

    Args:
        affects: one of ``AFFECTS``.
        inherited: a resumed run takes the setting from the checkpoint unless the command line sets it; ignored for
            settings that affect only the speed, the location or the launch, which are never inherited.
        implies: a second setting that this one determines; if this one is given, a resumed run inherits neither.
        options: further arguments of ``ArgumentParser.add_argument``; if ``choices`` is a dict, its values are
            descriptions and are added to the help.

    Raises:
        KeyError: ``affects`` is not one of ``AFFECTS``.
    """
    AFFECTS[affects]
    if isinstance(options.get("choices"), dict):
        help = f"{help}: {described(options['choices'])}"
    policy = {"affects": affects, "implies": implies, "is_inherited": inherited and affects not in NEVER_INHERITED}
    metadata = {"help": help, "parse": parse, "options": options, **policy}
    return field(default=default, metadata=metadata)


def switch(help: str, **options: Any) -> Any:
    """Declare a switch, off by default; accepts ``--flag``, ``--flag true`` and ``--flag false``."""
    default = None if "negation" in options else False  # with a --no- form, None means that neither form was given
    return flag(help, default=default, parse=boolean, nargs="?", const=True, metavar="true|false", **options)


def described(choices: Mapping[str, str]) -> str:
    """The choices of a flag for its help text, each with its description in parentheses."""
    return ", ".join(f"{name} ({description})" if description else name for name, description in choices.items())


class OneLineParser(argparse.ArgumentParser):
    """A parser that accepts no abbreviations of flags, and raises a UserError with a one-line message."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument ", "", 1) if message.startswith("argument ") else message)


def with_dashes(argument: str) -> str:
    """Replace underscores with dashes in a flag, not in its value: ``--batch_size=3`` becomes ``--batch-size=3``."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
