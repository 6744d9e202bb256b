"""Shared fixtures and helpers: a folder of images in ImageNet's layout, and calls of the command-line entry points."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import pytest
from forking import FORKED
from processes import MAX_WAIT_SECONDS, NARROW, NARROW_VGG11, PROJECT, PYTHONPATH, fork_children_of_pytest

gc.disable()  # until the first test: the imports leave no garbage, but searching for it takes seconds
# Tests run in parallel on all cores, as do the processes that they start: with one thread each, they do not compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a busy machine, a run that was asked to stop may need long to save a checkpoint; it is not killed meanwhile.
os.environ.setdefault("VGGLAB_GRACE_SECONDS", str(MAX_WAIT_SECONDS / 2))

CLASSES = ("n01", "n02", "n03")
NUM_TRAIN, NUM_VAL = 6, 3  # images per class
# Trains in a second: VGG11, 18 images of 32x32 pixels, batches of 4: 4 steps per epoch. Xavier is the fastest --init.
TINY = (
    *("--model=vgg11", "--init=xavier", "--image-size=32", "--batch-size=4", "--workers=0"),
    *("--epochs=1", "--warmup=0", "--device=cpu"),
)


def pytest_xdist_auto_num_workers(config):
    """Two workers more than cores: tests wait for processes and signals, and a worker that waits would idle a core."""
    return (os.cpu_count() or 1) + 2


# The files with the longest tests come first, so that no core is idle at the end while another runs a long test.
LONGEST = ("test_browser.py", "test_notebooks.py", "test_ranks.py", "test_seeds.py", "test_performance.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put the longest files first; within a file, the order stays that of pytest-randomly."""
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _isolated_environment(tmp_path_factory):
    """Separate caches, default signal handlers, and no variables of a launcher or a notebook."""
    os.environ["VGGLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))
    # Background scripts ignore Ctrl-C and Ctrl-\\, nohup a closed terminal; child processes would inherit that.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VGGLAB_UI", "JPY_SESSION_NAME"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports():
    """Exclude what has been imported so far from garbage collection: each training run collects garbage at its end."""
    gc.freeze()
    gc.enable()
    yield
    gc.unfreeze()  # otherwise triton would report the frozen objects as leaks at the exit


@pytest.fixture(scope="session")
def _image_folder(tmp_path_factory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    draw = random.Random(0)
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image_number in range(count):
                base = [60 * number + draw.randrange(60) for _ in range(3)]
                image = Image.new("RGB", (48, 40), tuple(base))
                image.paste(tuple(255 - value for value in base), (0, 0, draw.randrange(8, 40), draw.randrange(8, 32)))
                image.save(folder / f"{name}_{image_number}.JPEG")
    return root


@pytest.fixture
def images(_image_folder, tmp_path) -> Path:
    """A fresh copy of 18 training and 9 held-out JPEGs of 3 classes."""
    return Path(shutil.copytree(_image_folder, tmp_path / "images"))


def torchrun(num_ranks: int, max_restarts: int = 0) -> list[str]:
    """Arguments for ``python``: torchrun on a free port (``--standalone`` uses a fixed port on torch 1.10)."""
    rdzv = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--rdzv_id=test"]
    return ["-m", "torch.distributed.run", *rdzv, f"--nproc_per_node={num_ranks}", f"--max_restarts={max_restarts}"]


class Result(NamedTuple):
    """Result of a call of the command-line entry point."""

    code: int
    out: str
    err: str
    run: object  # vgglab.Run, or None if there is no run directory


@pytest.fixture
def narrow(request, monkeypatch) -> None:
    """Use a VGG11 with a tenth of the weights, in this and in new processes, for tests that work with any network.

    This has no effect on tests with the marker ``paper_widths``, nor in new interpreters that get another
    ``PYTHONPATH`` from their test.
    """
    from vgglab import model

    if not request.node.get_closest_marker("paper_widths"):
        monkeypatch.setitem(model.CONFIGURATIONS, "vgg11", NARROW_VGG11)
        monkeypatch.setenv(NARROW, json.dumps({"vgg11": NARROW_VGG11}))
        monkeypatch.setenv("PYTHONPATH", PYTHONPATH)


@pytest.fixture
def forked(request, monkeypatch) -> Iterator[None]:
    """Fork new training processes from one that has imported torch, unless the test is marked ``new_interpreters``."""
    if request.node.get_closest_marker("new_interpreters"):
        yield
        return
    monkeypatch.setenv(FORKED, "1")
    end = fork_children_of_pytest()
    yield
    end()


def assert_events_can_be_read(run) -> None:
    """A field that is missing from the schema is not checked; training lines of long files are found by a pattern."""
    from vgglab.storage.events import TRAIN_LINE
    from vgglab.storage.schema import CHECK, EVENTS, OPTIONAL, RANK_FIELDS

    for file in run.path.glob("log/rank*.jsonl"):
        fields = {name for line in file.read_text().splitlines() for name in json.loads(line)}
        assert fields - {CHECK} - RANK_FIELDS.keys() - OPTIONAL.keys() == set()
    lines = (run.path / "events.jsonl").read_bytes().splitlines(keepends=True) if run.events() else []
    assert [line for line in lines if b'"event": "train"' in line and not TRAIN_LINE.match(line)] == []
    for event in run.events():
        unknown = event.keys() - {"event", "seconds"} - EVENTS[event["event"]].keys() - OPTIONAL.keys()
        assert unknown == set(), event


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A folder that every user can write to, like /tmp.

    Not in pytest's own folder: that is private, and becomes so again whenever somebody starts another pytest.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


@pytest.fixture
def train(images, tmp_path, capsys, narrow) -> Callable[..., Result]:
    """``train("--epochs=2", ...)``: runs the tiny job with these additional flags in this process."""
    from vgglab import Run
    from vgglab.train import main

    def run_training(*flags: str, data: str | Path = images, base: tuple = TINY) -> Result:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        capsys.readouterr()
        code = main([*base, f"--data-path={data}", f"--output-dir={out}", *flags])
        captured = capsys.readouterr()
        runs = sorted(out.glob("runs/*"))
        for path in runs:
            assert_events_can_be_read(Run(path))
        return Result(code, captured.out, captured.err, Run(runs[0]) if runs else None)

    return run_training


@pytest.fixture
def refused(train) -> Callable[..., str]:
    """``refused(flags...)``: asserts exit code 2, one line on stderr and no run directory; returns that line.

    With ``after_start=True``, a run directory is allowed.
    """

    def expect_refusal(*flags: str, after_start: bool = False, **options) -> str:
        result = train(*flags, **options)
        assert after_start or result.run is None
        lines = result.err.strip().splitlines()
        assert (result.code, len(lines)) == (2, 1), result
        assert lines[0].startswith("vgglab.train: error: ")
        return lines[0][len("vgglab.train: error: ") :]

    return expect_refusal


def shell(*args: str | Path, timeout: float = MAX_WAIT_SECONDS, **options) -> subprocess.CompletedProcess:
    """Run a command as in a shell; ``python`` is this interpreter. ``processes.python`` is cheaper."""
    command = [sys.executable if arg == "python" else str(arg) for arg in args]
    options.setdefault("cwd", PROJECT)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def wait_until(condition: Callable[[], object], *, every: float = 0.1) -> None:
    """Return when ``condition()`` is true."""
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(every)
