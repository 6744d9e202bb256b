"""``--device gcu`` from the command line, with the contract doubles of both generations of torch_gcu."""

import json
import os
import shutil
from dataclasses import fields
from typing import NamedTuple

import pytest
from conftest import PROJECT, TINY, assert_events_can_be_read, shell, torchrun
from processes import NARROW_CODE, NARROW_PATH, python, ranks
from test_devices import CAN_SIMULATE, losses

from vgglab import Run
from vgglab.devices.doubles import EAGER, LAZY
from vgglab.settings.choices import OPTIMIZERS
from vgglab.settings.config import Request

pytestmark = pytest.mark.usefixtures("narrow")
needs_sim = pytest.mark.skipif(not CAN_SIMULATE, reason="the eager double computes on the simulated card")
GENERATIONS = [pytest.param(LAZY, id="lazy"), pytest.param(EAGER, id="eager", marks=needs_sim)]
STEPS = 4  # of TINY: 18 images, 4 at a time


class Outcome(NamedTuple):
    code: int
    err: str
    run: object
    calls: list  # of rank 0, in order
    details: list


@pytest.fixture
def on_gcu(images, tmp_path):
    """``on_gcu(LAZY, "--flag", num_ranks=2, package=folder, VARIABLE="x")``: a tiny run on the double.

    With ``forks=False``, a new interpreter imports torch, which loads the double if it supports autoload.
    """

    def run_on_double(double, *flags, num_ranks=1, package=PROJECT, device="gcu", forks=True, **variables):
        number = len(list(tmp_path.glob("log*")))
        path, log = tmp_path / f"run{number}", tmp_path / f"log{number}"
        log.touch()
        job = [*TINY[:-1], f"--data-path={images}", "--seed=1", "--print-freq=1", f"--run-dir={path}"]
        folders = os.pathsep.join(map(str, (NARROW_PATH, package, double)))
        environment = {**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
        environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
        environment.update(VGGLAB_DOUBLE_LOG=str(log), **variables)
        args = ["-m", "vgglab.train", *job, f"--device={device}", *flags]
        options = {"env": environment, "cwd": tmp_path, "autoload": double is EAGER and device in ("gcu", "auto")}
        if forks:
            result = python(*args, **options) if num_ranks == 1 else ranks(num_ranks, *args, **options)
        else:
            launcher = torchrun(num_ranks) if num_ranks > 1 else []
            result = shell("python", *launcher, *args, env=environment, cwd=tmp_path)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        of_rank_0 = [line for line in lines if line["rank"] == 0]
        run = Run(path) if path.exists() else None
        if run is not None:
            assert_events_can_be_read(run)
        return Outcome(result.returncode, result.stderr, run, [line["call"] for line in of_rank_0], of_rank_0)

    return run_on_double


@pytest.mark.parametrize("double", GENERATIONS)
def test_a_run_follows_the_contract_and_matches_the_cpu_losses(on_gcu, double):
    flags = ["--model=vgg11_bn", "--dropout-rate=0.5"]
    outcome = on_gcu(double, *flags)
    assert outcome.code == 0, outcome.err
    assert "violation" not in outcome.calls
    assert "graph_break" not in outcome.calls
    assert losses(outcome.run) == losses(on_gcu(double, *flags, device="cpu").run)
    assert outcome.run.env["simulated"] is outcome.run.report()["simulated"] is True
    assert outcome.run.env["device"] == outcome.run.config["device"] == "gcu"
    assert "torch_gcu" in outcome.run.env["versions"]


@pytest.mark.parametrize("double", GENERATIONS)
def test_auto_selects_the_card(on_gcu, double):
    assert on_gcu(double, device="auto", forks=False).run.config["device"] == "gcu"


REPORT_SHUTDOWN = """
import atexit, os, sys
if "RANK" in os.environ:
    atexit.register(print, "interpreter shutdown", file=sys.stderr)
"""


@pytest.mark.parametrize("double", GENERATIONS)
def test_two_ranks_use_eccl_and_lazy_ranks_skip_interpreter_shutdown(on_gcu, tmp_path, double):
    """A leftover gloo thread of the lazy double occasionally aborted a rank at exit."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NARROW_CODE + REPORT_SHUTDOWN)
    path = os.pathsep.join(map(str, (tmp_path / "site", PROJECT, double)))
    # torchrun loads the card's library, too.
    outcome = on_gcu(double, "--batch-size=2", num_ranks=2, forks=False, PYTHONPATH=path)
    assert outcome.code == 0, outcome.err
    assert double is EAGER or "interpreter shutdown" not in outcome.err
    assert outcome.calls.count("init_process_group") == 1
    assert [d["device_ids"] for d in outcome.details if d["call"] == "DistributedDataParallel"] == [[0]]
    assert len(losses(outcome.run)) == STEPS + 1
    assert not [event for event in outcome.run.events("warning") if "weights of the ranks" in event["text"]]


def test_lazy_steps_follow_the_vendors_sequence(on_gcu):
    calls = on_gcu(LAZY, "--print-freq=100", "--epochs=2").calls
    steps = [call for call in calls if call in ("zero_grad", "backward", "optimizer_step")]
    assert steps == ["zero_grad", "backward", "optimizer_step"] * STEPS * 2
    assert calls.count("set_epoch") == 2
    between = calls[calls.index("zero_grad") : calls.index("optimizer_step", calls.index("optimizer_step") + 1)]
    assert "read" not in between
    assert calls.count("manual_seed_all") == 1 + 2 * STEPS  # before the initial weights, then once per step


def test_lazy_refuses_averaged_weights_and_supports_mixup_and_cutmix(on_gcu):
    """The advice was to leave out the flag, which does not help if it comes from the checkpoint of a resumed run."""
    resume = f"--resume={on_gcu(LAZY, '--ema=0.9', device='cpu').run.path}"
    refused = on_gcu(LAZY, resume, "--epochs=2")
    assert (refused.code, "--ema: not supported on gcu; use --ema 0" in refused.err) == (2, True)
    flags = ("--epochs=2", "--ema=0", "--mixup=0.2", "--cutmix=1", "--label-smoothing=0.1")
    assert on_gcu(LAZY, resume, *flags).code == 0


# The factors that are 0 by default and thus not used; each of them might change at every step.
FACTORS = [f"--{f.name.replace('_', '-')}=0.5" for f in fields(Request) if "float" in f.type and not f.default]


def graphs_of_steps(outcome):
    """The different graphs of all steps but the first, which creates the optimizer's state."""
    steps = [details["graph"] for details in outcome.details if details["call"] == "optimizer_step"]
    assert len(steps) == STEPS, outcome.err
    return {*steps[1:]}


@pytest.mark.parametrize("flag", [*FACTORS, *(f"--optimizer={name}" for name in OPTIMIZERS)])
def test_lazy_steps_share_one_graph_or_the_flag_is_refused(on_gcu, flag):
    """A setting that gives each step its own graph, which the card must compile, used to be accepted without a sign."""
    outcome = on_gcu(LAZY, flag)
    if outcome.code == 0:
        assert len(graphs_of_steps(outcome)) == 1
    else:
        assert (outcome.code, "not supported on gcu" in outcome.err) == (2, True)


def test_a_factor_that_changes_at_every_step_gives_each_step_its_own_graph(on_gcu, tmp_path):
    shutil.copytree(PROJECT / "vgglab", tmp_path / "changed/vgglab")
    source = tmp_path / "changed/vgglab/devices/gcu_lazy.py"
    source.write_text(source.read_text().replace("allows_changing_factors = False", "allows_changing_factors = True"))
    outcome = on_gcu(LAZY, "--ema=0.5", package=tmp_path / "changed")
    assert len(graphs_of_steps(outcome)) == STEPS - 1


STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")
ADAMW = f'"adamw": OptimizerSpec(torch.optim.AdamW, (), changes_every_step=True, state_keys={STATE_KEYS}),'


def test_lazy_refuses_an_optimizer_whose_factors_change_at_every_step(on_gcu, tmp_path):
    """It compiled a new graph for each step, without a warning. Evaluating what it has trained is possible."""
    shutil.copytree(PROJECT / "vgglab", tmp_path / "changed/vgglab")
    for file, old, new in [
        ("optim.py", "OPTIMIZERS = {", f"OPTIMIZERS = {{{ADAMW}"),
        ("settings/choices.py", "OPTIMIZERS = (", 'OPTIMIZERS = ("adamw", '),
    ]:
        source = tmp_path / "changed/vgglab" / file
        assert source.read_text().count(old) == 1
        source.write_text(source.read_text().replace(old, new))
    refused = on_gcu(LAZY, "--optimizer=adamw", package=tmp_path / "changed")
    assert (refused.code, "--optimizer adamw: not supported on gcu" in refused.err) == (2, True)
    trained = on_gcu(LAZY, "--optimizer=adamw", "--ema=0.9", device="cpu", package=tmp_path / "changed")
    assert trained.code == 0, trained.err
    flags = (f"--resume={trained.run.path}", "--test-only")
    evaluated = on_gcu(LAZY, *flags, package=tmp_path / "changed")
    assert evaluated.code == 0, evaluated.err


def test_lazy_mixed_precision_steps_end_with_a_single_unlazy(on_gcu):
    outcome = on_gcu(LAZY, "--amp", "--eval-step-per-epoch=1", "--print-freq=100", num_ranks=2)
    assert outcome.code == 0, outcome.err
    parts = ("zero_grad", "scale", "backward", "scaler.step", "scaler.update", "unlazy")
    steps = [call for call in outcome.calls if call in (*parts, "optimizer_step")]
    assert steps[: 6 * 2] == [*parts] * 2
    assert outcome.run.env["amp_dtype"] == "float16"


@pytest.mark.parametrize(
    ("flags", "variable", "expected"),
    [
        ((), None, "false"),
        (("--tf32",), None, "true"),
        (("--no-tf32",), "true", "false"),
        ((), "true", "true"),
    ],
)
def test_lazy_tf32_is_set_before_the_library_is_imported(on_gcu, flags, variable, expected):
    outcome = on_gcu(LAZY, *flags, **({"ENFLAME_ENABLE_TF32": variable} if variable else {}))
    assert outcome.details[0] == {"rank": 0, "call": "import", "tf32": expected}
    assert outcome.run.env["tf32"] is outcome.run.report()["tf32"] is (expected == "true")


@needs_sim
def test_eager_refuses_tf32_and_sets_no_variable(on_gcu):
    outcome = on_gcu(EAGER, "--tf32")
    assert outcome.code == 2
    assert "--tf32: not supported on gcu; leave it out" in outcome.err
    assert "ENFLAME" not in (PROJECT / "vgglab/devices/gcu_eager.py").read_text()


@needs_sim
def test_eager_steps_once_per_backward_and_sets_the_device_before_init(on_gcu):
    outcome = on_gcu(EAGER, "--amp", "--batch-size=2", num_ranks=2)
    assert outcome.code == 0, outcome.err
    assert [c for c in outcome.calls if c in ("backward", "optimizer.step")] == ["backward", "optimizer.step"] * STEPS
    assert outcome.calls.index("set_device") < outcome.calls.index("init_process_group")


@needs_sim
@pytest.mark.parametrize("is_imported_first", [True, False])
def test_eager_autoload_follows_the_contract(is_imported_first):
    first = "import torch_gcu" if is_imported_first else "import torch"
    code = f"{first}; import os, torch; print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'], torch.ones(1).gcu().device)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (PROJECT, EAGER)))}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    assert shell("python", "-c", code, env=environment).stdout.split() == ["0" if is_imported_first else "1", "gcu:0"]


def test_checkpoints_resume_on_the_card_and_on_the_cpu(on_gcu):
    first = on_gcu(LAZY).run
    resumed = on_gcu(LAZY, f"--resume={first.path}", "--epochs=3")
    assert resumed.code == 0, resumed.err
    assert len(losses(resumed.run)) == 2 * (STEPS + 1)
    assert losses(on_gcu(LAZY, f"--resume={first.path}", "--epochs=3", device="cpu").run) == losses(resumed.run)


@pytest.mark.parametrize(
    ("double", "variables", "phrases"),
    [
        pytest.param(LAZY, {"VGGLAB_DOUBLE_CARDS": "0"}, ["finds no card", "driver"], id="lazy-no-cards"),
        pytest.param(EAGER, {"VGGLAB_SIM_CARDS": "0"}, ["finds no card", "driver"], id="no-driver", marks=needs_sim),
        pytest.param(EAGER, {"TOPS_VISIBLE_DEVICES": "0,0"}, ["a card twice"], id="duplicates", marks=needs_sim),
        pytest.param(EAGER, {"TOPS_VISIBLE_DEVICES": "-1"}, ["hides every card"], id="hidden", marks=needs_sim),
    ],
)
def test_no_cards_is_a_one_line_error_and_a_warning_with_auto(on_gcu, double, variables, phrases):
    outcome = on_gcu(double, **variables)
    assert (outcome.code, outcome.run, len(outcome.err.strip().splitlines())) == (2, None, 1)
    assert all(phrase in outcome.err for phrase in ["--device gcu: ", *phrases])
    fallback = on_gcu(double, device="auto", **variables)
    assert fallback.run.config["device"] != "gcu"
    assert any("--device auto selected" in event["text"] for event in fallback.run.events("warning"))


# Careless changes, each with the double that must detect it and its message. They are made in a copy of the package.
MUTATIONS = {
    "bare optimizer.step() on lazy": (
        LAZY,
        "devices/gcu_lazy.py",
        "self._gcu.optimizer_step(optimizer, list(outputs), model=model, mode=self._mode)",
        "optimizer.step()",
        "bare optimizer.step()",
    ),
    "loss.item() before the flush": (
        LAZY,
        "trainer.py",
        "        device.step(self.optimizer, self.model, [*result",
        "        loss.item()\n        device.step(self.optimizer, self.model, [*result",
        "between the forward pass and the flush",
    ),
    "loss missing from the outputs": (
        LAZY,
        "trainer.py",
        "device.step(self.optimizer, self.model, [*result.scalars.values(), logits])",
        "device.step(self.optimizer, self.model, [logits])",
        "not among the outputs",
    ),
    "model not passed": (LAZY, "devices/gcu_lazy.py", "list(outputs), model=model,", "list(outputs),", "without model"),
    "torch's DDP on lazy": (
        LAZY,
        "devices/gcu_lazy.py",
        "self._gcu.nn.parallel.DistributedDataParallel(\n            network, device_ids=[",
        "nn.parallel.DistributedDataParallel(\n            network, device_ids=[",
        "torch's own DistributedDataParallel",
    ),
    "torch's sampler on lazy": (
        LAZY,
        "devices/gcu_lazy.py",
        "self.sampler = torch_gcu.utils",
        "import torch; self.sampler = torch.utils",
        "torch's own DistributedSampler",
    ),
    "SAFEASYNC with DDP": (
        LAZY,
        "devices/gcu_lazy.py",
        "JitRunMode.ASYNC if",
        "JitRunMode.SAFEASYNC if",
        "Enflame's scripts use",
    ),
    "weights missing from unlazy": (LAZY, "devices/gcu_lazy.py", "[*kept, *outputs]", "[*outputs]", "leaves out"),
    "gradients kept in the graph": (
        LAZY,
        "trainer.py",
        "zero_grad(set_to_none=True)",
        "zero_grad(set_to_none=False)",
        "zero_grad(True)",
    ),
    "card tensors in a checkpoint": (
        LAZY,
        "runs/checkpoint.py",
        "    content = _to_cpu(content)\n",
        "",
        "torch.save of a tensor",
    ),
    "TF32 changed after the import": (
        LAZY,
        "devices/gcu_lazy.py",
        "self.tf32 = tf32 ",
        "import os; os.environ['ENFLAME_ENABLE_TF32'] = 'x'  ",
        "ENFLAME_ENABLE_TF32 was changed",
    ),
    "transfer_to_gcu imported": (
        EAGER,
        "devices/gcu_eager.py",
        "        super().__init__(options)\n",
        "        super().__init__(options)\n        from torch_gcu import transfer_to_gcu\n",
        "transfer_to_gcu was imported",
    ),
    "int32 labels on eager": (
        EAGER,
        "devices/base.py",
        "labels.to(device",
        "labels.int().to(device",
        "Int",
    ),
    "batch not moved to the card": (
        EAGER,
        "devices/base.py",
        "yield self.move(batch.images, batch.labels)",
        "yield batch.images, batch.labels",
        "all tensors to be on the same device",
    ),
    "device not set before init": (
        EAGER,
        "devices/base.py",
        "self._card_api.set_device(self.local_rank)",
        "self",
        "must come before init_process_group",
    ),
}
NEEDS_RANKS = ("DDP", "init")  # parts of the names of the changes
NEEDS_AMP = ("unlazy",)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_careless_change_is_detected(on_gcu, tmp_path, name):
    double, file, old, new, message = MUTATIONS[name]
    if double is EAGER and not CAN_SIMULATE:
        pytest.skip("the eager double computes on the simulated card")
    shutil.copytree(PROJECT / "vgglab", tmp_path / "changed/vgglab")
    source = tmp_path / "changed/vgglab" / file
    assert source.read_text().count(old) >= 1, "the source has changed: update this mutation"
    source.write_text(source.read_text().replace(old, new))
    flags = ["--amp"] if any(word in name for word in NEEDS_AMP) else []
    num_ranks = 2 if any(word in name for word in NEEDS_RANKS) else 1
    outcome = on_gcu(double, *flags, num_ranks=num_ranks, package=tmp_path / "changed")
    assert outcome.code == 1
    assert message in outcome.err
