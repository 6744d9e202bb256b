"""What users see of a run: the progress bar in a terminal, the dashboard, the curves."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import threading

import matplotlib
import pytest
from conftest import MAX_WAIT_SECONDS, TINY, shell, wait_until
from test_runs import START, append_events, trained

import vgglab
from vgglab.view import live
from vgglab.view.figures import curves
from vgglab.view.live import Dashboard, front_end, progress_of, summary
from vgglab.view.progress import Progress, duration


def test_terminal_shows_a_progress_bar_with_remaining_time(images, tmp_path):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # 40 lines of 120 characters
    flags = [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--print-freq=1", "--epochs=2"]
    process = subprocess.Popen([sys.executable, "-m", "vgglab.train", *flags], stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    while True:
        try:
            part = os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        output += part
    assert process.wait(MAX_WAIT_SECONDS) == 0
    text = output.decode()
    assert "epoch 2 of 2 |" in text
    assert "/8 steps" in text
    assert "images/s" in text
    assert " left" in text
    (log,) = tmp_path.glob("runs/*/log/rank0.txt")
    assert "\r" not in log.read_text()  # redrawn lines are not logged
    assert "top-1" in log.read_text()


def test_remaining_time_is_estimated_from_finished_steps():
    progress = Progress()
    progress.add({"event": "start", "seconds": 10, "epochs": 2, "first_epoch": 0, "first_step": 0, "num_steps": 100})
    assert progress.eta_seconds is None
    progress.add({"event": "train", "seconds": 20, "step": 25, "epoch": 0})
    assert progress.eta_seconds == pytest.approx(10 / 25 * 75)
    assert (progress.activity, progress.num_steps) == ("epoch 1 of 2", 100)
    assert [duration(s) for s in (8, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 05 min"]


def test_dashboard_shows_a_run_and_its_button_stops_it(images, tmp_path):
    pytest.importorskip("ipywidgets")
    flags = [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--epochs=1000"]
    run = vgglab.launch(flags, watch=False)
    dashboard = Dashboard(run)
    wait_until(lambda: run.events("checkpoint"))
    dashboard.refresh()
    assert "of 4000" in dashboard.status.value
    assert "held-out top-1" in dashboard.status.value
    assert bytes(dashboard.picture.value[:4]) == b"\x89PNG"
    assert "top-1" in dashboard.log.value
    dashboard.stop_button.click()
    wait_until(lambda: run.process.poll() is not None)
    assert run.status == "interrupted"
    dashboard.refresh()
    assert ": interrupted" in dashboard.status.value


def test_killed_run_is_failed_and_not_running(images, tmp_path):
    flags = [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--epochs=1000"]
    launched = vgglab.launch(flags, watch=False)
    wait_until(lambda: launched.events("train"))
    launched.process.kill()
    launched.process.wait()
    run = vgglab.Run(launched.path)
    assert run.status == "failed"
    assert run.report()["status"] == "failed"
    assert ": failed" in summary(run, progress_of(run))
    run.watch()  # returns: there is nothing to wait for


def test_launch_that_never_started_is_failed(images, tmp_path):
    launched = vgglab.launch(data_path="/nowhere", run_dir=tmp_path / "run", watch=False)
    launched.process.wait()
    run = vgglab.Run(tmp_path / "run")
    assert run.status == "failed"
    run.watch()


def test_threads_that_read_at_once_see_each_event_once(tmp_path):
    """A dashboard and a cell both read the same lines, and the read position moved past the end of the file."""
    append_events(tmp_path, *map(trained, range(20_000)))
    run, barrier = vgglab.Run(tmp_path), threading.Barrier(2)

    def read():
        barrier.wait()
        run.events()

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    append_events(tmp_path, trained(20_000))
    assert [event["step"] for event in run.events()] == list(range(20_001))


def start_event(step):
    return {**START, "first_step": step}


def test_dashboard_progress_is_that_of_all_events_also_after_resuming(tmp_path):
    append_events(tmp_path, start_event(0), *map(trained, (10, 20, 30)))
    run = vgglab.Run(tmp_path)
    assert progress_of(run).step == 30
    for events in (
        [trained(40)],
        [],
        [start_event(20)],
        [trained(30), trained(40), trained(50)],
        [start_event(10), trained(60)],
    ):
        append_events(tmp_path, *events)
        progress = Progress()
        for event in run.events():
            progress.add(event)
        assert vars(progress_of(run)) == vars(progress)
    assert progress.step == 60


def test_curve_of_a_long_run_has_few_points_and_keeps_nan(tmp_path):
    """30,000 log lines of 90 epochs, drawn every other second, blocked the notebook's kernel."""
    append_events(tmp_path, start_event(0), *(trained(step) for step in range(1, 2500)), trained(2500, loss=None))
    loss = curves(vgglab.Run(tmp_path)).axes[0]
    (line,) = [line for line in loss.lines if "mean of every 3 logged steps" in line.get_label()]
    steps, values = line.get_data()
    assert (steps[0], values[0], len(steps)) == (3, 1.0, 833)
    append_events(tmp_path, trained(2501), trained(2502))
    *_, last = [line for line in curves(vgglab.Run(tmp_path)).axes[0].lines if "mean of" in line.get_label()]
    assert last.get_ydata()[-1] != last.get_ydata()[-1]  # nan


