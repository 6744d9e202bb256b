"""The lanes: the same tests on the vendors' stacks. ``make lanes``, or ``nox -s t20``.

    t20    Python 3.8, torch 1.10.0           the core, and the lazy generation's contract double
    s60    Python 3.10, torch 2.10.0          training as a whole
           Python 3.12, torch 2.10.0          what is made of the cards' libraries, and the eager generation's double
    today  this checkout's .venv              everything (the same as make test)

A lane whose interpreter is missing is skipped, and says so.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["t20", "s60", "today"]
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "uv|venv"  # uv's lanes are hard links into one cache
nox.options.reuse_existing_virtualenvs = True
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each process would compile what uv has not compiled
os.environ["UV_PYTHON_DOWNLOADS"] = "never"  # a missing interpreter means a skipped lane, not a download

TESTS = ["pytest>=7.3", "pytest-timeout>=2.2", "pytest-xdist>=3"]
TRAIN = "python -m vgglab.train --data-path digits --model vgg11 --epochs 1 --training-step-per-epoch 20".split()
# The tests that need nothing but torch, torchvision and scikit-learn; of these, what torch 1.10 has no kernels or no
# calls for: bfloat16 pooling on the CPU and mixed precision with it, torchvision's list of published weights.
CORE = (
    "config data decode model schedule predictions seed_defects train devices gcu doctor anatomy recipes plan parity "
    "experiments expected_losses spawn schema recording"
).split()
NEWER_TORCH = "not rows_14_and_15 and not row_23 and not readmes_resume and not given_with_resume"
# What the oldest and the newest torch say alike the one between need not say a third time; and no test of these needs
# both of its interpreters.
CARDS = "devices gcu doctor expected_losses".split()
TRAINING = "train resume ranks spawn performance parity model".split()


def put_on_path(version: str) -> None:
    """pyenv keeps interpreters where its shims find them only after they are selected; nox looks on the PATH."""
    if subprocess.run(f"python{version} -c ''", shell=True, capture_output=True).returncode == 0:
        return
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for folder in sorted(versions.glob(f"{version}.*/bin")):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


for _version in ("3.8", "3.10", "3.12"):
    put_on_path(_version)


def install(session: nox.Session, *words: str) -> None:
    """Install as a card owner does, not editable; rebuild each time, because uv would reuse its cached build."""
    session.install(*(["--reinstall-package=vgglab"] if session.venv_backend == "uv" else []), *words)


@nox.session(python="3.8")
def t20(session: nox.Session) -> None:
    """The T20 cards' stack. The kit is installed as a card owner installs it: pip install ."""
    # This torch imports setuptools' pkg_resources, which uv's environments lack, and needs numpy 1.
    session.install("torch==1.10.0", "torchvision==0.11.1", "numpy<2", "setuptools<60")
    install(session, ".[digits]", *TESTS)
    session.run("pytest", "-n2", "-k", NEWER_TORCH, *[f"tests/test_{name}.py" for name in CORE])
    session.run(*TRAIN, f"--run-dir={session.create_tmp()}/run-{os.getpid()}")


@nox.session(python=["3.10", "3.12"])
def s60(session: nox.Session) -> None:
    """The S60 cards' stack, with the simulated card and the eager generation's contract double."""
    session.install("torch==2.10.0", "torchvision==0.25.0")
    install(session, ".[digits,jpeg,tensorboard]", "matplotlib", "ipython", *TESTS)
    chosen = TRAINING if session.python == "3.10" else CARDS
    session.run("pytest", "-n2", *[f"tests/test_{name}.py" for name in chosen])
    session.run(*TRAIN, "--device=gcu-sim", f"--run-dir={session.create_tmp()}/run-{os.getpid()}")


@nox.session(venv_backend="none")
def today(session: nox.Session) -> None:
    """The newest of everything, as make install has it."""
    session.run("make", "test", external=True)
