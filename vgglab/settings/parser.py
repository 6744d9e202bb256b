"""Parse a command line into settings, including those of a recipe. Nothing here imports torch.

The flags include those of the original example; ``-`` and ``_`` are interchangeable in their names.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from dataclasses import Field, fields, replace
from typing import Any, Mapping, Sequence

from vgglab.errors import UserError
from vgglab.settings.config import FIXED_SEED, Request
from vgglab.settings.flags import OneLineParser, with_dashes
from vgglab.settings.recipes import RECIPES
from vgglab.settings.schedule import SCHEDULES

EPILOG = """examples:
  vgglab train --recipe quick                                     a first run, on the bundled digits
  vgglab train --data-path imagenet --batch-size 192 --nproc 8    ImageNet on eight cards
  vgglab train --run-dir runs/my_run --resume auto                start, or continue after an interruption
  vgglab train --resume runs/my_run --test-only                   evaluate a trained network
exit codes: 0 done; 1 a bug, with a traceback; 2 bad input, explained in one
line; 75 stopped by SIGTERM, SIGUSR1 or SIGHUP after saving a checkpoint; 130
interrupted"""

SECTIONS = {  # the flags that --help shows; --help-all shows the others, too
    "what to train": "recipe data_path model pretrained",
    "schedule and hyperparameters": "batch_size epochs dropout_rate lr seeds seed",
    "hardware": "device workers fast nproc",
    "saving and resuming": "run_dir tensorboard resume checkpoint_every test_only",
}


class _BriefFormatter(argparse.RawDescriptionHelpFormatter):
    """Formats help with one line per flag, if the terminal is wide enough."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = max(action.option_strings, key=len)
        return name if action.nargs in (0, "?") else f"{name} {action.dest.rpartition('_')[2].upper()}"


class _HelpAll(argparse.Action):
    """Print the help with all flags and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        build_parser(show_all=True).print_help()
        parser.exit()


def build_parser(show_all: bool = False) -> argparse.ArgumentParser:
    """The parser of ``vgglab train``; its help shows the flags in ``SECTIONS``, or all with ``show_all``."""
    parser = OneLineParser(
        prog="vgglab train",
        usage="vgglab train [--flag value ...]",
        description="Train VGG and write the results to a run directory.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter if show_all else _BriefFormatter,
    )
    parser.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all flags, each with its full description")
    groups: dict[str, Any] = {}
    for title, members in SECTIONS.items():
        section = parser.add_argument_group(title)
        groups.update((member, section) for member in members.split())
    others = parser.add_argument_group("all other flags") if show_all else parser
    for field in fields(Request):
        group, options = groups.get(field.name, others), dict(field.metadata["options"])
        text, parse = field.metadata["help"], field.metadata["parse"]
        if show_all:
            text = _help(field, text, getattr(parse, "allowed", ""))
        else:
            text = argparse.SUPPRESS if group is others else _help(field, re.split("[;:] ", text)[0])
        names = [with_dashes("--" + field.name), *options.pop("names", [])]
        negation = options.pop("negation", None)
        if negation:
            negation_help = f"turn {names[0]} off" if show_all else argparse.SUPPRESS
            group.add_argument(negation, dest=field.name, action="store_const", const=False, help=negation_help)
        group.add_argument(*names, dest=field.name, type=parse, help=text, **options)
    return parser


def _help(field: Field, text: str, allowed: str = "") -> str:
    shows_default = field.default is not None and field.default is not False
    default = f"default {field.default}" if shows_default else ""
    notes = "; ".join(filter(None, (allowed, default)))
    return f"{text} ({notes})" if notes else text


def parse_flags(argv: Sequence[str]) -> Request:
    """Parse flags into settings.

    Raises:
        UserError: an unknown flag, a value out of range, or flags that contradict each other.
    """
    parser = build_parser()
    given, unknown = _parse(parser, argv)
    if unknown:
        raise UserError(_unknown_flag(unknown[0], parser))
    request = Request(**given)
    check_conflicts(request)
    return replace(request, seed=FIXED_SEED) if request.fix_seed else request


def flags_given(argv: Sequence[str]) -> list[str]:
    """The names of the settings given on a command line, directly or by a recipe."""
    return list(_parse(build_parser(), argv)[0])


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings given on a command line, directly or by a recipe, and the unrecognised arguments."""
    arguments = [with_dashes(argument) for argument in argv]
    parsed, unknown = parser.parse_known_args(arguments)
    if "recipe" in parsed:  # its flags come first, so that the others override them
        parsed, unknown = parser.parse_known_args([*RECIPES[parsed.recipe].flags.split(), *arguments])
    return vars(parsed), unknown


