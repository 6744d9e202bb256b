"""``--fast`` and its parts, step timing, host reads and traces, and the step benchmark."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import MAX_WAIT_SECONDS, PROJECT, TINY, shell, wait_until
from processes import python
from test_devices import needs_sim, run_ranks

from vgglab import Run
from vgglab.commands import call
from vgglab.commands.bench import parser as bench_parser
from vgglab.devices.compat import load_tensors
from vgglab.devices.memory import keep_freed_memory
from vgglab.errors import UserError
from vgglab.lab.bench import child, step
from vgglab.pace import PHASES
from vgglab.runs.report import SpeedStatistics, steadiness_warning
from vgglab.runs.run import has_run_files
from vgglab.storage.cache import use_private_temporary_folder
from vgglab.view import results

needs_fused = pytest.mark.skipif("fused" not in torch.optim.SGD.__init__.__code__.co_varnames, reason="needs torch 2.3")


def losses(run):
    return [event["loss"] for event in run.events("train")]


@needs_fused
def test_fast_records_each_part_and_gives_similar_losses(train):
    plain, fast = (train("--seed=1", "--print-freq=1", *flags).run for flags in ((), ("--fast",)))
    report = fast.report()
    assert (report["channels_last"], report["fused"]) == (True, True)
    assert (fast.config["channels_last"], fast.config["fused"]) == (True, True)
    assert report["amp_dtype"] in ("bfloat16", None)  # None: a CPU that could only emulate it
    assert [plain.report()[name] for name in ("channels_last", "fused", "compiled", "amp_dtype")] == [False] * 3 + [
        None
    ]
    assert losses(fast) == pytest.approx(losses(plain), rel=0.05)


@needs_fused
@pytest.mark.parametrize("flag", ["--channels-last", "--fused"])
def test_each_part_of_fast_has_a_flag_and_differs_only_by_rounding(train, flag):
    flags = ("--seed=1", "--print-freq=1", "--dropout-rate=0")
    plain, changed = (train(*flags, *more).run for more in ((), (flag,)))
    assert losses(changed) == pytest.approx(losses(plain), rel=1e-4)
    assert changed.report()[flag[2:].replace("-", "_")] is True
    assert changed.report()["amp_dtype"] is None


def test_a_part_of_fast_can_be_turned_off(train):
    run = train("--fast", "--no-channels-last", "--no-fused").run
    assert (run.report()["channels_last"], run.report()["fused"]) == (False, False)


@pytest.mark.paper_widths
def test_channels_last_checkpoints_load_without_channels_last(train):
    run = train("--channels-last").run
    weights = load_tensors(run.checkpoint("last"))["model"]
    assert weights["features.3.weight"].shape == (128, 64, 3, 3)
    evaluated = train("--test-only", f"--resume={run.path}", "--no-channels-last").run
    assert evaluated.events("eval")[0]["acc1"] == run.events("eval")[-1]["acc1"]


@needs_sim
@pytest.mark.parametrize("flag", ["--channels-last", "--fused", "--compile"])
def test_unsupported_speed_flags_are_refused(refused, flag):
    assert f"{flag}: not supported on gcu-sim" in refused("--device=gcu-sim", flag)


@pytest.mark.long  # the compiler takes half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled_code_is_cached_in_a_private_folder(images, tmp_path):
    """By default, PyTorch caches compiled code in the shared temporary folder, and loads what it finds there."""
    shared, cache = tmp_path / "shared", tmp_path / "cache"
    shared.mkdir()
    args = ["--compile", "--training-step-per-epoch=1", "--eval-step-per-epoch=1", f"--data-path={images}"]
    environment = {**os.environ, "TMPDIR": str(shared), "VGGLAB_CACHE": str(cache)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # does not apply to everything that PyTorch caches
    result = shell("python", "-m", "vgglab.train", *TINY, *args, f"--run-dir={tmp_path / 'run'}", env=environment)
    assert result.returncode == 0, result.stderr
    assert Run(tmp_path / "run").report()["compiled"] is True
    assert list((cache / "temporary").glob("torchinductor*/**/*.so"))
    assert (cache / "temporary").stat().st_mode & 0o777 == 0o700
    assert list(shared.glob("torchinductor*")) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, for chown")
def test_a_compiler_cache_owned_by_another_user_is_refused(tmp_path, monkeypatch):
    """For root, chmod succeeds, but does not change the owner."""
    monkeypatch.setenv("VGGLAB_CACHE", str(tmp_path))
    (tmp_path / "temporary").mkdir()
    os.chown(tmp_path / "temporary", 65534, 65534)
    with pytest.raises(UserError, match="belongs to another user"):
        use_private_temporary_folder()


@needs_sim
@pytest.mark.usefixtures("narrow")
def test_fast_on_a_gcu_enables_mixed_precision(images, tmp_path):
    run = run_ranks(tmp_path, images, "gcu-sim", 1, "--fast")
    assert run.report()["amp_dtype"] == "float16"
    assert run.report()["step_seconds_p50"] is None  # a simulated card has no speed


@pytest.mark.usefixtures("narrow")
def test_steps_are_timed_and_the_first_includes_process_startup(images, tmp_path):
    # As if importing torch took 1000 s.
    code = "import sys; from vgglab.dist import ranks; ranks.PROCESS_STARTED -= 1000\n"
    code += "from vgglab.train import main; main(sys.argv[1:])"
    flags = ["--print-freq=2", "--epochs=3", "--skip-steps=3", f"--run-dir={tmp_path / 'run'}"]
    result = python("-c", code, *TINY, f"--data-path={images}", *flags)
    assert result.returncode == 0, result.stderr
    run = Run(tmp_path / "run")
    events = run.events("train")
    for event in events:
        assert len(event["step_seconds"]) == event["interval_steps"]
        assert all(seconds > 0 for seconds in event["step_seconds"])
        assert sum(event["step_seconds"]) <= event["interval_seconds"] * 1.001
    assert [("first_step_seconds" in event) for event in events] == [True] + [False] * (len(events) - 1)
    report = run.report()
    assert report["num_measured_steps"] == events[-1]["step"] - 3
    assert report["first_step_seconds"] > 1000 + events[0]["step_seconds"][0]
    assert report["step_seconds_p50"] <= report["step_seconds_p90"] <= report["step_seconds_p99"]


def test_unsteady_step_times_are_reported():
    def remark(*intervals):
        speed = SpeedStatistics()
        for step_seconds in intervals:
            counts = {"interval_steps": len(step_seconds), "interval_images": 1, "interval_seconds": sum(step_seconds)}
            timing = {"is_measured": True, "images_per_second": 1.0, "data_seconds": 0.0, "step_seconds": step_seconds}
            speed.add({**counts, **timing})
        return steadiness_warning(speed.statistics())

    assert remark([0.1] * 10, [0.11] * 10) == ""
    assert remark([0.1] * 17, [0.3] * 3).startswith(
        "step times are not steady: 10 % of the 20 measured steps took 3.00 x the median"
    )
    assert remark([0.1] * 5 + [9.0]) == ""  # too few steps to judge


def test_timers_reveal_a_slow_loader(train, monkeypatch):
    from vgglab.data import loader

    flags = ("--timers", "--print-freq=1", "--skip-steps=0", "--epochs=2")
    run = train(*flags).run
    original, clock, slept = loader.BatchReader.__getitem__, time.perf_counter, []

    def read_for_1000_seconds(*args):  # by the clock that the loop reads
        slept.append(1000)
        return original(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(slept))
    monkeypatch.setattr(loader.BatchReader, "__getitem__", read_for_1000_seconds)
    slow = train(*flags).run
    normal_seconds, slow_seconds = (one.report()["phase_seconds"] for one in (run, slow))
    assert list(normal_seconds) == list(PHASES)
    assert slow_seconds["data"] > 1000 > normal_seconds["data"]
    for event in run.events("train"):
        assert sum(event["phase_seconds"].values()) == pytest.approx(event["interval_seconds"], rel=0.2)
    assert train().run.report()["phase_seconds"] is None


@pytest.mark.usefixtures("narrow")
def test_timers_do_not_change_the_losses_of_two_ranks(images, tmp_path):
    flags = ["--dropout-rate=0", "--lr=0.05", "--skip-steps=0"]
    plain, timed = (run_ranks(tmp_path, images, "cpu", 2, *flags, *more) for more in ([], ["--timers"]))
    assert losses(timed) == pytest.approx(losses(plain), rel=1e-6)
    assert timed.report()["phase_seconds"]["all_reduce"] > 0


def texts_in(figure):
    return [text.get_text() for panel in figure.axes for text in [*panel.texts, *panel.get_yticklabels()]]


def test_the_figure_names_the_line_of_an_extra_host_read(train, monkeypatch):
    from vgglab import trainer
    from vgglab.view.figures import where_time_goes

    flags = ("--timers", "--print-freq=2", "--skip-steps=0", "--epochs=2")
    plain = train(*flags).run
    original = trainer.normalised

    def normalised(*args):
        images = original(*args)
        images.sum().item()  # a hidden host read
        return images

    monkeypatch.setattr(trainer, "normalised", normalised)
    hidden = train(*flags).run
    line = normalised.__code__.co_firstlineno + 2
    # Each log line reads from the device once, for all its metrics.
    [(location, reads_per_step)] = plain.report()["host_reads"].items()
    assert (location.split(":")[0], reads_per_step) == ("pace.py", 0.5)
    assert hidden.report()["host_reads"] == {location: 0.5, f"test_performance.py:{line}": 1.0}
    figure = where_time_goes([plain, hidden], ["plain", "hidden"])
    assert len(figure.png()) > 5000
    [remark] = [text for text in texts_in(figure) if "host waits" in text]
    assert f"1x per step at test_performance.py:{line}" in remark
    assert {"plain", "hidden"} <= set(texts_in(figure))


def test_counting_host_reads_restores_the_tensor_methods(train):
    before = {name: getattr(torch.Tensor, name) for name in ("item", "cpu", "__bool__")}
    train("--timers")
    assert before == {name: getattr(torch.Tensor, name) for name in before}


@pytest.mark.parametrize("skipped", [0, 1])
def test_a_trace_is_written_on_request(train, skipped):
    run = train("--trace=1", f"--skip-steps={skipped}").run
    trace = json.loads((run.path / "trace.json").read_text())
    assert any("conv" in str(event.get("name", "")) for event in trace["traceEvents"])
    assert not (train().run.path / "trace.json").exists()


def test_a_run_terminated_while_tracing_writes_its_trace(images, tmp_path):
    """It used to crash with a segmentation fault."""
    args = [sys.executable, "-m", "vgglab.train", *TINY, f"--data-path={images}", f"--run-dir={tmp_path / 'run'}"]
    args += ["--epochs=1000", "--trace=100000", "--skip-steps=1", "--print-freq=1"]
    process = subprocess.Popen(args, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: has_run_files(tmp_path / "run") and len(Run(tmp_path / "run").events("train")) > 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(MAX_WAIT_SECONDS) == 75
    assert (tmp_path / "run" / "trace.json").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux")
def test_freed_memory_is_kept():
    code = (
        "import ctypes, resource; from vgglab.devices.memory import keep_freed_memory\n"
        "kept = keep_freed_memory(); libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.free.argtypes, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p], "
        "[ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "faults = []\n"
        "for _ in range(3):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = libc.malloc(ctypes.c_size_t(2**26)); libc.memset(block, 1, 2**26); libc.free(block)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "print(kept, faults[2] < 100 < faults[0])\n"
    )
    expected = "True" if keep_freed_memory() else "False"
    assert shell("python", "-c", code).stdout.split() == [expected, expected]


# A sitecustomize.py that reports imports of torch's compiler, except by torchvision.
COMPILER = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch._dynamo" and "torchvision" not in sys.modules:
            print("imports the compiler", file=sys.stderr, flush=True)
sys.meta_path.insert(0, Finder())
"""


