"""Devices and the simulated card, used from the command line and from Python code."""

import os
import socket
from importlib.metadata import version
from typing import ClassVar

import pytest
import torch
from conftest import PROJECT, TINY, assert_events_can_be_read, shell
from processes import PYTHONPATH, python, ranks

from vgglab import Run
from vgglab.devices import KINDS, native, open_device
from vgglab.devices.base import MODES, Device
from vgglab.dist import ranks as dist_ranks
from vgglab.errors import UserError
from vgglab.runs.report import _compute_metrics, build_report
from vgglab.storage.schema import DOCUMENTS
from vgglab.train import main

pytestmark = pytest.mark.usefixtures("narrow")
CAN_SIMULATE = tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 10)
needs_sim = pytest.mark.skipif(not CAN_SIMULATE, reason="the simulated card needs torch 2.10")


def run_ranks(tmp_path, images, device, num_ranks, *flags, in_process=True, before="", **environment):
    """Perform a tiny run, assert that it succeeded, and return it.

    Several ranks run in separate processes, and so does a single rank on a card, since the simulated card modifies
    torch; these processes execute the lines ``before`` first. ``in_process=False`` starts a new interpreter instead.
    """
    path = tmp_path / f"{device}-{num_ranks}-{len(list(tmp_path.iterdir()))}"
    job = [*TINY[:-1], "--batch-size=2", f"--data-path={images}", "--seed=1", "--print-freq=1", f"--device={device}"]
    if in_process and num_ranks == 1 and device == "cpu" and not environment and not before:
        assert main([*job, f"--run-dir={path}", *flags]) == 0
        return Run(path)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", **environment}
    start = ["-m", "vgglab.train"]
    if before:
        before += "\nimport sys; from vgglab import train; from vgglab.dist import ranks"
        start = ["-c", f"{before}\nranks.exit_process(train.main(sys.argv[1:]))"]
    args = [*start, *job, f"--run-dir={path}", *flags]
    if not in_process:
        result = shell("python", *args, env=environment, cwd=tmp_path)
    elif num_ranks == 1:
        result = python(*args, env=environment, cwd=tmp_path)
    else:
        result = ranks(num_ranks, *args, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Exception ignored" not in result.stderr  # printed at interpreter shutdown
    assert_events_can_be_read(Run(path))
    return Run(path)


def losses(run):
    return [event["loss"] for event in run.events() if event["event"] in ("train", "eval")]


def run_on_sim(code, **environment):
    """Run code in a separate process with the simulated card; returns its output."""
    prelude = "import torch, warnings\nwarnings.simplefilter('ignore')\nfrom vgglab.devices import sim\nsim.install()\n"
    result = python("-c", prelude + code, env={**os.environ, "PYTHONPATH": str(PROJECT), **environment})
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@needs_sim
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_the_simulated_card_matches_the_cpu_losses_at_every_step(images, tmp_path, num_ranks):
    flags = ["--model=vgg11_bn", "--dropout-rate=0.5", "--epochs=2"]
    sim = run_ranks(tmp_path, images, "gcu-sim", num_ranks, *flags)
    assert losses(sim) == losses(run_ranks(tmp_path, images, "cpu", num_ranks, *flags))
    assert len(losses(sim)) == 2 * (18 // (2 * num_ranks)) + 2


@needs_sim
def test_all_files_of_a_simulated_run_say_so_and_show_no_speed(images, tmp_path):
    run = run_ranks(tmp_path, images, "gcu-sim", 1, "--skip-steps=0", "--tensorboard", in_process=False)
    assert run.config["simulated"] is run.env["simulated"] is run.report()["simulated"] is True
    assert run.env["device"] == "gcu-sim"
    assert all(event["simulated"] is True for event in run.events())
    assert torch.load(run.path / "checkpoints/last.pt")["config"]["simulated"] is True
    assert [run.report()[name] for name in ("train_fps_mean", "images_per_second", "step_seconds_p50")] == [None] * 3
    assert "images/s" not in run.logs()
    assert run.events("end")[0]["host_reads"] > 0


@pytest.mark.parametrize("backend", ["gloo", "nccl", "eccl", "a new one"])
def test_lost_peers_are_recognised_for_each_backend(backend, monkeypatch, tmp_path):
    """With eccl, a rank that had only lost its peers used to be reported as the cause."""
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", dist_ranks.RENDEZVOUS: str(tmp_path / "store")})
    monkeypatch.setattr(dist_ranks, "LOST_PEER_PHRASES", {*dist_ranks.LOST_PEER_PHRASES})
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    device = open_device("cpu", world_size=2)
    device._backend = backend
    device.open()
    assert dist_ranks.has_lost_peers(RuntimeError(f"{backend} error: remote process exited"))


@pytest.mark.parametrize("backend", ["nccl", "eccl", "a_new_one"])
def test_each_backend_uses_the_loopback_interface_if_vgglab_starts_all_ranks_here(backend, monkeypatch):
    """Only gloo and NCCL did. Ranks that torchrun or Slurm starts may be on several machines."""

    def interfaces(**variables):
        monkeypatch.setattr(os, "environ", {"RANK": "0", **variables})
        device = open_device("cpu", world_size=2)
        device._backend, device._join_ranks = backend, lambda: None
        device.open()
        return [os.environ.get(f"{library}_SOCKET_IFNAME") for library in ("GLOO", backend.upper())]

    [loopback] = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}  # Linux, macOS
    started_here = {dist_ranks.RENDEZVOUS: "/a/file"}
    assert interfaces() == [None, None]
    assert interfaces(**started_here) == [loopback, loopback]
    assert interfaces(**started_here, GLOO_SOCKET_IFNAME="eth0") == ["eth0", loopback]
    assert interfaces(**started_here, **{f"{backend.upper()}_SOCKET_IFNAME": "eth0"}) == [loopback, "eth0"]


NO_SPEED = {  # numbers in the report that do not measure speed
    "acc1", "acc1_last", "acc5", "acc5_last", "batch_size", "epochs", "eval_step_per_epoch", "global_batch_size",
    "image_size", "local_rank", "lr", "num_intervals", "num_lines", "num_measured_steps", "num_skipped_images",
    "peak_bytes", "seed", "skip_steps", "training_step_per_epoch", "world_size",
}  # fmt: skip


@needs_sim
def test_report_metrics_are_in_the_schema_and_a_simulated_card_has_no_speed(images, tmp_path):
    """A new metric needs a type in the schema and, if it measures speed, must be null on a simulated card."""
    run = run_ranks(tmp_path, images, "gcu-sim", 1, "--skip-steps=0", "--timers")
    report = build_report(run)
    metrics = _compute_metrics(run, report["global_batch_size"])
    assert {name: valid(metrics[name]) for name, valid in DOCUMENTS["report.json"].items()} == dict.fromkeys(
        metrics, True
    )
    numbers = {name for name, value in report.items() if isinstance(value, (int, float)) and type(value) is not bool}
    assert numbers <= NO_SPEED
    assert [report[name] for name in ("phase_seconds", "host_reads", "first_step_seconds")] == [None] * 3


@needs_sim
def test_a_cpu_run_is_not_marked_as_simulated(train):
    run = train("--skip-steps=0").run
    assert run.env["simulated"] is run.report()["simulated"] is False
    assert "simulated" not in run.config
    assert not any("simulated" in event for event in run.events())
    assert run.report()["train_fps_mean"] > 0


@needs_sim
def test_the_loop_reads_from_the_card_once_per_log_line():
    code = (
        "from vgglab.devices import open_device\n"
        "from vgglab.settings import parser; from vgglab.settings.config import complete\n"
        "from vgglab.trainer import Trainer; from vgglab.pace import Pace\n"
        "from vgglab.data.sets import open_sets\n"
        "class Run:\n"
        "    path = __import__('pathlib').Path('.')\n"
        "    reads = []\n"
        "    def event(self, kind, **v): self.reads.append((kind, sim.num_host_reads()))\n"
        "    def rank_event(self, **v): pass\n"
        "    def skipped(self, *a): pass\n"
        "    def save_checkpoint(self, *a): self.event('checkpoint')\n    schema = process_started = 0\n"
        "    def stop_requested(self): return False\n"
        "s = parser.parse_flags('--data-path digits --model vgg11 --epochs 1 --training-step-per-epoch 6 "
        "--print-freq 3 --batch-size 4 --eval-step-per-epoch 3 --skip-steps 0 --workers 0 --seed 1'.split())\n"
        "d = open_device('gcu-sim'); sets = open_sets(s)\n"
        "s = complete(s, num_classes=10, image_size=32, head='small')\n"
        "d.open(); run = Run(); trainer = Trainer(s, d, sets); before = sim.num_host_reads()\n"
        "trainer.fit(run, Pace(s, d, run))\n"
        "print([(kind, n - before) for kind, n in run.reads])\n"
    )
    assert run_on_sim(code) == str([("train", 1), ("train", 2), ("eval_start", 2), ("eval", 3), ("checkpoint", 3)])


@needs_sim
def test_mixing_tensors_of_different_devices_fails():
    code = (
        "net = torch.nn.Conv2d(3, 4, 3).to('gcu')\n"
        "for images in (torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8, device='gcu:1')):\n"
        "    try: net(images)\n"
        "    except RuntimeError as error: print(error)\n"
        "print((torch.ones(2, device='gcu') * torch.tensor(2.0)).tolist())\n"
    )
    lines = run_on_sim(code).splitlines()
    assert "at least two devices, gcu:0 and cpu" in lines[0]
    assert "at least two devices, gcu:1 and gcu:0" in lines[1]
    assert lines[2] == "[2.0, 2.0]"  # scalars may be on the CPU


@needs_sim
def test_64_bit_types_are_stored_in_32_bits_and_warn_once():
    code = (
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    big = torch.tensor([2**40 + 7, 3]).to('gcu'); more = big + 1\n"
        "    fine = torch.tensor([1 + 1e-12], dtype=torch.float64).to('gcu')\n"
        "    zeros = torch.zeros(1, dtype=torch.int64, device='gcu').fill_(2**40)\n"
        "print(big.dtype, big.tolist(), fine.dtype, fine.tolist(), zeros.tolist())\n"
        "print([str(w.message)[:25] for w in seen])\n"
    )
    values, warned = run_on_sim(code).splitlines()
    assert values == f"torch.int64 [7, 3] torch.float64 [1.0] [{2**31 - 1}]"
    assert warned == "['GCU stores int64 as int32', 'GCU stores float64 as flo']"
    kept = run_on_sim("print(torch.tensor([2**40]).to('gcu').tolist())", TORCH_GCU_ENABLE_INT64_AND_UINT64="true")
    assert kept == f"[{2**40}]"


@needs_sim
def test_torch_gcu_functions_follow_the_contract():
    code = (
        "g = torch.gcu\n"
        "print(g.device_count(), g.is_available(), g.get_device_name(), g.get_device_capability())\n"
        "print(g.memory_allocated()); x = torch.zeros(1000, device='gcu'); print(g.memory_allocated())\n"
        "del x; print(g.memory_allocated(), g.max_memory_allocated()); g.reset_peak_memory_stats()\n"
        "print(g.max_memory_allocated(), g.mem_get_info()[0] <= g.mem_get_info()[1])\n"
        "torch.manual_seed(5); a = torch.rand(3, device='gcu'); g.manual_seed_all(5); b = torch.rand(3, device='gcu')\n"
        "print(a.tolist() == b.tolist(), g.initial_seed())\n"
        "s, e = g.Event(enable_timing=True), g.Event(enable_timing=True); s.record(); e.record(); g.synchronize()\n"
        "print(s.elapsed_time(e) >= 0)\n"
        "g.set_device(1); print(g.current_device(), torch.ones(1, device='gcu').device)\n"
        "bad = lambda: g.get_device_properties(9), lambda: g.set_device('gcu'), lambda: g.memory_allocated('cpu')\n"
        "for call in bad:\n"
        "    try: call()\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    lines = run_on_sim(code, VGGLAB_SIM_CARDS="3").splitlines()
    assert lines[0] == "3 True GCU (3, 0)"
    assert lines[1:4] == ["0", "4000", "0 4000"]
    assert lines[4:8] == ["0 True", "True 5", "True", "1 gcu:1"]
    assert lines[8:] == ["AssertionError", "ValueError", "ValueError"]


@needs_sim
def test_a_forked_child_cannot_use_the_card():
    code = (
        "import os; torch.ones(1, device='gcu'); child = os.fork()\n"
        "if child == 0:\n"
        "    try: torch.ones(1, device='gcu'); os._exit(1)\n"
        "    except RuntimeError as error: os._exit(0 if 'spawn' in str(error) else 2)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert run_on_sim(code) == "0"


@needs_sim
def test_loader_workers_are_spawned_and_do_not_use_the_card(images, tmp_path):
    run = run_ranks(tmp_path, images, "gcu-sim", 1, "--workers=1")
    assert losses(run) == losses(run_ranks(tmp_path, images, "cpu", 1, "--workers=0"))


@needs_sim
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_is_used_and_recorded(images, tmp_path, dtype):
    run = run_ranks(tmp_path, images, "gcu-sim", 1, f"--amp-dtype={dtype}")
    assert run.env["amp_dtype"] == run.report()["amp_dtype"] == dtype
    exact = losses(run_ranks(tmp_path, images, "gcu-sim", 1))
    assert losses(run) != exact
    assert losses(run) == pytest.approx(exact, rel=0.1)


@needs_sim
def test_a_damaged_loss_scale_is_refused_in_one_line(images, tmp_path):
    run = run_ranks(tmp_path, images, "gcu-sim", 1, "--amp-dtype=float16")
    content, files = torch.load(run.checkpoint("last")), []
    for damage in ({"scale": "x"}, {"scale": 0.0}, {"growth_factor": float("nan")}, {"growth_interval": None}):
        files.append(str(tmp_path / f"{len(files)}.pt"))
        torch.save({**content, "scaler": {**content["scaler"], **damage}}, files[-1])
    code = "import sys; from vgglab.train import main\n"
    code += "for file in sys.argv[1:]: print(main(['--device=gcu-sim', '--epochs=2', f'--resume={file}']))"
    result = python("-c", code, *files, env={**os.environ, "PYTHONPATH": str(PROJECT)}, cwd=tmp_path)
    assert result.stdout.split() == ["2"] * len(files)
    lines = [f"vgglab.train: error: --resume {file}: is damaged (loss scale)" for file in files]
    assert result.stderr.splitlines() == lines


@needs_sim
def test_a_rank_without_a_card_is_refused(images, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}
    args = ["-m", "vgglab.train", *TINY[:-1], f"--data-path={images}", "--device=gcu-sim"]
    result = python(*args, env={**environment, "VGGLAB_SIM_CARDS": "2"}, cwd=tmp_path)
    assert result.returncode == 2
    assert "rank 2 needs card 2 (counted from 0); cards on this machine: 2" in result.stderr


@needs_sim
def test_the_simulated_card_refuses_to_load_beside_the_lazy_double(tmp_path):
    code = """
from vgglab.devices.doubles import load_lazy
from vgglab.devices import sim
load_lazy()
try:
    sim.install()
except sim.CannotSimulate as error:
    print(error)
"""
    result = python("-c", code, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    assert result.stdout.startswith("a lazy torch_gcu is loaded"), result.stderr


@needs_sim
@pytest.mark.parametrize("value", ["-1", "abc", "65"])
def test_an_invalid_number_of_cards_is_a_one_line_error(tmp_path, value):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "VGGLAB_SIM_CARDS": value}
    result = python("-m", "vgglab.train", "--device=gcu-sim", env=environment, cwd=tmp_path)
    assert result.returncode == 2
    assert f"VGGLAB_SIM_CARDS={value} is not a whole number" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(CAN_SIMULATE, reason="torch is new enough")
def test_the_simulated_card_requires_torch_2_10(refused):
    assert "--device gcu-sim: needs torch 2.10 or newer" in refused("--device=gcu-sim")


def test_tf32_is_off_by_default_and_refused_on_the_cpu(train, refused):
    assert "--tf32: not supported on cpu" in refused("--tf32")
    run = train("--no-tf32").run
    assert run.config["tf32"] is run.env["tf32"] is run.report()["tf32"] is False


def test_tf32_sets_both_cuda_switches(monkeypatch):
    card = {"is_available": True, "device_count": 1, "get_device_capability": (8, 0)}
    for name, answer in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]  # torch 2.10's switches cannot be patched by monkeypatch
    try:
        for enabled in (True, False):
            open_device("cuda", tf32=enabled)
            assert [switch.allow_tf32 for switch in switches] == [enabled, enabled]
    finally:
        for switch, was_enabled in zip(switches, before):
            switch.allow_tf32 = was_enabled


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_fast_does_not_use_emulated_bfloat16(monkeypatch, capability, dtype):
    """It used to on Turing cards, for which torch answers that it supports bfloat16."""
    card = {"is_available": True, "device_count": 1, "get_device_capability": capability, "is_bf16_supported": True}
    for name, answer in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    assert open_device("cuda", fast=True, fused=False).amp_dtype == dtype


class NewDevice(Device):
    """A device as a contributor would add it: it states which modes it supports, and uses the CPU."""

    kind = "new"
    _card_api = None
    _versions: ClassVar = {}
    _torch_device = torch.device("cpu")
    _backend = "gloo"

    def _hardware(self):
        return "an abacus"


@pytest.fixture
def new_device(monkeypatch):
    """``new_device(modes)``: ``--device=cpu`` is now a new device that supports these modes."""

    def add(*modes):
        monkeypatch.setattr(NewDevice, "supports", frozenset(modes))
        monkeypatch.setattr(native, "open_adapter", lambda kind, options: NewDevice(options))

    return add


@pytest.mark.parametrize("flag", ["--channels-last", "--fused", "--compile", "--tf32"])
def test_a_new_device_refuses_each_mode_that_it_does_not_support(new_device, refused, flag):
    """It used to ignore --tf32."""
    new_device(*(mode for mode in MODES if mode != flag[2:].replace("-", "_")))
    assert refused(flag) == f"{flag}: not supported on new; leave it out"


@pytest.mark.parametrize(
    ("supported", "flag", "advice"),
    [
        ((), "--amp", "--amp: not supported on new; leave it out to train in float32"),
        ((), "--amp-dtype=float16", "--amp: not supported on new; leave it out to train in float32"),
        (("bfloat16",), "--amp-dtype=float16", "--amp-dtype float16: not supported on new; use bfloat16"),
    ],
)
def test_a_new_device_refuses_mixed_precision_that_it_does_not_support(
    new_device, monkeypatch, refused, supported, flag, advice
):
    """It used to ignore --amp."""
    new_device()
    monkeypatch.setattr(NewDevice, "amp_dtypes", supported, raising=False)
    assert refused(flag) == advice


def test_fast_and_amp_choose_the_first_type_that_a_new_device_supports(new_device, monkeypatch):
    new_device()
    assert open_device("cpu", fast=True).amp_dtype is None
    monkeypatch.setattr(NewDevice, "amp_dtypes", ("bfloat16", "float16"), raising=False)
    assert [
        open_device("cpu", **{name: value}).amp_dtype
        for name, value in [("fast", True), ("amp_dtype", "auto"), ("amp_dtype", None), ("amp_dtype", "float16")]
    ] == ["bfloat16", "bfloat16", None, "float16"]


@pytest.mark.parametrize("name", ["_card_api", "_versions"])
def test_a_new_device_must_set_the_attributes_without_a_default(new_device, train, monkeypatch, name):
    """If it did not, its step times might be those of submitting them, or env.json lacked its library's version."""
    new_device()
    monkeypatch.delattr(NewDevice, name)
    with pytest.raises(AttributeError, match=name):
        train()


def test_the_steps_of_an_asynchronous_device_without_events_are_timed_together(new_device, train):
    """On mps, the step times were those of submitting the steps, and images/s was computed from their median."""
    new_device()
    run = train("--skip-steps=0", "--print-freq=100").run
    [interval] = run.events("train")
    assert not interval.keys() & {"step_seconds", "first_step_seconds"}
    mean = interval["interval_seconds"] / interval["interval_steps"]
    times = [run.report()[f"step_seconds_p{percent}"] for percent in (50, 90, 99)]
    assert times == [pytest.approx(mean)] * 3
    assert run.report()["num_measured_steps"] == interval["interval_steps"] > 1


def test_a_new_device_must_say_whether_it_is_available(monkeypatch):
    """Without ``why_unavailable``, auto never chose it and the doctor did not list it."""
    monkeypatch.delattr(native, "why_unavailable")
    with pytest.raises(AttributeError, match="why_unavailable"):
        open_device("auto")


@pytest.mark.parametrize("mode", MODES)
def test_a_new_device_uses_and_records_each_mode_that_it_supports(new_device, mode):
    """Each device used to copy the options itself, and to add them to its description."""
    new_device(mode)
    for is_on in (True, False):
        device = open_device("cpu", **{mode: is_on})
        assert getattr(device, MODES[mode]) is device.describe()[MODES[mode]] is is_on


def test_fast_includes_only_modes_that_are_supported_and_not_turned_off(new_device):
    for supported in MODES:
        new_device(supported)
        device = open_device("cpu", fast=True)
        is_on = {name: getattr(device, name) for name in MODES.values()}
        assert is_on == {**dict.fromkeys(is_on, False), MODES[supported]: supported in ("channels_last", "fused")}
        turned_off = open_device("cpu", fast=True, channels_last=False, fused=False)
        assert (turned_off.channels_last, turned_off.fused) == (False, False)


def test_env_json_and_the_report_record_the_modes_of_a_new_device(new_device, train):
    new_device("channels_last", "tf32")
    run = train("--fast", "--tf32").run
    modes = {"channels_last": True, "tf32": True}
    assert {name: run.env[name] for name in modes} == {name: run.report()[name] for name in modes} == modes
    assert ("fused" in run.env, run.report()["fused"], run.env["hardware"]) == (False, False, "an abacus")


def test_the_cpu_describes_itself_in_a_fixed_order():
    """The fields of env.json are in this order."""
    names = "device hardware num_cpus num_threads amp_dtype tf32 simulated channels_last fused compiled"
    assert [*open_device("cpu").describe()] == names.split()


def test_auto_selects_and_records_the_best_device(train):
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert train("--device=auto").run.config["device"] == best
    assert open_device("auto").kind == best


def test_an_unknown_device_is_refused_with_a_list_of_devices():
    with pytest.raises(UserError, match=f"^device: 'CPU' is not one of auto, {', '.join(KINDS)}"):
        open_device("CPU")


def test_auto_tries_every_kind_of_card():
    """It stops at the CPU, which every machine has, so only simulated devices may be listed after it."""
    assert [*KINDS][[*KINDS].index("cpu") :] == ["cpu", "gcu-sim"]


SLOW_RELEASE = """
import os, threading, time, torch.distributed
held, all_reduce = [], torch.distributed.all_reduce
def release():
    time.sleep(0.05)
    held.pop()
def reduce_slowly(tensor, *arguments, **options):
    all_reduce(tensor, *arguments, **options)
    held.append(tensor)  # as a gloo thread does
    threading.Thread(target=release).start()
torch.distributed.all_reduce = reduce_slowly
os.register_at_fork(before=lambda: held and os._exit(9))
"""


def test_workers_are_forked_after_gloo_has_released_the_last_tensor(tmp_path, images):
    """On Python 3.8 to 3.11, a worker forked earlier may hang, about once in a few hundred runs on a busy machine."""
    run = run_ranks(tmp_path, images, "cpu", 2, "--workers=1", before=SLOW_RELEASE)
    assert run.status == "done"


@needs_sim
@pytest.mark.filterwarnings("ignore:GCU stores")
def test_gradients_divided_by_the_loss_scale_are_the_true_ones(images):
    """In float16 they are multiplied by 128 until the optimizer step."""
    from vgglab.data.sets import open_sets
    from vgglab.settings.config import complete
    from vgglab.settings.parser import parse_flags
    from vgglab.trainer import Trainer

    norms = []
    for options in ({"amp_dtype": None}, {"amp_dtype": "float16"}):
        config = parse_flags([*TINY, f"--data-path={images}", "--seed=1"])
        sets = open_sets(config)
        config = complete(config, workers=0, num_classes=3, image_size=32, head="small", seed=1)
        device = open_device("gcu-sim", **options)
        device.open()
        trainer = Trainer(config, device, sets)
        device.step = lambda *_: None  # which would divide the gradients
        batch = next(iter(trainer.batches.epoch(0)))
        trainer.step(*device.move(batch.images, batch.labels))
        squares = sum(weight.grad.float().square().sum() for weight in trainer.network.parameters())
        norms.append(float(squares.sqrt() / device.loss_scale()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
