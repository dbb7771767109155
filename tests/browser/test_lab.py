"""JupyterLab as a person uses it, in a real browser: Chromium through Playwright, one server for all tests. Pictures of each step are kept."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import SMALL, small_data

from resnet_nb.run.launch import is_running, stop

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it comes with '.[dev]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed; it comes with '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here; on Debian: apt-get install chromium")

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # for what a busy machine does late
SETTINGS = {  # of JupyterLab: no question about news; all cells in the page, so that a test finds what lies below the fold
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the checkout, in which the notebooks may be changed and runs may lie."""
    folder = tmp_path_factory.mktemp("a lab") / "resnet nb"
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    small_data(folder / "data")
    yield folder
    for run in (folder / "runs").glob("*/"):
        stop(run)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and any(map(is_running, (folder / "runs").glob("*/"))):
        time.sleep(0.5)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    """Address of a JupyterLab with its root in the project, token included."""
    config, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    for name, values in SETTINGS.items():
        path = config / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(config / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(config / "lab" / "user-settings"), "JUPYTERLAB_WORKSPACES_DIR": str(config / "workspaces")}
    own |= {"RESNET_NB_HOME": str(project), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}"]
    with open(config / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=project, env=os.environ | own, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (config / "log").read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(SECONDS)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("RESNET_NB_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Notebook:
    """A notebook in a tab of its own."""

    def __init__(self, browser, lab: str, path: str, shots: Path):
        self.context, self.shots, self.name = browser.new_context(viewport={"width": 1400, "height": 900}), shots, Path(path).stem
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.goto(lab.format(path))
        self.page.wait_for_selector(".jp-Notebook .jp-Cell")
        self.page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")

    def cell(self, part: str):
        "The cell whose source holds `part`."
        return self.page.locator(".jp-Notebook .jp-Cell", has=self.page.locator(".jp-InputArea", has_text=part)).first

    def write(self, part: str, source: str) -> None:
        "Replace the source of a cell, by hand."
        self.cell(part).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def menu(self, menu: str, item: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()

    def run_all(self) -> None:
        self.menu("Run", "Run All Cells")

    def shot(self, name: str, at=None) -> None:
        if at is not None:
            at.scroll_into_view_if_needed()
        self.page.screenshot(path=self.shots / f"{self.name}-{name}.png")

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def opened(browser, lab, shots):
    """opened(path): a notebook of the project in a tab of its own."""
    tabs = []

    def open_one(path):
        tabs.append(Notebook(browser, lab, path, shots))
        return tabs[-1]

    yield open_one
    for tab in tabs:
        tab.close()


def parameters(project, **given) -> str:
    "The first cell, as a person fills it in."
    overrides = SMALL | {"accelerator": "cpu"} | given.pop("overrides", {})
    given = {"hw": "local", "recipe": "digits", "data_dir": str(project / "data" / "small"), "overrides": overrides} | given
    return "\n".join(f"{name} = {value!r}" for name, value in given.items())


def test_a_run_from_its_parameters_to_its_curves(opened, project):
    tab = opened("nbs/train.ipynb")
    tab.shot("1-opened")
    tab.write("hw: str", parameters(project, name="first", overrides={"epochs": 6}))
    tab.run_all()
    bar = tab.page.locator("text=/epoch \\d+\\/6, step/")
    bar.wait_for()
    tab.shot("2-under-way", bar)
    tab.page.locator("text=/best: epoch/").wait_for()
    tab.shot("3-trained", tab.page.locator("text=/epoch +6\\/6/"))
    for n, cell in enumerate(tab.page.locator(".jp-CodeCell").all()):
        tab.shot(f"4-cell-{n}", cell)
