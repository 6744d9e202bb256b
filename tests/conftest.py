"""What the tests share: a folder of images in ImageNet's layout, and the shell's door."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from processes import NARROW, NARROW_VGG11, PATIENCE_SECONDS, PROJECT

# Several tests at once on all cores, and their processes: one thread each, or they wait for one another's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a busy machine a run that is asked to leave may take its time to save; none is killed for that.
os.environ.setdefault("VGGLAB_GRACE_SECONDS", str(PATIENCE_SECONDS / 2))

CLASSES = ("n01", "n02", "n03")
NUM_TRAIN, NUM_VAL = 6, 3  # images per class
# Trains in a second: VGG11 on 32x32 pixels, 18 images, 4 at a time: 4 steps an epoch. Xavier is the fastest to draw.
TINY = (
    *("--model=vgg11", "--init=xavier", "--image-size=32", "--batch-size=4", "--workers=0"),
    *("--epochs=1", "--warmup=0", "--device=cpu"),
)


# The files with the longest tests come first, so that at the end no core waits for the other's last one.
LONGEST = ("test_browser.py", "test_notebooks.py", "test_ranks.py", "test_seeds.py", "test_performance.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Within a file the order stays the one that pytest-randomly has drawn."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def _no_trace_outside(tmp_path_factory):
    """Caches of the tests' own, and no variables of a launcher or a notebook around them."""
    os.environ["VGGLAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))
    # A script in the background ignores Ctrl-C and Ctrl-\\, nohup a closed terminal, and our children would inherit it.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "VGGLAB_UI", "JPY_SESSION_NAME"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def _images(tmp_path_factory) -> Path:
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
def images(_images, tmp_path) -> Path:
    """A fresh copy of 18 training and 9 held-out JPEGs of 3 classes."""
    return Path(shutil.copytree(_images, tmp_path / "images"))


def torchrun(num_ranks: int, max_restarts: int = 0) -> list[str]:
    """After ``python``: one machine, and a port that is free (``--standalone`` is one fixed port on torch 1.10)."""
    meeting = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--rdzv_id=test"]
    return ["-m", "torch.distributed.run", *meeting, f"--nproc_per_node={num_ranks}", f"--max_restarts={max_restarts}"]


class Result(NamedTuple):
    """What came out of the shell's door."""

    code: int
    out: str
    err: str
    run: object  # vgglab.Run, or None where none was made


@pytest.fixture
def narrow(request, monkeypatch) -> None:
    """A VGG11 with a tenth of the weights, here and in forked processes: for tests in which any network will do.

    Not where a test has the marker ``paper_widths``, and not in new interpreters.
    """
    from vgglab import model

    if not request.node.get_closest_marker("paper_widths"):
        monkeypatch.setitem(model.CONFIGURATIONS, "vgg11", NARROW_VGG11)
        monkeypatch.setenv(NARROW, "1")


@pytest.fixture
def train(images, tmp_path, capsys, narrow) -> Callable[..., Result]:
    """``train("--epochs=2", ...)``: the tiny job with these flags on top, in this process."""
    from vgglab import Run
    from vgglab.train import main

    def run_training(*flags: str, data: str | Path = images, base: tuple = TINY) -> Result:
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        capsys.readouterr()
        code = main([*base, f"--data-path={data}", f"--output-dir={out}", *flags])
        captured = capsys.readouterr()
        made = sorted(out.glob("runs/*"))
        return Result(code, captured.out, captured.err, Run(made[0]) if made else None)

    return run_training


@pytest.fixture
def refused(train) -> Callable[..., str]:
    """``refused(flags...)``: asserts exit code 2, one line on stderr and no run directory; returns the line."""

    def expect_refusal(*flags: str, in_the_middle: bool = False, **options) -> str:
        result = train(*flags, **options)
        assert in_the_middle or result.run is None
        lines = result.err.strip().splitlines()
        assert (result.code, len(lines)) == (2, 1), result
        assert lines[0].startswith("vgglab.train: error: ")
        return lines[0][len("vgglab.train: error: ") :]

    return expect_refusal


def shell(*words: str | Path, timeout: float = PATIENCE_SECONDS, **options) -> subprocess.CompletedProcess:
    """Run a command as a person would; ``python`` is this interpreter, and ``processes.python`` a cheaper one."""
    command = [sys.executable if word == "python" else str(word) for word in words]
    options.setdefault("cwd", PROJECT)
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def wait_until(condition: Callable[[], object], *, every: float = 0.1) -> None:
    """Returns when ``condition()`` holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)
