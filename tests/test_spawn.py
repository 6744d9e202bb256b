"""``--nproc``: ranks on one machine, started so that no other user can interfere."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from conftest import MAX_WAIT_SECONDS, PROJECT, TINY, shell, wait_until
from processes import NARROW_CODE, PYTHONPATH
from test_launch import MARK, processes_with
from test_ranks import FAULT, HANG
from torch.distributed import TCPStore

import vgglab
from vgglab import Run
from vgglab.dist import ranks, spawn

pytestmark = pytest.mark.usefixtures("narrow", "forked")
LISTENING = "0A"  # in /proc/net/tcp
LOOPBACK = (
    "0100007F",
    "0" * 24 + "01000000",
    "0" * 16 + "FFFF0000" + "0100007F",
)  # 127.0.0.1, ::1, ::ffff:127.0.0.1
KILL_FIRST_ATTEMPT = "if os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0': os.kill(os.getpid(), 9)"


@pytest.fixture
def command(images, tmp_path):
    return [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--print-freq=1", "--seed=1", "--nproc=2"]


@pytest.fixture
def start(command, tmp_path):
    """``start("--epochs=2", mark="x")`` runs the command in a new process with this mark."""
    started = []

    def start_process(*flags, mark, **environment):
        process = subprocess.Popen(
            [sys.executable, "-m", "vgglab.train", *command, *flags],
            env={**os.environ, "PYTHONPATH": PYTHONPATH, MARK: mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


def sockets_of(pids):
    """The inodes of these processes' sockets."""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[len("socket:[") : -1])
    return found


def listening(pids):
    """``(address, port)`` in hexadecimal for each TCP socket on which these processes listen."""
    inodes, found = sockets_of(pids), []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                found.append(tuple(fields[1].split(":")))
    return found


def the_only_run(tmp_path):
    [path] = tmp_path.glob("runs/*")
    return Run(path)


def is_training(tmp_path):
    return any(tmp_path.glob("runs/*/events.jsonl")) and the_only_run(tmp_path).events("train")


def test_listening_finds_a_socket_open_to_all():
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        assert (f"{0:08X}", f"{server.getsockname()[1]:04X}") in listening([os.getpid()])


def test_killed_rank_is_reported_if_another_one_has_failed_meanwhile(monkeypatch, capfd):
    """The other rank may lose its connection and end before the launcher looks at both."""
    code = "import os; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else os._exit(1)"
    monkeypatch.setattr(ranks, "training_command", lambda argv: [sys.executable, "-c", code])
    monkeypatch.setattr(spawn, "POLL_SECONDS", 2)
    assert spawn.train_on_ranks([], 2, 0) == 1
    assert "rank 1 of 2: " in capfd.readouterr().err


@pytest.mark.new_interpreters
def test_launched_run_listens_only_on_loopback(command, monkeypatch):
    monkeypatch.setenv(MARK, "ports")
    run = vgglab.launch(command, epochs=100_000, watch=False)
    try:
        wait_until(lambda: run.events("train"))
        pids = processes_with("ports")
        assert len(pids) == 3  # the launcher and two ranks
        assert [address for address, _ in listening(pids) if address not in LOOPBACK] == []
    finally:
        run.stop()


ATTACK = """
import os, signal, sys
from torch.distributed import TCPStore
os.setgroups([]); os.setgid(65534); os.setuid(65534)
rendezvous, *ports = sys.argv[1:]
os.listdir(os.path.dirname(rendezvous))  # this is allowed
for action in (
    lambda: os.listdir(rendezvous),
    lambda: open(rendezvous + '/attempt0', 'ab'),
    lambda: os.symlink('/etc/passwd', rendezvous + '/attempt1'),
):
    try:
        action()
    except PermissionError:
        continue
    sys.exit('access was not denied')
attempts = {}
for port in ports:
    attempts[port] = os.fork()
    if attempts[port] == 0:
        # A client waits forever for a server that does not answer. The first port is that of a store, which answers.
        signal.alarm(0 if port == ports[0] else 3)
        TCPStore('127.0.0.1', int(port), wait_for_workers=False).set('key', 'anything')
        os._exit(0)
for port, pid in attempts.items():
    if os.waitpid(pid, 0)[1] == 0:
        print('store at', port)
"""


@pytest.mark.new_interpreters
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")
def test_another_user_can_reach_neither_the_rendezvous_nor_a_store(command, monkeypatch, shared_folder):
    """Anyone who could reach torchrun's store could make the run's owner unpickle data of their choosing."""
    monkeypatch.setenv(MARK, "attack")
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(shared_folder))
        run = vgglab.launch(command, epochs=100_000, watch=False)
    try:
        wait_until(lambda: run.events("train"))
        [rendezvous] = shared_folder.glob("vgglab-*")
        ports = [int(port, 16) for _, port in listening(processes_with("attack"))]
        # To show that the attack finds a store if there is one.
        store = TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
        result = processes.python("-c", ATTACK, rendezvous, store.port, *ports)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == ["store", "at", str(store.port)]
        step = run.events("train")[-1]["step"]
        wait_until(lambda: run.events("train")[-1]["step"] > step + 2)  # the run continues
    finally:
        run.stop()


