"""Examine the hardware and libraries of this machine in child processes, and report problems.

Nothing here imports torch in this process: a broken installation may raise, abort or hang on import, so each check runs
in a child process (``probe``). The checks cover the known failures of both generations of torch_gcu.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vgglab.devices import AUTOLOAD
from vgglab.devices.gcu import DOCTOR_HINT, TF32_VARIABLE, VISIBLE_CARDS_VARIABLE
from vgglab.dist.ranks import WITHOUT_CWD, with_package_path

TIMEOUT_SECONDS = 120
RELEVANT_VARIABLES = re.compile(
    r"(TOPS_|ENFLAME_|TORCH_GCU|TORCHGCU|PYTORCH_GCU|PYTORCH_NO_GCU|TORCH_ECCL_|ECCL_|USE_GCU|VGGLAB_|MASTER_)"
    rf"|^({AUTOLOAD}|LD_LIBRARY_PATH|CUDA_VISIBLE_DEVICES|RANK|WORLD_SIZE|LOCAL_RANK)$"
)
BOOLEAN_VARIABLES = ("TORCH_GCU_ENABLE_INT64_AND_UINT64", "USE_GCU_DEFAULT_STREAM", TF32_VARIABLE)
ALLOC_KEYS = {
    "backend", "max_split_size_mb", "garbage_collection_threshold", "roundup_power2_divisions",
    "pinned_use_gcu_host_register", "pinned_num_register_threads", "release_lock_on_topsmalloc",
}  # fmt: skip

TORCH_PROBE = """
import torch
facts = {"cuda cards": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
mps = getattr(torch.backends, "mps", None)
facts["mps"] = mps is not None and mps.is_available()
"""
CARD_PROBE = """
from vgglab.devices import DeviceOptions, gcu
torch_gcu = gcu.load(DeviceOptions())
import torch
api = gcu.card_api(torch_gcu)
is_lazy = api is torch_gcu
count = gcu.count_cards(torch_gcu)
facts = {"generation": "lazy" if is_lazy else "eager", "num_cards": count,
         "is_double": getattr(torch_gcu, "IS_CONTRACT_DOUBLE", False)}
facts["version"] = str(torch_gcu.get_version() if is_lazy else torch_gcu.__version__)
facts["cards"] = [str(api.get_device_name(i)) for i in range(count)]
facts["no_cards_reason"] = None if count else gcu.why_no_cards()
facts["major"] = None if is_lazy or not count else api.get_device_capability(0)[0]
if is_lazy:
    import torch_gcu.distributed as eccl
    facts["eccl"] = hasattr(eccl, "is_available") and bool(eccl.is_available())
    facts["sees_cuda"] = torch.cuda.is_available()
else:
    facts["eccl"] = bool(getattr(torch.distributed, "is_eccl_available", lambda: False)())
"""
AUTO_PROBE = """
from vgglab.devices import DeviceOptions, availability, open_device
reasons = dict(availability(DeviceOptions()))
available = [kind for kind in reasons if reasons[kind] is None]
facts = {"kind": open_device("auto").kind, "available": available, "reasons": [*filter(None, reasons.values())]}
"""


def probe(programs: dict[str, str], **environment: str) -> dict[str, dict[str, Any]]:
    """Run the programs one after another in one new process, because importing torch takes seconds.

    Args:
        programs: the name and the code of each; the code assigns ``facts``.
        environment: variables to set in the new process.

    Returns:
        By name, the program's ``facts``, or ``{"error": one line}`` if it failed. If the process exits abnormally or
        hangs, all of them have this error.
    """
    parts = [WITHOUT_CWD + "import gc, json; gc.disable(); answers = {}\n"]
    for name, program in programs.items():
        parts += ["try:\n", f"    exec({program!r})\n", f"    answers[{name!r}] = facts\n"]
        parts += ["except BaseException as error:\n", "    reason = ' '.join(str(error.__cause__ or error).split())\n"]
        parts += [f"    answers[{name!r}] = {{'error': reason or type(error).__name__}}\n"]
    parts += ["print()\nprint(json.dumps(answers))\ngc.freeze()\n"]  # no garbage collection at exit: a third faster
    # Without a launcher's variables: the child is a single process.
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        child = subprocess.run(
            [sys.executable, "-c", "".join(parts)],
            env=with_package_path({**inherited, **environment}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        return json.loads(child.stdout.decode(errors="replace").strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"timed out after {TIMEOUT_SECONDS} s"
    except (OSError, IndexError, ValueError):
        status = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        error = f"the process exited abnormally ({status})"
    return {name: {"error": error} for name in programs}


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None, from its metadata; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Checkup:
    """Collects ``facts``, ``problems`` (each with a fix) and ``notes``."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.problems: list[dict[str, str]] = []
        self.notes: list[str] = []

    def problem(self, text: str, fix: str) -> None:
        # Messages of gcu.py end with the advice to run this check.
        self.problems.append({"problem": text.replace(f"; {DOCTOR_HINT}", ""), "fix": fix})

    def run(self) -> None:
        self.facts["torch"], self.facts["torchvision"] = installed("torch"), installed("torchvision")
        has_torch = find_spec("torch") is not None
        if not has_torch:
            self.problem("PyTorch is not installed", "run pip install torch torchvision with this interpreter")
        auto = self._check_torch() if has_torch else {"error": "PyTorch is not installed"}
        has_gcu = find_spec("torch_gcu") is not None
        cards = self._check_torch_gcu(has_gcu and has_torch)
        if not self.problems:  # otherwise the cause may have been reported above
            self._check_auto(auto)
        self._check_environment(cards)
        self.facts["devices"] = auto.get("available", [])
        self.facts["--device auto"] = auto.get("kind") or f"error: {auto['error']}"
        if not has_gcu:
            self.notes.append("torch_gcu is not installed; --device gcu-sim uses a simulated card")

    def _check_torch(self) -> dict[str, Any]:
        """Check torch and torchvision; return what ``AUTO_PROBE`` finds."""
        # Whether `import torch` loads a card's library.
        points = [point for package in distributions() for point in package.entry_points]
        has_autoload = any(point.group == "torch.backends" for point in points)
        # AUTO_PROBE loads the card's library if there is one, and must then run in a separate process.
        has_card_library = has_autoload or find_spec("torch_gcu") is not None
        auto_program = {} if has_card_library else {"auto": AUTO_PROBE}
        programs = {"torchvision": "import torchvision; facts = {}", "torch": TORCH_PROBE, **auto_program}
        answers = probe(programs, **{AUTOLOAD: "0"})
        if any("error" in answer for answer in answers.values()):  # one that ends the process fails the others, too
            answers = {name: probe({name: program}, **{AUTOLOAD: "0"})[name] for name, program in programs.items()}
        auto = probe({"auto": AUTO_PROBE})["auto"] if has_card_library else answers["auto"]
        if "error" in answers["torch"]:
            fix = "pip install --force-reinstall torch torchvision"
            self.problem(f"torch cannot be imported: {answers['torch']['error']}", fix)
            return auto
        self.facts.update(answers["torch"])
        self.facts["gcu-sim can run"] = _release(self.facts["torch"]) >= (2, 10)
        if "error" in answers["torchvision"]:
            fix = f"install the torchvision that matches torch {self.facts['torch']}"
            self.problem(f"torchvision cannot be imported: {answers['torchvision']['error']}", fix)
        plain_import = probe({"import": "import torch; facts = {}"})["import"] if has_autoload else {}
        if "error" in plain_import:
            repair = "set LD_LIBRARY_PATH=/opt/tops/lib" if find_spec("torch_gcu") else "repair it"
            fix = f"{repair}, or set {AUTOLOAD}=0 to run without the card"
            self.problem(f"`import torch` fails to load the card's library: {plain_import['error']}", fix)
        return auto

    def _check_auto(self, auto: dict[str, Any]) -> None:
        if "error" in auto:
            self.problem(f"--device auto fails: {auto['error']}", "repair the card's library, or use another --device")
        for reason in auto.get("reasons", []):  # a library is installed, but finds no card
            self.problem(reason, "check the card's driver and the variables that hide cards")

    def _check_torch_gcu(self, is_installed: bool) -> dict[str, Any]:
        cards = probe({"cards": CARD_PROBE}, **{AUTOLOAD: "0"})["cards"] if is_installed else {}
        self.facts["torch_gcu"] = cards.get("version") or (installed("torch_gcu") if is_installed else None)
        self.facts["generation"] = cards.get("generation")
        self.facts["gcu cards"] = cards.get("cards", [])
        self.facts["eccl"] = cards.get("eccl", False)
        driver = "responds" if cards.get("num_cards") else "no response"
        self.facts["driver"] = driver if is_installed else "unknown without torch_gcu"
        self.facts["/opt/tops/lib"] = Path("/opt/tops/lib").is_dir()
        if "error" in cards:
            advice = "if that does not help, install the driver and torch_gcu from the same release"
            self.problem(cards["error"], f"set LD_LIBRARY_PATH=/opt/tops/lib; {advice}")
        elif cards:
            self._check_generation(cards)
        return cards

    def _check_generation(self, cards: dict[str, Any]) -> None:
        if cards["no_cards_reason"]:
            fix = f"check the driver, LD_LIBRARY_PATH=/opt/tops/lib and {VISIBLE_CARDS_VARIABLE}"
            self.problem(cards["no_cards_reason"], fix)
        if cards["num_cards"] > 1 and not cards["eccl"]:
            self.problem("several cards, but eccl is not installed", "install tops-eccl from torch_gcu's release")
        if cards.get("sees_cuda"):
            text = "torch_gcu.distributed is empty because torch sees a CUDA device"
            self.problem(text, "set CUDA_VISIBLE_DEVICES=''")
        required = (1, 10) if cards["generation"] == "lazy" else _release(cards["version"])
        if cards["is_double"]:
            self.notes.append("this torch_gcu is a stand-in for tests: it computes on the CPU")
        elif _release(self.facts["torch"]) != required:
            text = f"torch {self.facts['torch']} does not match torch_gcu (needs torch {required[0]}.{required[1]})"
            self.problem(text, f"pip install torch=={required[0]}.{required[1]}.0 and the matching torchvision")
        if cards["major"] == 3:
            text = "S60 with torch_gcu 2.10: much of the backward pass runs on the host, so training is slow"
            self.notes.append(text)
        if cards["generation"] == "eager":
            self.notes.append("one warning per 64-bit type is expected: the card stores these types in 32 bits")

    def _check_environment(self, cards: dict[str, Any]) -> None:
        variables = dict(sorted(os.environ.items()))
        self.facts["variables"] = {name: variables[name] for name in variables if RELEVANT_VARIABLES.search(name)}
        for name in BOOLEAN_VARIABLES:
            if name in variables and not re.fullmatch(r"true|false|-?\d+", variables[name]):
                self.problem(f"{name}={variables[name]} is read as false", f"{name}: use true or false, in lower case")
        for entry in filter(None, variables.get("PYTORCH_GCU_ALLOC_CONF", "").split(",")):
            if entry.partition(":")[0].strip() not in ALLOC_KEYS:
                self.problem(f"PYTORCH_GCU_ALLOC_CONF: {entry} is not supported", f"remove {entry}")
        if ("RANK" in variables) != ("WORLD_SIZE" in variables):
            self.problem("only one of RANK and WORLD_SIZE is set", "unset both, or start with torchrun")
        if variables.get(AUTOLOAD, "1") != "1":
            text = "`import torch` alone does not load torch_gcu; vgglab imports it explicitly"
            self.notes.append(f"{AUTOLOAD}={variables[AUTOLOAD]}: {text}")
        if TF32_VARIABLE in variables and cards.get("generation") == "eager":
            self.notes.append(f"{TF32_VARIABLE} has no effect with this generation of torch_gcu")
        if "PYTORCH_NO_GCU_MEMORY_CACHING" in variables:
            self.notes.append("PYTORCH_NO_GCU_MEMORY_CACHING turns off the memory cache, whatever its value; unset it")
        for name in ("ENFLAME_LOG_DEBUG_LEVEL", "ENFLAME_PT_OP_DEBUG_CONFIG"):
            if name in variables:
                self.notes.append(f"{name} is set: debug output slows down every step")


def _release(text: str | None) -> tuple[int, ...]:
    """Return the major and minor version: ``(2, 10)`` for ``2.10.0+cpu``, ``()`` if there is no version."""
    return tuple(int(part) for part in re.findall(r"\d+", text or "")[:2])
