"""JupyterLab as a person uses it, in a real browser: Chromium through Playwright, one server for all tests. A picture of each step is kept."""

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

from resnet_nb.config import Parameters
from resnet_nb.run.folder import read_rows, read_status
from resnet_nb.run.launch import is_running, stop, train
from resnet_nb.run.plan import resolve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; it comes with '.[dev]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed; it comes with '.[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium here; on Debian: apt-get install chromium")

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # for what a busy machine does late
SETTINGS = {  # of JupyterLab: no question about news; all cells in the page, so that a test finds what lies below the fold
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


def wait(condition, what: str):
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the checkout, in which notebooks may be changed and runs may lie, with small data."""
    folder = tmp_path_factory.mktemp("a lab") / "resnet nb"
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    small_data(folder / "data")
    patch = pytest.MonkeyPatch()
    patch.setenv("RESNET_NB_HOME", str(folder))
    yield folder
    runs = [path.parent for path in (folder / "runs").glob("*/config.json")]
    for run in runs:
        stop(run)
    wait(lambda: not any(map(is_running, runs)), "the runs to stop")
    patch.undo()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    """Address of a notebook in a JupyterLab whose root is the project; {} stands for its path."""
    config, token = tmp_path_factory.mktemp("jupyter"), secrets.token_hex(16)
    for name, values in SETTINGS.items():
        path = config / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name.upper()}_DIR": str(config / name) for name in ("config", "data", "runtime")}
    own |= {f"JUPYTERLAB_{name.upper()}_DIR": str(config / name) for name in ("settings", "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}"]
    with open(config / "log", "wb") as log:
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, cwd=project, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def answers():
        assert server.poll() is None, (config / "log").read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5)
        except OSError:
            return None

    try:
        wait(answers, "JupyterLab").close()
        yield f"http://127.0.0.1:{port}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(SECONDS)


def ask(lab: str, what: str, **how):
    """The server's answer, without a browser."""
    place, token = re.match(r"(.*)/lab/tree.*token=(\w+)", lab).groups()
    request = urllib.request.Request(f"{place}/api/{what}", headers={"Authorization": f"token {token}"}, **how)
    return urllib.request.urlopen(request, timeout=SECONDS)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """Folder of the pictures: $RESNET_NB_SHOTS, else pytest's."""
    folder = Path(os.environ.get("RESNET_NB_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Notebook:
    """A notebook in a tab of its own."""

    def __init__(self, browser, lab: str, path: str, shots: Path, test: str):
        self.context, self.shots, self.test = browser.new_context(viewport={"width": 1400, "height": 900}), shots, test
        self.page = self.context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.goto(lab.format(path))
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        self.page.locator(".jp-NotebookPanel-toolbar").first.wait_for()

    def cell(self, part: str):
        """The first cell whose source holds `part`."""
        return self.page.locator(".jp-Notebook .jp-Cell", has=self.page.locator(".jp-InputArea", has_text=part)).first

    def says(self, part: str) -> str:
        """The output of that cell, as text."""
        return self.cell(part).locator(".jp-Cell-outputWrapper").inner_text()

    def until(self, part: str, pattern: str) -> re.Match:
        """The first match of `pattern` in the output of a cell, once there is one."""
        return wait(lambda: re.search(pattern, self.says(part)), f"{pattern!r} below {part!r}, where stands {self.says(part)!r}")

    def write(self, part: str, source: str) -> None:
        """Replace the source of a cell, by hand."""
        self.cell(part).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)

    def menu(self, menu: str, item: str) -> None:
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()

    def idle(self) -> None:
        """Wait until there is a kernel that has nothing to do; before there is one, JupyterLab's indicator is idle, too, and Run All does nothing."""
        self.page.locator("#jp-main-statusbar", has_text=re.compile(r"ipykernel\) \| Idle")).wait_for()
        wait(lambda: not self.page.locator(".jp-InputPrompt", has_text="[*]").count(), "the cells to end")

    def run_all(self) -> None:
        self.idle()
        self.menu("Run", "Run All Cells")

    def press(self, button: str) -> None:
        """A button of the toolbar: interrupt, restart."""
        self.page.locator(f".jp-NotebookPanel-toolbar [data-jp-item-name='{button}']").first.click()

    def shot(self, name: str, at=None) -> None:
        if at is not None:
            at.scroll_into_view_if_needed()
        self.page.screenshot(path=self.shots / f"{self.test}-{name}.png")


@pytest.fixture
def opened(browser, lab, project, shots, request):
    """opened(path): a notebook of the project in a tab of its own; with a source it is a copy of that one."""
    tabs = []

    def open_one(path, source=None):
        shutil.copy(ROOT / (source or path), project / path)  # as it was before JupyterLab saved another test's changes
        tabs.append(Notebook(browser, lab, path, shots, request.node.name.removeprefix("test_")))
        return tabs[-1]

    yield open_one
    for run in (project / "runs").glob("*/config.json"):
        stop(run.parent)
    for tab in tabs:
        tab.context.close()
    for session in json.load(ask(lab, "sessions")):  # the next test finds no kernel that is busy with this one's cells
        ask(lab, f"sessions/{session['id']}", method="DELETE").close()


def wish(project, **given) -> dict:
    """Parameters of a small run."""
    overrides = SMALL | {"accelerator": "cpu"} | given.pop("overrides", {})
    return {"hw": "local", "recipe": "digits", "data_dir": str(project / "data" / "small"), "overrides": overrides} | given


def parameters(project, **given) -> str:
    """The first cell, as a person fills it in."""
    return "\n".join(f"{name} = {value!r}" for name, value in wish(project, **given).items())


def test_a_run_from_its_parameters_to_its_curves(opened, project):
    tab = opened("nbs/train.ipynb")
    tab.cell("Provenance").wait_for()
    tab.shot("1-opened")
    tab.write("hw: str", parameters(project, name="first", overrides={"epochs": 4, "num_microbatches": 2, "microbatch_size": 2}))
    tab.run_all()
    tab.shot("2-begins", tab.cell("train(config)"))
    far = r"epoch (\d)/4, step (\d+)/24"
    seen = [tab.until("train(config)", far).groups()]
    tab.shot("3-under-way", tab.page.locator("progress"))
    while now := re.search(far, tab.says("train(config)")):
        seen += [now.groups()] if now.groups() != seen[-1] else []
    assert len(seen) > len({epoch for epoch, _ in seen}), seen  # it moves within an epoch
    tab.until("status = ", "best: epoch")
    tab.shot("4-lines", tab.cell("train(config)"))
    tab.shot("5-curves", tab.cell("save_plot(run_dir)"))
    assert tab.cell("save_plot(run_dir)").locator("img").count() == 1 and not tab.page.locator("progress").count()
    lines = tab.cell("train(config)").locator(".jp-OutputArea-output pre").bounding_box()["height"]
    assert lines / 4 < 20, "lines of epochs are broken"  # px
    for name in ("describe", "plot_plan", "plot_pictures", "status = ", "manifest = "):
        tab.shot(f"6-{name.split()[0]}", tab.cell(name))


TRAIN = "train(config)"
FAULTS = "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"
UNDER_WAY = r"epoch \d+/500, step \d"


def steps(project, name: str) -> int:
    """Optimizer steps that a run has recorded."""
    rows = read_rows(project / "runs" / name, "step")
    return rows[-1]["step"] if rows else 0


def gets_on(project, name: str) -> bool:
    """Whether a run trains, now and in a while."""
    before, run_dir = steps(project, name), project / "runs" / name
    time.sleep(3)
    wait(lambda: steps(project, name) > before or not is_running(run_dir), f"a step of {name}")
    return is_running(run_dir)


@pytest.fixture(scope="module")
def endless(project):
    """endless(**given): parameters of a run that trains until it is stopped."""
    return lambda **given: parameters(project, overrides={"epochs": 500, "image_sizes": [16]}, **given)


def test_the_square_stops_a_run_and_the_cell_goes_on_with_it(opened, project, endless):
    tab = opened("nbs/train.ipynb")
    tab.write("hw: str", endless(name="stopped"))
    tab.run_all()
    for turn in (1, 2):
        tab.until(TRAIN, UNDER_WAY)
        tab.press("interrupt")
        wait(lambda: read_status(project / "runs" / "stopped")["status"] == "stopped", "the run to stop")
        tab.idle()
        assert len(read_status(project / "runs" / "stopped")["attempts"]) == turn
        assert "resnet-nb train stopped goes on" in tab.says(TRAIN)
        tab.shot(f"{turn}-stopped", tab.cell(TRAIN))
        tab.run_all()
    tab.until(TRAIN, r"resumed at step \d+ \(epoch \d+\), attempt 3")
    tab.press("interrupt")


def test_a_run_goes_on_when_the_kernel_is_restarted(opened, project, endless):
    tab = opened("nbs/train.ipynb")
    tab.write("hw: str", endless(name="restarted"))
    tab.run_all()
    tab.until(TRAIN, UNDER_WAY)
    tab.press("restart")
    tab.page.locator(".jp-Dialog .jp-mod-accept").click()
    tab.idle()
    tab.shot("1-restarted", tab.cell(TRAIN))
    try:
        assert gets_on(project, "restarted")
    finally:
        stop(project / "runs" / "restarted")


def test_who_closes_the_tab_and_comes_back_is_led_to_the_run(opened, project, endless):
    tab = opened("nbs/train.ipynb")
    tab.write("hw: str", endless(seed=1))
    before = set((project / "runs").iterdir())
    tab.run_all()
    tab.until(TRAIN, UNDER_WAY)
    tab.context.close()
    (name,) = (path.name for path in set((project / "runs").iterdir()) - before)
    assert gets_on(project, name)
    tab = opened("nbs/again.ipynb", "nbs/train.ipynb")  # with another kernel, as after a restart
    tab.write("hw: str", endless(seed=1))
    tab.run_all()
    tab.until("offer(config)", f'to see it, set name = "{name}" and run all')
    tab.shot("1-told", tab.cell("offer(config)"))
    assert "Traceback" not in tab.says("offer(config)") and len(set((project / "runs").iterdir()) - before) == 1
    tab.write("hw = ", endless(seed=1, name=name))
    tab.run_all()
    tab.until(TRAIN, UNDER_WAY)
    tab.until(TRAIN, r"epoch +1/500 \|")  # from its beginning
    tab.shot("2-found", tab.page.locator("progress"))
    stop(project / "runs" / name)
    tab.until(TRAIN, "stopped")
    tab.write("status = ", f"from resnet_nb.results.live import follow\nfollow({name!r})")
    tab.page.keyboard.press("Control+Enter")
    tab.until("import follow", r"epoch +1/500 \| (.|\n)*stopped")
    wait(lambda: tab.cell("import follow").locator("img").count(), "the curves")
    tab.shot("3-followed", tab.cell("import follow"))


def test_a_misspelt_parameter_is_refused_at_every_run_of_the_cells(opened, project):
    tab = opened("nbs/train.ipynb")
    before = set((project / "runs").iterdir())
    for turn, cell in ((1, "hw: str"), (2, "recipie")):
        tab.write(cell, "recipie = 'imagenette'\nhw = 'local'")
        tab.run_all()
        tab.until("offer(config)", "ValueError: unknown parameter 'recipie'; did you mean 'recipe'?")
        tab.idle()
        tab.shot(f"{turn}-refused", tab.cell("offer(config)"))
        assert "Traceback" not in tab.says("offer(config)")
    assert set((project / "runs").iterdir()) == before


@pytest.fixture(scope="module")
def finished(project):
    """Name of a run that has come to its end."""
    if not (project / "runs" / "first" / "checkpoints" / "BEST").exists():
        train(resolve(Parameters(**wish(project, name="first", overrides={"epochs": 6}))))
    return "first"


def test_a_run_is_evaluated(opened, finished):
    tab = opened("nbs/evaluate.ipynb")
    tab.shot("1-opened")
    tab.write(
        "run: str",
        f"run = {finished!r}\nsplit, which, data_dir, arch, image_size = 'val', 'best', '', '', 0\ndevice, devices, num_threads, rows_shown, formats = 'cpu', 1, 0, 1, []",
    )
    tab.run_all()
    tab.until("evaluation = ", f"{finished}, best checkpoint")
    tab.idle()
    assert not tab.page.locator(FAULTS).count()
    for name in ("evaluation = ", "plot_confusion", "plot_calibration", "most_wrong(table)", "plot_sizes_tested", "export("):
        tab.shot(f"2-{re.split('[ (]', name)[0]}", tab.cell(name))


def test_pictures_from_the_browser_are_answered(opened, finished, project):
    tab = opened("nbs/predict.ipynb")
    tab.write("run: str", f"run, pictures, which, top, out = {finished!r}, '', 'best', 3, ''")
    tab.run_all()
    button = tab.cell("upload_box").locator("button", has_text="Pictures")
    button.wait_for()
    tab.idle()
    for count in (2, 1):  # and once more, in place of the first ones
        with tab.page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(sorted((project / "data" / "small" / "val" / "1").iterdir())[:count])
        wait(lambda count=count: f"({count})" in button.inner_text(), "the upload")
        tab.idle()
        wait(lambda: tab.cell("upload_box").locator("img").count() == 1, "the answers")
        tab.shot(f"{count}-answered", tab.cell("upload_box"))
    assert not tab.page.locator(FAULTS).count()


def test_data_is_checked_and_a_bar_moves_meanwhile(opened, project):
    tab = opened("nbs/check.ipynb")
    tab.write("data_dir: str", f"data_dir = {str(project / 'data' / 'small')!r}")
    tab.run_all()
    tab.until("inspected(data_dir)", "96 pictures of 4 classes(.|\n)*healthy")
    tab.idle()
    tab.shot("1-checked", tab.cell("plot_sizes"))
    assert not tab.page.locator(FAULTS).count() and not tab.page.locator("progress").count()
    waits = "import time\nfrom resnet_nb.bars import progress\nfor _ in progress('pictures', 20, iterable=range(20)): time.sleep(0.3)"
    tab.write("for split, facts", waits)
    tab.page.keyboard.press("Control+Enter")
    share = lambda: float(tab.page.locator("progress").get_attribute("value"))
    tab.page.locator("progress").wait_for()
    before = share()
    wait(lambda: share() > before, "the bar to move")
    tab.shot("2-bar", tab.page.locator("progress"))
    tab.page.locator("progress").wait_for(state="detached")


def test_the_index_shows_its_pictures_and_its_links_lead_to_pages(opened):
    tab = opened("nbs/index.ipynb")
    links = tab.page.locator(".jp-RenderedMarkdown a[href]:not(.jp-InternalAnchorLink)")
    links.first.wait_for()
    tab.shot("1-opened")
    found = {link.get_attribute("href") for link in links.all()}
    local = sorted(href for href in found if "127.0.0.1" in href or not re.match(r"\w+:", href))
    assert len(local) > 10
    assert {href: answer.status for href in local if (answer := tab.page.request.get(href)).status != 200} == {}
    assert all(image.evaluate("image => image.naturalWidth") for image in tab.page.locator(".jp-Notebook img").all())
    tab.run_all()
    tab.idle()
    assert not tab.page.locator(FAULTS).count()
    tab.shot("2-run", tab.cell("plot_run"))
    links.get_by_text("exactness", exact=False).first.click()
    tab.page.locator(".lm-TabBar-tabLabel", has_text="exactness.ipynb").wait_for()
    tab.page.locator("#jp-main-dock-panel .jp-NotebookPanel:visible h1").first.wait_for()
    tab.shot("3-link")
