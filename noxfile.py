"""The lanes: nox sessions that run tests on the card vendors' stacks. Start with ``make lanes`` or ``nox -s t20``.

    t20    Python 3.8, torch 1.10.0           the core, and the T20's device code with a test double of its torch_gcu
    s60    Python 3.10, torch 2.10.0          complete training runs
           Python 3.12, torch 2.10.0          the S60's device code, with a test double of its torch_gcu
    today  this checkout's .venv              everything (the same as make test)

A lane whose interpreter is missing is skipped with a message.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import nox

nox.options.sessions = ["t20", "s60", "today"]
nox.options.error_on_missing_interpreters = False
nox.options.default_venv_backend = "uv|venv"  # with uv: hard links into one cache
nox.options.reuse_existing_virtualenvs = True
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # uv compiles no modules; if set, each process would compile them again
os.environ["UV_PYTHON_DOWNLOADS"] = "never"  # a missing interpreter means a skipped lane, not a download

TESTS = ["pytest>=7.3", "pytest-timeout>=2.2", "pytest-xdist>=3"]
TRAIN = "python -m vgglab.train --data-path digits --model vgg11 --epochs 1 --training-step-per-epoch 20".split()
# CORE: tests that need only torch, torchvision and scikit-learn. NEWER_TORCH leaves out those of them that torch 1.10
# cannot run: bfloat16 pooling and thus mixed precision on the CPU, and torchvision's list of published weights.
CORE = (
    "config data decode model schedule predictions seed_defects train devices gcu doctor anatomy recipes plan parity "
    "experiments expected_losses spawn schema recording"
).split()
NEWER_TORCH = "not rows_14_and_15 and not row_23 and not readme_resume and not given_with_resume"
# Torch 2.10 is between the oldest and the newest version that are tested, so a selection of tests is enough: CARDS runs
# with one of its interpreters, TRAINING with the other.
CARDS = "devices gcu doctor expected_losses".split()
TRAINING = "train resume ranks spawn performance parity model".split()


def put_on_path(version: str) -> None:
    """Put pyenv's interpreter of this version on the PATH, where nox looks; its shims find only selected versions."""
    if subprocess.run(f"python{version} -c ''", shell=True, capture_output=True).returncode == 0:
        return
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for folder in sorted(versions.glob(f"{version}.*/bin")):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


for _version in ("3.8", "3.10", "3.12"):
    put_on_path(_version)


def install(session: nox.Session, *words: str) -> None:
    """Install these packages; vgglab not editable, as users do, and rebuilt, since uv would reuse its cached build."""
    session.install(*(["--reinstall-package=vgglab"] if session.venv_backend == "uv" else []), *words)


@nox.session(python="3.8")
def t20(session: nox.Session) -> None:
    """Run the core tests and a short training run on the T20's stack, with vgglab installed by ``pip install .``."""
    # This torch imports setuptools' pkg_resources, which uv's environments lack, and needs numpy 1.
    session.install("torch==1.10.0", "torchvision==0.11.1", "numpy<2", "setuptools<60")
    install(session, ".[digits]", *TESTS)
    session.run("pytest", "-n2", "-k", NEWER_TORCH, *[f"tests/test_{name}.py" for name in CORE])
    session.run(*TRAIN, f"--run-dir={session.create_tmp()}/run-{os.getpid()}")


@nox.session(python=["3.10", "3.12"])
def s60(session: nox.Session) -> None:
    """Run a selection of tests on the S60's stack, and a short training run on the simulated card."""
    session.install("torch==2.10.0", "torchvision==0.25.0")
    install(session, ".[digits,jpeg,tensorboard]", "matplotlib", "ipython", *TESTS)
    chosen = TRAINING if session.python == "3.10" else CARDS
    session.run("pytest", "-n2", *[f"tests/test_{name}.py" for name in chosen])
    session.run(*TRAIN, "--device=gcu-sim", f"--run-dir={session.create_tmp()}/run-{os.getpid()}")


@nox.session(venv_backend="none")
def today(session: nox.Session) -> None:
    """Run ``make test``, with the current versions from ``make install``."""
    session.run("make", "test", external=True)