def test_bench_step_interleaves_modes_and_writes_a_run_directory(tmp_path):
    """The plain loop, and counting the FLOP, used to import torch's compiler, which takes two seconds each."""
    (tmp_path / "sitecustomize.py").write_text(COMPILER)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    args = [
        "python",
        "-m",
        "vgglab.bench",
        "step",
        "--model=vgg11",
        "--image-size=32",
        "--batch-size=2",
        "--device=cpu",
    ]
    args += ["--turns=2", f"--output-dir={tmp_path}"]
    result = shell(*args, "--ways=float32,bare", "--against=torchvision", "--json", env=environment)
    assert (result.returncode, "imports the compiler" in result.stderr) == (0, False), result.stderr
    output = json.loads(result.stdout.splitlines()[-1])
    assert {"images_per_second", "reference_images_per_second", "ratio"} <= set(output)
    assert [row["way"] for row in output["all"]] == ["float32", "bare", "torchvision"]
    assert all(row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1] for row in output["all"])
    flop = {row["way"]: row["flop_per_image"] for row in output["all"]}
    # torchvision keeps its wide classifier for small images.
    assert flop["torchvision"] > 1.5 * flop["float32"] == 1.5 * flop["bare"]
    for row in output["all"]:
        achieved = row["images_per_second"] * row["flop_per_image"]
        assert row["share_of_peak"] == pytest.approx(achieved / row["peak_flop_per_second"])
    [path] = tmp_path.glob("runs/*")
    assert Run(path).status == "done"
    assert Run(path).env["simulated"] is False
    assert json.loads((path / "bench.json").read_text())["results"] == output["all"]


