"""What people see: the bar on a terminal, the dashboard, the block in a report."""

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
from test_runs import START, add, trained

import vgglab
from vgglab.view import live
from vgglab.view.figures import curves
from vgglab.view.live import Dashboard, front_end, progress_of, summary
from vgglab.view.progress import Progress, duration


def test_on_a_terminal_there_is_a_bar_that_says_what_is_going_on_and_for_how_long(images, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # 40 lines of 120 characters
    flags = [*TINY, f"--data-path={images}", f"--output-dir={tmp_path}", "--print-freq=1", "--epochs=2"]
    process = subprocess.Popen([sys.executable, "-m", "vgglab.train", *flags], stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert process.wait(MAX_WAIT_SECONDS) == 0
    text = seen.decode()
    assert "epoch 2 of 2 |" in text
    assert "/8 steps" in text
    assert "images/s" in text
    assert " left" in text
    (log,) = tmp_path.glob("runs/*/log/rank0.txt")
    assert "\r" not in log.read_text()  # the redrawing stays on the screen
    assert "top-1" in log.read_text()


def test_time_left_is_told_from_what_was_done():
    progress = Progress()
    progress.add({"event": "start", "seconds": 10, "epochs": 2, "first_epoch": 0, "first_step": 0, "num_steps": 100})
    assert progress.eta_seconds is None
    progress.add({"event": "train", "seconds": 20, "step": 25, "epoch": 0})
    assert progress.eta_seconds == pytest.approx(10 / 25 * 75)
    assert (progress.activity, progress.num_steps) == ("epoch 1 of 2", 100)
    assert [duration(s) for s in (8, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 05 min"]


def test_the_dashboard_shows_a_run_and_its_button_stops_it(images, tmp_path):
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


def test_a_run_that_was_killed_is_not_taken_for_alive(images, tmp_path):
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


def test_a_launch_that_never_began_is_over_too(images, tmp_path):
    launched = vgglab.launch(data_path="/nowhere", run_dir=tmp_path / "run", watch=False)
    launched.process.wait()
    run = vgglab.Run(tmp_path / "run")
    assert run.status == "failed"
    run.watch()


def test_two_threads_that_look_at_once_see_each_event_once(tmp_path):
    """A dashboard and a cell: each took in the same lines, and the place to read on from ran past the file's end."""
    add(tmp_path, *map(trained, range(20_000)))
    run, together = vgglab.Run(tmp_path), threading.Barrier(2)

    def look():
        together.wait()
        run.events()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    add(tmp_path, trained(20_000))
    assert [event["step"] for event in run.events()] == list(range(20_001))


def start_at(step):
    return {**START, "first_step": step}


def test_a_dashboards_progress_is_that_of_all_events_also_where_some_became_void(tmp_path):
    add(tmp_path, start_at(0), *map(trained, (10, 20, 30)))
    run = vgglab.Run(tmp_path)
    follower = live.ProgressReader(run)
    assert follower.progress().step == 30
    for more in [trained(40)], [], [start_at(20)], [trained(30), trained(40), trained(50)], [start_at(10), trained(60)]:
        add(tmp_path, *more)
        assert vars(follower.progress()) == vars(progress_of(vgglab.Run(tmp_path)))
    assert follower.progress().step == 60


def test_the_curve_of_a_long_run_is_drawn_with_few_points_and_keeps_what_is_not_finite(tmp_path):
    """30,000 log lines of 90 epochs, drawn every other second, took the kernel from whoever worked in it."""
    add(tmp_path, start_at(0), *(trained(step) for step in range(1, 2500)), trained(2500, loss=None))
    loss = curves(vgglab.Run(tmp_path)).axes[0]
    (line,) = [line for line in loss.lines if "mean of every 3 logged steps" in line.get_label()]
    steps, values = line.get_data()
    assert (steps[0], values[0], len(steps)) == (3, 1.0, 833)
    add(tmp_path, trained(2501), trained(2502))
    *_, last = [line for line in curves(vgglab.Run(tmp_path)).axes[0].lines if "mean of" in line.get_label()]
    assert last.get_ydata()[-1] != last.get_ydata()[-1]  # nan


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(vgglab.UserError, match="is not a run directory"):
        vgglab.Run(tmp_path)


def test_without_a_notebook_the_front_end_is_the_terminal(monkeypatch):
    monkeypatch.setenv("VGGLAB_UI", "live")
    assert front_end() == "terminal"


LOOKING = """
import gc, json, os, pathlib, sys
from vgglab import Run
from vgglab.view import live
from vgglab.view.live import Dashboard

run = Run(sys.argv[1])
event, dashboard = run.events("train")[-1], Dashboard(run)

def look(num_times, num_drawn):
    for number in range(num_times):
        live._has_ended = lambda _: number < num_drawn
        event["step"] += 1
        if number < num_drawn or number % 100 == 0:
            with (run.path / "events.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\\n")
        dashboard.refresh()
    gc.collect()
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

before = look(600, 20)  # by then fonts are read and what is kept for reuse is there
print("grown by MiB:", look(2000, 20) - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux")
def test_many_refreshes_do_not_fill_the_memory(train):
    """A quarter of an hour at two looks a second, 20 of them drawn; 1.5 kB a look would show.

    Measured in a separate process, because memory that other tests used may be freed or reused at any time.
    """
    pytest.importorskip("ipywidgets")
    looked = shell("python", "-c", LOOKING, train("--print-freq=1").run.path)
    assert float(looked.stdout.rpartition("grown by MiB:")[2]) < 3, looked.stderr


def test_what_goes_wrong_in_a_dashboard_is_shown_and_tried_again(monkeypatch):
    """A thread that died in silence would leave figures that look alive."""
    widgets = pytest.importorskip("ipywidgets")
    monkeypatch.setattr(live, "REFRESH_SECONDS", 0.01)
    status, calls = widgets.HTML(), []

    def refresh():
        calls.append(status.value)
        if len(calls) == 2:
            raise OSError("the disk <is> away")

    answers = iter([False, OSError("not yet whole"), False, False, True])

    def is_over():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    live.refresh_until_over(refresh, is_over, status)
    assert len(calls) == 4  # the last one sees the end
    assert "this dashboard cannot be updated: OSError(&#x27;the disk &lt;is&gt; away&#x27;)" in calls[2]


def test_the_powers_of_a_logarithmic_axis_are_drawn_as_powers():
    """They stood there as $\\mathdefault{10^{2}}$."""
    figure, (panel,) = vgglab.figures.new_figure(1)
    panel.set(xscale="log", yscale="log", xlim=(1, 1e3), ylim=(1, 1e3), title="costs $5 and $_{")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        page = io.StringIO()
        figure.savefig(page, format="svg")
    assert "mathdefault" not in page.getvalue().replace("<!-- $\\mathdefault", "")
    assert "costs $5 and $_{" in page.getvalue()