def test_ranks_restart_after_one_is_killed_and_the_run_completes(start, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NARROW_CODE + FAULT.format(action=KILL_FIRST_ATTEMPT, rank=1))
    path = f"{tmp_path / 'site'}{os.pathsep}{PROJECT}"
    process = start("--epochs=2", "--checkpoint-every=1", "--max-restarts=1", mark="restart", PYTHONPATH=path)
    _, err = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert process.returncode == 0, err
    assert "rank 1 of 2: was killed (SIGKILL)" in err
    assert "restart 1 of 1" in err
    run = the_only_run(tmp_path)
    assert run.status == "done"
    assert (run.path / "events.jsonl").read_text().count('"event": "start"') == 2
    assert [event["step"] for event in run.events("train")] == list(range(1, 5))


@pytest.mark.parametrize(
    ("number", "target", "code"),
    [(signal.SIGTERM, "launcher", 75), (signal.SIGTERM, "rank", 75), (signal.SIGINT, "launcher", 130)],
    ids=["launcher", "rank", "ctrl-c"],
)
def test_signal_ends_all_ranks_with_the_documented_exit_code(start, tmp_path, number, target, code):
    process = start("--epochs=100000", mark=f"signal-{target}-{code}")
    wait_until(lambda: is_training(tmp_path) and len(the_only_run(tmp_path).ranks()) == 2)
    run = the_only_run(tmp_path)
    os.kill(process.pid if target == "launcher" else run.ranks()[1]["pid"], number)
    _, err = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert (process.returncode, "Traceback" in err) == (code, False), err
    assert run.status == "interrupted"
    assert processes_with(f"signal-{target}-{code}") == []
    assert run.events("checkpoint")[-1]["step"] == run.events("train")[-1]["step"]


def test_second_ctrl_c_ends_ranks_at_once_with_status_interrupted(start, tmp_path):
    """The ranks were killed, the run had the status failed, and there was no last line."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NARROW_CODE + FAULT.format(action=HANG, rank=1))
    path = f"{tmp_path / 'site'}{os.pathsep}{PROJECT}"
    process = start("--epochs=100000", "--print-freq=1", mark="second-ctrl-c", PYTHONPATH=path)
    wait_until(lambda: is_training(tmp_path) and len(the_only_run(tmp_path).ranks()) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # pending signals of the same kind are merged
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    run = the_only_run(tmp_path)
    assert run.status == "interrupted"
    assert re.search(r"rank 0 of 2: interrupted; continue with --run-dir \S+ --resume auto", err), err
    assert processes_with("second-ctrl-c") == []


def test_third_ctrl_c_kills_hanging_ranks(start, tmp_path):
    process = start("--epochs=100000", mark="third-ctrl-c")
    wait_until(lambda: is_training(tmp_path))
    wait_until(lambda: len(the_only_run(tmp_path).ranks()) == 2)
    hanging = the_only_run(tmp_path).ranks()[1]["pid"]
    os.kill(hanging, signal.SIGSTOP)
    wait_until(lambda: "T" in status_of(hanging)["State"])  # which takes a while on a busy machine
    process.send_signal(signal.SIGINT)
    wait_until(lambda: int(status_of(hanging)["ShdPnd"], 16) >> (signal.SIGINT - 1) & 1)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert processes_with("third-ctrl-c") == []


def status_of(pid):
    """Fields of ``/proc/PID/status`` by name; ``ShdPnd`` is the mask of pending signals."""
    return dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())


FAKE_TORCH = "open({file!r}, 'w').close()\nraise ImportError('fake torch')\n"
LAUNCH_SCRIPT = "import sys, vgglab\nvgglab.launch(sys.argv[1:], watch=False).wait()\n"


@pytest.mark.parametrize("mode", ["--nproc=2", "--seeds=1", "launch", "doctor"])
def test_nothing_is_imported_from_the_current_directory(command, tmp_path, mode):
    """The ranks executed a torch.py that another user had put into a shared directory."""
    shared, script = tmp_path / "shared", tmp_path / "elsewhere" / "script.py"
    shared.mkdir()
    script.parent.mkdir()
    (shared / "torch.py").write_text(FAKE_TORCH.format(file=str(tmp_path / "imported")))
    flags = [flag for flag in command if "nproc" not in flag and "seed" not in flag]
    call = {"doctor": "call('doctor', [])", "launch": ""}.get(mode, "train.main(sys.argv[1:])")
    code = f"import sys; from vgglab import train; from vgglab.commands import call; sys.exit({call})"
    script.write_text(LAUNCH_SCRIPT if mode == "launch" else code)  # Python searches only the script's directory
    args = [*flags, *([mode] if mode.startswith("--") else [])]
    result = shell("python", script, *args, cwd=shared, env={**os.environ, "PYTHONPATH": str(PROJECT)})
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "imported").exists()


def test_input_error_on_all_ranks_gives_exit_code_2(start, tmp_path):
    process = start("--num-classes=7", mark="refused")
    _, err = process.communicate(timeout=MAX_WAIT_SECONDS)
    assert (process.returncode, "Traceback" in err) == (2, False), err
    assert "--num-classes 7: " in err
    assert not (tmp_path / "runs").exists()
