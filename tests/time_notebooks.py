"""Time the notebooks on this machine: ``python tests/time_notebooks.py "two cores of a <processor>, <month>"``.

Each notebook runs alone in an empty folder. The times go into ``vgglab/lab/timings.json``; the notebooks show them.
Run this on an idle machine; it takes as long as all notebooks together.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from vgglab.commands.book import Book, jobs_for
from vgglab.lab import machine_speed


def main(machine: str) -> int:
    notebooks = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
    speed_before = machine_speed.measure()
    chapters = []
    for notebook in notebooks:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # runs are written here
            chapters += Book(num_parallel=1).execute(jobs_for([notebook], Path(folder), {}))
            os.chdir(os.path.dirname(folder))
    if any(chapter.error for chapter in chapters):
        return 1
    step_seconds, compile_seconds = map(min, speed_before, machine_speed.measure())  # the one with less interference
    seconds = {chapter.file.stem: round(chapter.seconds) for chapter in chapters}
    content = {"machine": machine, "step_seconds": round(step_seconds, 4), "compile_seconds": round(compile_seconds, 4)}
    file = Path(machine_speed.__file__).with_name("timings.json")
    file.write_text(json.dumps({**content, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")
    print(file.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) == 2 else __doc__)
