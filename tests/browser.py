"""JupyterLab in Chromium, driven by Playwright, for tests and for the README's picture."""

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
# No background network traffic; no sandbox, because Chromium does not start as root with one.
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--disable-quic"
).split()
KERNEL_SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
PAGE_TIMEOUT_SECONDS = MAX_WAIT_SECONDS // 2  # for each wait; test_browser opens the page again after a timeout


class Lab:
    """A JupyterLab server with its own settings, kernels and notebooks, isolated from the user's."""

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
        # Otherwise a dialog that asks about news covers the page.
        settings = folder / "lab" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={self.port}"]
        command += [f"--IdentityProvider.token={self.token}", f"--notebook-dir={self.notebooks}"]
        command += ["--allow-root"] if os.getuid() == 0 else []
        self.log = folder / "jupyterlab.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PAGE_TIMEOUT_SECONDS
        while True:
            try:
                urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(self.log.read_text()) from None
                time.sleep(0.1)

    def open(self, name: str, cells: Sequence[str], **page_options: Any) -> Notebook:
        """Write a notebook with these code cells, open it in a new page and wait for its kernel."""
        code_cells = [
            {"id": f"cell-{n:02}", "cell_type": "code", "source": cell, "metadata": {}, "outputs": []}
            for n, cell in enumerate(cells)
        ]
        for cell in code_cells:
            cell["execution_count"] = None
        content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": KERNEL_SPEC}, "cells": code_cells}
        (self.notebooks / f"{name}.ipynb").write_text(json.dumps(content))
        page = self.browser.new_page(**page_options)
        page.set_default_timeout(1000 * PAGE_TIMEOUT_SECONDS)
        page.goto(f"http://127.0.0.1:{self.port}/lab/workspaces/{name}/tree/{name}.ipynb?token={self.token}")
        self.wait_until_connected(page, f"{name}.ipynb")
        notebook = Notebook(page, self.notebooks / f"{name}.ipynb")
        notebook.wait_until_idle()
        return notebook

    def wait_until_connected(self, page: Any, name: str) -> None:
        """Wait for the page's kernel; before that the page shows idle, too, but ignores requests to run a cell."""
        deadline = time.monotonic() + PAGE_TIMEOUT_SECONDS
        while True:
            sessions = page.request.get(f"http://127.0.0.1:{self.port}/api/sessions?token={self.token}").json()
            if any(session["path"] == name and session["kernel"]["connections"] for session in sessions):
                return
            assert time.monotonic() < deadline, "the page did not connect to its kernel"
            page.wait_for_timeout(100)

    def close(self) -> None:
        self.process.terminate()  # also shuts down its kernels
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Notebook:
    """A notebook that is open in a page."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page, self.file = page, file

    def cell(self, number: int) -> Any:
        return self.page.locator(f".jp-Notebook-cell[data-windowed-list-index='{number}']")

    def output(self, number: int) -> Any:
        return self.cell(number).locator(".jp-OutputArea-output")

    def run(self, number: int) -> None:
        """Run a cell from the keyboard, without waiting for it to finish."""
        before, deadline = self.prompt(number), time.monotonic() + PAGE_TIMEOUT_SECONDS
        while self.prompt(number) == before:  # a page that has just opened may ignore the first keys
            assert time.monotonic() < deadline, "the cell did not start"
            self.cell(number).locator(".cm-content").click()
            self.page.keyboard.press("Control+Enter")
            # Long enough for a busy machine: a second key press would run the cell twice.
            retry_time = time.monotonic() + PAGE_TIMEOUT_SECONDS / 10
            while self.prompt(number) == before and time.monotonic() < retry_time:
                self.page.wait_for_timeout(100)

    def prompt(self, number: int) -> str:
        return self.cell(number).locator(".jp-InputPrompt").inner_text().strip()

    def wait_until_idle(self) -> None:
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")

    def save(self) -> None:
        """Save with Ctrl-S and wait until the file has changed."""
        before = self.file.stat().st_mtime_ns
        self.page.keyboard.press("Control+s")
        deadline = time.monotonic() + PAGE_TIMEOUT_SECONDS
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
    """A browser, closed on exit."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def jupyterlab(folder: Path) -> Iterator[Lab]:
    """JupyterLab and a browser, both closed on exit."""
    with chromium() as browser:
        lab = Lab(folder, browser)
        try:
            lab.wait_until_ready()
            yield lab
        finally:
            lab.close()


def page_activity(browser: Any, file: Path) -> list[str]:
    """Dialogs and requested URLs of a page that is opened, without any user input."""
    page, activity = browser.new_page(), []
    page.on("dialog", lambda dialog: (activity.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: activity.append(request.url))
    page.goto(file.as_uri(), wait_until="load")
    page.wait_for_timeout(300)
    page.close()
    return [entry for entry in activity if entry != file.as_uri() and not entry.startswith("data:")]
