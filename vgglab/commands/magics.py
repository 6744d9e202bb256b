"""``%load_ext vgglab``: train, list, watch and stop runs from a cell, with TAB. The only module that needs IPython."""

from __future__ import annotations

import argparse
import inspect
import shlex
from pathlib import Path
from typing import Any, Callable, Sequence

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.magic import Magics, line_magic, magics_class

from vgglab.errors import UserError
from vgglab.launch import launch
from vgglab.runs.folder import Runs
from vgglab.runs.run import ACTIVE, Run, is_a_run
from vgglab.runs.seeds import LaunchedSeeds
from vgglab.settings.flags import AT_LEAST_0, AT_LEAST_1, OneLineParser, with_dashes
from vgglab.settings.parser import build_parser

HOME = Path("runs")  # where launch creates them, next to the notebook
MAX_NAMED = 3  # runs in an answer


@magics_class
class VgglabMagics(Magics):
    """The magic ``%vgglab``, and the runs it has started."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        self.shell: Any = shell
        self.launched: list[Run] = []
        self.series: list[LaunchedSeeds] = []

    @line_magic
    def vgglab(self, line: str) -> Any:
        """Train VGG and manage runs.

        %vgglab run [--flag value ...]   train in a separate process; the run is in the variable `run`
        %vgglab runs [folder]            a table of the runs in ./runs, or in another folder; the newest is last
        %vgglab watch [run]              show a run while it is active
        %vgglab stop [run]               ask a run to save and stop

        `run` takes every flag of `python -m vgglab.train` (%vgglab run --help lists them), and of vgglab.launch:
        --nproc, --nnodes, --node-rank, --rendezvous, --max-restarts, --python and --detach. In a live notebook it
        returns at once and leaves a dashboard; elsewhere it returns when the run has ended. IPython puts Python values
        in: --epochs {epochs}.

        `watch` and `stop` take the newest active run, or the one that is named: its folder, its name, or a
        part of the name that no other has. TAB completes subcommands, flags, their choices and the names of runs.

        Example: %vgglab run --data-path digits --model vgg11_bn --epochs 3 --warmup 1 --lr 0.1
        """
        words = _words(line)
        if not words or words[0] in ("help", "--help", "-h"):
            print(inspect.getdoc(VgglabMagics.vgglab))
            return None
        actions: dict[str, Callable[[Sequence[str]], Any]] = {
            "run": self._run,
            "runs": self._runs,
            "watch": self._watch,
            "stop": self._stop,
        }
        if words[0] not in actions:
            raise UserError(f"%vgglab {words[0]}: no such subcommand; choose from {', '.join(actions)}")
        return actions[words[0]](words[1:])

    def _run(self, words: Sequence[str]) -> None:
        if "--help" in words or "-h" in words:
            print(build_parser(shows_all=True).format_help())
            return
        options, flags = launch_parser().parse_known_args([with_dashes(word) for word in words])
        run = launch(flags, watch=False, **vars(options))
        if isinstance(run, LaunchedSeeds):
            self.series.append(run)
        else:
            self.launched.append(run)
        # Before it is watched: it is there also when the run fails or is interrupted.
        self.shell.push({"run": run})
        run.watch()

    def _runs(self, words: Sequence[str]) -> Any:
        folder = Path(_at_most_one("runs", words) or HOME)
        if not folder.is_dir():
            raise UserError(f"%vgglab runs: {folder}: no such folder; %vgglab run makes ./{HOME}")
        return Runs(folder)

    def _watch(self, words: Sequence[str]) -> None:
        self.find("watch", words).watch()

    def _stop(self, words: Sequence[str]) -> None:
        run = self.find("stop", words)
        if run.status not in ACTIVE:
            print(f"{run.name} has already ended: {run.status}")
            return
        if not _can_be_stopped(run):
            raise UserError(f"%vgglab stop {run.name}: it runs on {run.env.get('host')}; stop it there")
        # One of several seeds: the series would continue with the next.
        series = next((s for s in self.series if s.path == run.path.parent), None)
        (series or run).stop()
        print(f"{run.name}: {run.status}")

    def known(self) -> list[Run]:
        """The runs in ./runs and those started from this kernel, newest last."""
        started = [*self.launched, *(run for series in self.series for run in series.runs)]
        there = [run for run in started if is_a_run(run.path)]  # a folder may have been removed
        found = {run.path: run for run in [*(Runs(HOME) if HOME.is_dir() else []), *there]}
        return sorted(found.values(), key=lambda run: run.created)

    def find(self, subcommand: str, words: Sequence[str]) -> Run:
        """The run with this name. Raises UserError if none or several match."""
        name, runs = _at_most_one(subcommand, words), self.known()
        if name is None:
            going_on = [run for run in runs if _can_be_stopped(run) or (subcommand == "watch" and _is_going_on(run))]
            if not going_on:
                raise UserError(f"%vgglab {subcommand}: no run is active; name one (%vgglab runs lists them)")
            return going_on[-1]
        meant = [run for run in runs if name == run.name or Path(name).absolute() == run.path]
        if not meant and is_a_run(Path(name)):
            return Run(name)
        meant = meant or [run for run in runs if name in run.name]
        if not meant:
            raise UserError(f"%vgglab {subcommand} {name}: no such run; %vgglab runs lists them")
        if len(meant) > 1:
            some = ", ".join(run.name for run in meant[-MAX_NAMED:])
            raise UserError(
                f"%vgglab {subcommand} {name}: matches {len(meant)} runs, such as {some}; type more of the name"
            )
        return meant[0]

    def complete(self, token: str, line: str) -> list[str]:
        """Completions of ``token``, the last word of ``line`` so far."""
        words = line[: len(line) - len(token)].split()[1:]
        if not words:
            found = ["run", "runs", "watch", "stop", "help"]
        elif words[0] in ("watch", "stop"):
            found = [run.name for run in self.known() if words[0] == "watch" or _can_be_stopped(run)]
        else:
            found = _after(words[-1].partition("=")[0], token) if words[0] == "run" else []
        return [shlex.quote(word) for word in found if word.startswith(token)]


def load(shell: Any) -> None:
    """Register the magic and its completion in this IPython shell."""
    magics = VgglabMagics(shell)
    shell.register_magics(magics)

    # Not by IPython's older hook: that lets Python's own keywords in among the answers.
    @context_matcher()
    def vgglab_matcher(context: CompletionContext) -> SimpleMatcherResult:
        line = context.text_until_cursor
        words = magics.complete(context.token, line) if line.lstrip().startswith("%vgglab ") else []
        return {"completions": [SimpleCompletion(word) for word in words], "suppress": bool(words)}

    shell.Completer.custom_matchers.append(vgglab_matcher)


def launch_parser() -> argparse.ArgumentParser:
    """The arguments of ``vgglab.launch`` that are not training flags."""
    parser = OneLineParser(prog="%vgglab run", allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("--nproc", "--nnodes"):
        parser.add_argument(name, type=AT_LEAST_1)
    for name in ("--node-rank", "--max-restarts"):
        parser.add_argument(name, type=AT_LEAST_0)
    for name in ("--rendezvous", "--python"):
        parser.add_argument(name)
    parser.add_argument("--detach", action="store_true")
    return parser


def _is_going_on(run: Run) -> bool:
    try:
        return run.status in ACTIVE
    except UserError:  # a file of it is damaged
        return False


def _can_be_stopped(run: Run) -> bool:
    return _is_going_on(run) and run.is_here


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UserError(f"%vgglab: unbalanced quotes ({str(error).lower()})") from None


def _at_most_one(subcommand: str, words: Sequence[str]) -> str | None:
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise UserError(f"%vgglab {subcommand}: takes one name and no flags, not {' '.join(words)!r}")
    if words and not words[0]:
        raise UserError(f"%vgglab {subcommand}: the name is empty")
    return words[0] if words else None


def _after(last: str, token: str) -> list[str]:
    """The choices of the flag before the cursor; otherwise the flags, with dashes or underscores as typed so far."""
    from vgglab.data.named import NAMED_SETS

    actions = {**build_parser()._option_string_actions, **launch_parser()._option_string_actions}
    if not token.startswith("-"):
        action = actions.get(with_dashes(last))
        if action is not None and action.dest == "data_path":
            return list(NAMED_SETS)
        return [str(choice) for choice in action.choices or ()] if action is not None else []
    names = [name for name in actions if name.startswith("--")]
    return ["--" + name[2:].replace("-", "_") for name in names] if "_" in token else names