@pytest.mark.parametrize("flag", ["--ways=slow", "--batch-size=0", "--model=vgg12", "--turns=0", "--image-size=8"])
def test_bench_step_refuses_bad_values_in_one_line(tmp_path, capsys, flag):
    code = call("bench", ["step", "--model=vgg11", "--batch-size=2", "--device=cpu", f"--output-dir={tmp_path}", flag])
    assert (code, len(capsys.readouterr().err.strip().splitlines())) == (2, 1)
    assert not list(tmp_path.glob("runs/*"))


def _die_with_unread_request(connection, mode, flags):
    connection.send(step.Ready({}, step.Network("vgg11", 10, 32, "small", False), 1))
    connection.poll(MAX_WAIT_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_benchmark_process_killed_with_an_unread_request_is_out_of_memory(monkeypatch):
    """It used to end with the traceback of a ConnectionResetError."""
    monkeypatch.setattr(step, "CONTEXT", multiprocessing.get_context("fork"))
    monkeypatch.setattr(step, "serve", _die_with_unread_request)
    child = step.Child(step.PLAIN, [])
    with pytest.raises(step.DoesNotFit, match="its process was killed"):
        child.steps(1)


def test_bench_step_help_lists_the_default_modes():
    [subcommand] = (action for action in bench_parser._actions if action.dest == "subject")
    [option] = (action for action in subcommand.choices["step"]._actions if action.dest == "ways")
    assert re.findall(r"[a-z0-9-]+", option.help.partition("default: ")[2].replace(" and ", ", ")) == list(
        step.DEFAULT_MODES
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.usefixtures("narrow")  # its steps need less computation for the same memory
def test_bench_step_finds_the_largest_batch_that_fits(tmp_path):
    """In a process with little memory, the reported batch size works and four times that size does not.

    Twice that size can fit: close to the limit, where address space for threads varies, the search steps back once,
    and here a step is half the size.
    """
    import resource

    code = "import vgglab.trainer, vgglab.commands.bench\n"
    code += "print(open('/proc/self/status').read().split('VmSize:')[1].split()[0])"
    limit = (int(python("-c", code).stdout) + 400_000) * 1024
    options = {"preexec_fn": partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit))}
    # Each attempt runs in a separate process; forked processes start faster.
    code = "import multiprocessing, sys; from vgglab.commands import call; from vgglab.lab.bench import step\n"
    code += "step.CONTEXT, step.TOLERANCE = multiprocessing.get_context('fork'), 1 / 2\n"
    code += "sys.exit(call('bench'))"
    args = ["-c", code, "step", "--model=vgg11", "--image-size=64", "--device=cpu", "--turns=1"]
    args += ["--ways=float32", f"--output-dir={tmp_path}"]
    result = python(*args, "--batch-size=max", "--json", **options)
    assert result.returncode == 0, result.stderr
    [row] = json.loads(result.stdout.splitlines()[-1])["all"]
    assert row["ratio"] is None
    assert row["images_per_second"] > 0
    too_large = python(*args, f"--batch-size={4 * row['batch_size']}", **options)
    assert (too_large.returncode, too_large.stderr.count("\n")) == (2, 1), too_large.stderr
    assert "out of memory" in too_large.stderr
    [found] = results.collect([tmp_path / "runs"])
    assert (found["batch per card"], found["x plain loop"]) == (row["batch_size"], None)
    assert found["share of peak"] == row["share_of_peak"] > 0


def test_a_benchmark_opens_the_device_with_every_option_of_its_flags(monkeypatch):
    """It listed the options itself, and ignored --sync-bn, --timers and --broadcast-buffers."""
    opened = []

    def open_device(name, **options):
        opened.append(options)
        raise UserError("enough")

    monkeypatch.setattr(child, "open_device", open_device)
    names = ("timers", "sync_bn", "broadcast_buffers", "compile")
    mode = step.Mode("all", tuple(f"--{name.replace('_', '-')}" for name in names))
    ours, theirs = multiprocessing.Pipe()
    child.serve(theirs, mode, [*TINY])
    assert ours.recv().reason == "enough"
    assert {name: opened[0].get(name) for name in names} == dict.fromkeys(names, True)
