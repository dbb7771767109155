"""How a run is left: a notebook that is closed, a kernel or a server that ends, a command that is interrupted, a terminal that is closed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from jupyter_client import BlockingKernelClient

from resnet_nb.run import launch
from resnet_nb.run.folder import all_rows, create_run, is_locked, read_status, run_path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TOKEN = "of this test alone"
# long enough that no test sees its end, if nothing stops it
LONG = {"epochs": 900, "image_sizes": [16], "num_microbatches": 2}
CELL = """
from resnet_nb.run import launch
from resnet_nb.run.folder import load_config, run_path
launch.train(load_config(run_path({name!r})))
"""


def wait_for(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def steps(run_dir):
    return max((row["step"] for row in all_rows(run_dir) if row["event"] == "step"), default=0)


def goes_on(run_dir):
    """Whether the run trains some more steps, seconds after it was left."""
    time.sleep(4)
    before = steps(run_dir)
    wait_for(lambda: steps(run_dir) > before or not is_locked(run_dir), 30)
    return steps(run_dir) > before and not (run_dir / "STOP").exists() and read_status(run_dir)["status"] == "running"


def end(run_dir):
    launch.stop(run_dir)
    wait_for(lambda: not is_locked(run_dir))


def start(words, **how):
    """A command in a session of its own, as in a terminal of its own; without what tells ipykernel that pytest is about."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(list(map(str, words)), env=environment, text=True, start_new_session=True, **{**pipes, **how})


class Server:
    """A real Jupyter server on a loopback port, spoken to as a browser does."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, environment = folder, {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("RUNTIME", "CONFIG", "DATA")}
        options = {"ip": "127.0.0.1", "port": self.port, "port_retries": 0, "open_browser": False, "allow_root": True, "root_dir": folder}
        words = [f"--ServerApp.{name}={value}" for name, value in options.items()] + [f"--IdentityProvider.token={TOKEN}"]
        self.log = open(folder / "log", "wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jupyter_server", *words], env=os.environ | environment, stdout=self.log, stderr=self.log
        )
        wait_for(self.answers, 60)

    def answers(self):
        try:
            return self.ask("GET", "status")
        except OSError:
            assert self.process.poll() is None, (self.folder / "log").read_text()
            return None

    def ask(self, method, path, body=None):
        url, head = f"http://127.0.0.1:{self.port}/api/{path}", {"Authorization": f"token {TOKEN}"}
        asked = urllib.request.Request(url, json.dumps(body).encode() if body is not None else None, head, method=method)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def begin(self, name):
        """A kernel that follows the run, in its first cell: (id, client)."""
        kernel = self.ask("POST", "kernels", {"name": "python3"})["id"]
        client = BlockingKernelClient(connection_file=str(self.folder / "RUNTIME" / f"kernel-{kernel}.json"))
        client.load_connection_file()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        client.execute(CELL.format(name=name))
        return kernel, client


def said(client, seconds=60, until=None):
    """What a kernel's cell prints until it ends, or says `until`; then whether it ended with an error."""
    text, deadline = "", time.monotonic() + seconds
    while True:
        assert time.monotonic() < deadline, f"the cell still runs: {text}"
        try:
            message = client.get_iopub_msg(timeout=1)
        except Exception:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            text += content["text"]
        if kind == "error":
            text += content["ename"]
        if (kind == "status" and content["execution_state"] == "idle" and text) or (until and until in text):
            return text


@pytest.fixture
def server(home, tmp_path):
    server = Server(tmp_path)
    yield server
    if server.process.poll() is None:
        server.process.terminate()
        server.process.wait(30)
    server.log.close()


@pytest.fixture
def long_run(make_config, request):
    """A run that is created, not begun; stopped afterwards."""
    run_dir = create_run(make_config(request.node.name[:60], "local", **LONG))
    yield run_dir
    end(run_dir)


def test_a_kernel_or_server_that_ends_leaves_the_run_alone(server, long_run):
    ways = {
        "restart": lambda kernel: server.ask("POST", f"kernels/{kernel}/restart"),
        "shut down": lambda kernel: server.ask("DELETE", f"kernels/{kernel}"),
        "end of the server": lambda kernel: server.process.terminate(),
    }
    for way, act in ways.items():
        kernel, client = server.begin(long_run.name)
        before = steps(long_run)
        wait_for(lambda: steps(long_run) > before)
        act(kernel)
        assert goes_on(long_run), way
        client.stop_channels()
    assert len(read_status(long_run)["attempts"]) == 1


def test_a_person_s_interrupt_stops_the_run_and_says_so(server, long_run):
    kernel, client = server.begin(long_run.name)
    wait_for(lambda: steps(long_run))
    server.ask("POST", f"kernels/{kernel}/interrupt")
    text = said(client)
    assert "interrupted" in text and "stopped (a STOP file" in text and f"resnet-nb train {long_run.name} goes on" in text
    assert read_status(long_run)["status"] == "stopped"


def test_a_second_interrupt_ends_the_cell_at_once(server, long_run):
    kernel, client = server.begin(long_run.name)
    wait_for(lambda: steps(long_run))
    server.ask("POST", f"kernels/{kernel}/interrupt")
    said(client, until="interrupted")
    began = time.monotonic()
    server.ask("POST", f"kernels/{kernel}/interrupt")
    assert "KeyboardInterrupt" in said(client, until="KeyboardInterrupt")
    assert time.monotonic() - began < 10
    wait_for(lambda: read_status(long_run)["status"] == "stopped")  # all the same


def test_plain_papermill_s_ctrl_c_leaves_the_run_alone_and_says_how_to_stop_it(long_run, tmp_path):
    import nbformat

    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(name=long_run.name))]), tmp_path / "in.ipynb")
    words = [str(BIN / "papermill"), "-k", "python3", str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb")]
    command = start(words, cwd=tmp_path)
    wait_for(lambda: steps(long_run))
    os.killpg(command.pid, signal.SIGINT)
    text, _ = command.communicate(timeout=60)
    assert command.returncode and f"resnet-nb stop {long_run.name} stops it" in text, text
    assert goes_on(long_run)
