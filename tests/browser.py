"""A real JupyterLab and the Chromium of the machine, for tests and for the README's pictures."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence
from urllib.request import urlopen

from conftest import MAX_WAIT_SECONDS, PROJECT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no chromium on the PATH; `make browser`, or as root: apt-get install chromium"
# Nothing that asks the network, and no sandbox, which root cannot have.
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--disable-quic"
).split()
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
SECONDS = MAX_WAIT_SECONDS // 2  # for whatever a person would wait for; a page that missed something is opened again


class Lab:
    """A JupyterLab of its own: no settings, no kernels, no notebooks but those written here."""

    def __init__(self, folder: Path, browser: Any) -> None:
        self.folder, self.browser = folder, browser
        self.token = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.notebooks = folder / "notebooks"
        self.notebooks.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
            environment[f"JUPYTER_{name}"] = str(folder / name)
        environment["JUPYTERLAB_SETTINGS_DIR"] = environment["JUPYTERLAB_WORKSPACES_DIR"] = str(folder / "lab")
        # Else a question about news covers what is looked at.
        quiet = folder / "lab" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}"]
        command += [f"--IdentityProvider.token={self.token}", f"--notebook-dir={self.notebooks}"]
        command += ["--allow-root"] if os.getuid() == 0 else []
        self.log = folder / "jupyterlab.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(self.log.read_text()) from None
                time.sleep(0.1)

    def open(self, name: str, cells: Sequence[str], **view: Any) -> Notebook:
        """Write a notebook with these cells of code and open it in a page of its own, its kernel running."""
        written = [
            {"id": f"cell-{n:02}", "cell_type": "code", "source": cell, "metadata": {}, "outputs": []}
            for n, cell in enumerate(cells)
        ]
        for cell in written:
            cell["execution_count"] = None
        content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": KERNEL}, "cells": written}
        (self.notebooks / f"{name}.ipynb").write_text(json.dumps(content))
        page = self.browser.new_page(**view)
        page.set_default_timeout(1000 * SECONDS)
        page.goto(f"http://127.0.0.1:{self.port}/lab/workspaces/{name}/tree/{name}.ipynb?token={self.token}")
        self.wait_until_connected(page, f"{name}.ipynb")
        notebook = Notebook(page, self.notebooks / f"{name}.ipynb")
        notebook.wait_until_idle()
        return notebook

    def wait_until_connected(self, page: Any, name: str) -> None:
        """Before that a page calls itself idle, too, but forgets the cells that it is asked to run."""
        deadline = time.monotonic() + SECONDS
        while True:
            sessions = page.request.get(f"http://127.0.0.1:{self.port}/api/sessions?token={self.token}").json()
            if any(session["path"] == name and session["kernel"]["connections"] for session in sessions):
                return
            assert time.monotonic() < deadline, "the page does not find its kernel"
            page.wait_for_timeout(100)

    def close(self) -> None:
        self.process.terminate()  # it ends its kernels
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Notebook:
    """One that is open in a page."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page, self.file = page, file

    def cell(self, number: int) -> Any:
        return self.page.locator(f".jp-Notebook-cell[data-windowed-list-index='{number}']")

    def output(self, number: int) -> Any:
        return self.cell(number).locator(".jp-OutputArea-output")

    def run(self, number: int) -> None:
        """Run a cell as a person does, and do not wait for it."""
        before, deadline = self.prompt(number), time.monotonic() + SECONDS
        while self.prompt(number) == before:  # a page that has just opened may swallow the first keys
            assert time.monotonic() < deadline, "the cell does not run"
            self.cell(number).locator(".cm-content").click()
            self.page.keyboard.press("Control+Enter")
            # Long enough for a busy machine: pressed twice, a cell would run twice.
            again = time.monotonic() + SECONDS / 10
            while self.prompt(number) == before and time.monotonic() < again:
                self.page.wait_for_timeout(100)

    def prompt(self, number: int) -> str:
        return self.cell(number).locator(".jp-InputPrompt").inner_text().strip()

    def wait_until_idle(self) -> None:
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")

    def save(self) -> None:
        """With Ctrl-S, until it stands on the disk."""
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + SECONDS
        while self.file.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline, "not saved"
            self.page.wait_for_timeout(50)

    def reload(self) -> None:
        self.page.once("dialog", lambda dialog: dialog.accept())  # "leave without saving?"
        self.page.reload()
        self.page.wait_for_selector(".jp-Notebook-cell")

    def close(self) -> None:
        self.page.close()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, ended when this is left."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def jupyterlab(folder: Path) -> Iterator[Lab]:
    """A JupyterLab and a browser, both ended when this is left."""
    with chromium() as browser:
        lab = Lab(folder, browser)
        try:
            lab.wait_until_it_answers()
            yield lab
        finally:
            lab.close()


def done_by(browser: Any, file: Path) -> list[str]:
    """What a page does by itself when it is opened: the dialogs it shows, the addresses it asks for."""
    page, done = browser.new_page(), []
    page.on("dialog", lambda dialog: (done.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: done.append(request.url))
    page.goto(file.as_uri(), wait_until="load")
    page.wait_for_timeout(300)
    page.close()
    return [what for what in done if what != file.as_uri() and not what.startswith("data:")]