def _unknown_flag(argument: str, parser: argparse.ArgumentParser) -> str:
    if not argument.startswith("-"):
        return f"{argument!r} is not expected here; did you mean --data-path {argument}?"
    name = argument.partition("=")[0]
    matches = difflib.get_close_matches(name, list(parser._option_string_actions), n=1)
    hint = f"; did you mean {matches[0]}?" if matches else "; --help-all lists all flags"
    return f"{name}: no such flag{hint}"


def check_conflicts(config: Request) -> None:
    """Raise UserError if settings contradict each other."""
    if config.apex or config.apex_opt_level is not None:
        raise UserError("--apex: not supported; use --amp for mixed precision")
    if config.enable_horovod:
        raise UserError("--enable-horovod: not supported; start several ranks with --nproc N")
    if config.nesterov and (config.momentum == 0 or config.optimizer != "sgd"):
        raise UserError("--nesterov: needs --optimizer sgd and a --momentum above 0")
    if config.bn_weight_decay and config.bias_weight_decay is False:
        raise UserError("--no-bias-weight-decay: conflicts with --bn-weight-decay, because batch norm has biases too")
    if config.test_only and not (config.resume or config.pretrained):
        raise UserError("--test-only: nothing to evaluate; give a checkpoint with --resume, or use --pretrained")
    if config.start_epoch >= config.epochs:
        raise UserError(f"--start-epoch {config.start_epoch}: must be below --epochs {config.epochs}")
    if config.fix_seed and config.seed not in (None, FIXED_SEED):
        raise UserError(f"--fix-seed: sets --seed {FIXED_SEED}, but another --seed is given; leave out one of them")
    if config.pretrained and config.resume:
        raise UserError("--pretrained: conflicts with --resume, which loads its own weights; leave out one of them")


def settings_warnings(config: Request, optimizers: Mapping[str, Any]) -> list[str]:
    """Warnings about settings that are allowed but probably not intended, one line each.

    Args:
        optimizers: the table ``OPTIMIZERS``, which this module does not import because it needs torch.
    """
    warnings = []
    if config.epochs < config.warmup and not config.test_only:
        warnings.append(
            f"--epochs {config.epochs} ends during the warm-up (--warmup {config.warmup}): "
            f"the learning rate only reaches {config.epochs / config.warmup:.0%} of its base value"
        )
    if (config.workers or 0) > (os.cpu_count() or 1):
        warnings.append(f"--workers {config.workers}: more than the {os.cpu_count()} cores of this machine")
    warnings += _unused_settings(config, "lr_schedule", SCHEDULES)
    if config.cache_dataset:
        warnings.append("--cache-dataset has no effect: image folders are rescanned at every start")
    return warnings + _unused_settings(config, "optimizer", optimizers)


def _unused_settings(config: Request, choice: str, table: Mapping[str, Any]) -> list[str]:
    """Return a one-line warning for each setting that was changed but has no effect with the chosen option.

    Args:
        choice: the name of a setting with choices.
        table: for each choice, an entry whose ``settings`` are the settings that the choice uses.
    """
    chosen = getattr(config, choice)
    unused = {name for entry in table.values() for name in entry.settings} - {*table[chosen].settings}
    changed = [field.name for field in fields(Request) if getattr(config, field.name) != field.default]
    flags = [with_dashes(f"--{name}") for name in changed if name in unused]
    return [f"{flag} has no effect with {with_dashes(f'--{choice}')} {chosen}" for flag in flags]