def test_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(vgglab.UserError, match="is not a run directory"):
        vgglab.Run(tmp_path)


def test_front_end_outside_a_notebook_is_the_terminal(monkeypatch):
    monkeypatch.setenv("VGGLAB_UI", "live")
    assert front_end() == "terminal"


MEASURE_MEMORY_GROWTH = """
import gc, json, os, pathlib, sys
from vgglab import Run
from vgglab.view.live import Dashboard

run = Run(sys.argv[1])
event, dashboard = run.events("train")[-1], Dashboard(run)

def refresh(num_times, num_drawn):
    for number in range(num_times):
        dashboard.is_over = lambda: number < num_drawn
        event["step"] += 1
        if number < num_drawn or number % 100 == 0:
            with (run.path / "events.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\\n")
        dashboard.refresh()
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

before = refresh(600, 20)  # loads fonts and fills caches
print("grown by MiB:", refresh(2000, 20) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux")
def test_refreshes_do_not_leak_memory(train):
    """A quarter of an hour at two refreshes per second, 20 of them drawn; detects a leak of 1.5 kB per refresh.

    Measured in a separate process, because memory that other tests used may be freed or reused at any time.
    """
    pytest.importorskip("ipywidgets")
    result = shell("python", "-c", MEASURE_MEMORY_GROWTH, train("--print-freq=1").run.path)
    assert float(result.stdout.rpartition("grown by MiB:")[2]) < 3, result.stderr


def test_dashboard_error_is_shown_and_refresh_is_retried(monkeypatch):
    """If the refreshing thread died silently, the dashboard would show outdated values as current ones."""
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.01)
    board, calls = live.Board(None, [], "", ""), []

    def refresh():
        calls.append(board.status.value)
        if len(calls) == 2:
            raise OSError("the disk <is> away")

    answers = iter([False, OSError("not yet whole"), False, False, True])

    def is_over():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    board.refresh, board.is_over = refresh, is_over
    board.refresh_until_over()
    assert board.stop_button.description == "Ended"
    assert len(calls) == 4  # the last one shows the end of the run
    assert "this dashboard cannot be updated: OSError(&#x27;the disk &lt;is&gt; away&#x27;)" in calls[2]


def test_tick_labels_of_a_log_axis_are_powers():
    """They were shown as $\\mathdefault{10^{2}}$."""
    figure, (panel,) = vgglab.figures.new_figure(1)
    panel.set(xscale="log", yscale="log", xlim=(1, 1e3), ylim=(1, 1e3), title="costs $5 and $_{")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        page = io.StringIO()
        figure.savefig(page, format="svg")
    assert "mathdefault" not in page.getvalue().replace("<!-- $\\mathdefault", "")
    assert "costs $5 and $_{" in page.getvalue()
