"""How a run is left: a notebook that is closed, a kernel or a server that ends, a command that is interrupted, a terminal that is closed."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SMALL
from jupyter_client import BlockingKernelClient

from resnet_nb import cli
from resnet_nb.files import read_json, write_json
from resnet_nb.run import launch
from resnet_nb.run.folder import all_rows, create_run, is_locked, read_rows, read_status, run_path

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


def wait_for(what, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def steps(run_dir):
    return max((row["step"] for row in all_rows(run_dir) if row["event"] == "step"), default=0)


def steps_on(run_dir):
    """Waits for another step of a run; whether there is one."""
    before = steps(run_dir)
    wait_for(lambda: steps(run_dir) > before or (before and not is_locked(run_dir)))
    return steps(run_dir) > before


def goes_on(run_dir):
    """Whether the run trains on, seconds after it was left."""
    time.sleep(4)
    return steps_on(run_dir) and not (run_dir / "STOP").exists() and read_status(run_dir)["status"] == "running"


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
        client.hb_channel.time_to_dead = 60  # a kernel that imports on a busy machine says nothing for longer than the usual second
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
        steps_on(long_run)
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
    text, _ = command.communicate(timeout=120)
    assert command.returncode and f"resnet-nb stop {long_run.name} stops it" in text, text
    assert goes_on(long_run)


def train(name, data, *more, epochs=900, **how):
    """The command that trains a small run."""
    wish = {"overrides": SMALL | {"accelerator": "cpu", "image_sizes": [16], "num_microbatches": 2, "epochs": epochs}}
    words = [BIN / "resnet-nb", "train", name, "-p", "recipe", "digits", "-r", "data_dir", data, "-y", json.dumps(wish), *more]
    return run_path(name), start(words, **how)


def epochs_done(run_dir):
    return len(read_rows(run_dir, "val"))


def executed(run_dir):
    """Marks, numbers and kinds of outputs of the cells of the run's notebook, by id."""
    cells = json.loads((run_dir / "train.ipynb").read_text())["cells"]
    return {
        cell["id"]: (cell["metadata"]["papermill"]["status"], cell["execution_count"], [kind for out in cell["outputs"] for kind in out.get("data", {"text": 0})])
        for cell in cells
        if cell["cell_type"] == "code"
    }  # fmt: skip


def processes_of(run_dir, *words):
    """Ids of living processes that name the run's folder and all of `words`."""
    found = subprocess.run(["ps", "-ww", "-e", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in found if str(run_dir) in line and all(word in line for word in words)]


def group(leader):
    """Ids of the living processes of a group."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(pid) for pid, pgid, state in map(str.split, found) if int(pgid) == leader and state[0] != "Z"]


def listens(pid):
    """Whether a process has taken over SIGTERM; where that can't be seen, seconds are waited."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        time.sleep(5)
        return True
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1


def kernel_of(command):
    """The kernel that executes a command's notebook."""
    found = subprocess.run(["ps", "-ww", "-e", "-o", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return next((int(line.split()[0]) for line in found if "ipykernel" in line and int(line.split()[1]) == command.pid), None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_with_a_checkpoint_and_the_command_says_75(number, data, home):
    run_dir, command = train(f"once-{number.name}", data)
    wait_for(lambda: epochs_done(run_dir) >= 2)
    os.kill(command.pid, number)
    text, _ = command.communicate(timeout=120)
    assert command.returncode == 75, text
    assert "Traceback" not in text and "stopping: the run saves" in text and f"resnet-nb train {run_dir.name} goes on" in text, text
    assert read_status(run_dir)["status"] == "stopped" and not processes_of(run_dir)
    assert max(run_dir.glob("checkpoints/step-*")).name == f"step-{steps(run_dir):08d}"
    told = executed(run_dir)
    assert told["train"][0] == "failed" and told["provenance"][0] == "pending" and "image/png" in told["plot-run"][2]
    assert "is stopped, after" in (run_dir / "train.ipynb").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_command_at_once_and_the_run_saves_by_itself(number, data, home):
    run_dir, command = train(f"twice-{number.name}", data)
    wait_for(lambda: steps(run_dir))
    kernel, began = kernel_of(command), time.monotonic()
    os.kill(command.pid, number)
    time.sleep(0.3)
    os.kill(command.pid, number)
    text, _ = command.communicate(timeout=20)
    assert command.returncode == 128 + number and time.monotonic() - began < 10, text
    assert "Traceback" not in text and "ZMQ" not in text, text
    wait_for(lambda: not is_locked(run_dir) and not Path(f"/proc/{kernel}").exists(), 60)
    assert read_status(run_dir)["status"] == "stopped" and list(run_dir.glob("checkpoints/step-*"))


def test_a_signal_before_the_run_begins_ends_all(data, home):
    run_dir, command = train("early", data)
    wait_for(lambda: (run_dir / "config.json").exists() and (run_dir / "train.ipynb").exists())
    os.kill(command.pid, signal.SIGTERM)
    text, _ = command.communicate(timeout=120)
    assert command.returncode in (143, 75) and "Traceback" not in text, text  # 75 where it had begun
    wait_for(lambda: not is_locked(run_dir) and not processes_of(run_dir), 5)


def test_a_wish_to_stop_while_a_run_begins_is_kept(make_config, monkeypatch):
    config, create = make_config("wished", "local", **LONG), launch.create_run

    def wished(given):
        made = create(given)
        launch.stop(run_path(given.name))
        return made

    monkeypatch.setattr(launch, "create_run", wished)
    run_dir = launch.start(config)
    wait_for(lambda: not is_locked(run_dir))
    assert read_status(run_dir)["status"] == "stopped" and 0 < steps(run_dir) < 9


def test_a_signal_while_the_kernel_is_forked_finds_it(home, monkeypatch, capfd):
    provisioner, forked = sys.modules["jupyter_client.provisioning.local_provisioner"], []
    begin = provisioner.launch_kernel

    def signalled(*given, **options):
        forked.append(begin(*given, **options))
        os.kill(os.getpid(), signal.SIGTERM)
        return forked[-1]

    monkeypatch.setattr(provisioner, "launch_kernel", signalled)
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    result = CliRunner().invoke(cli.main, ["train", "-p", "recipe", "digits", "-r", "name", "forked"])
    assert result.exit_code == 143 and "ended by SIGTERM" in result.stderr, result.output
    assert [kernel.returncode for kernel in forked] == [-signal.SIGKILL]  # before it found its sockets gone, and said so
    assert "Traceback" not in capfd.readouterr().err


def test_a_terminal_has_a_bar_and_if_closed_leaves_the_run_alone_and_its_notebook_is_completed(data, home):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    run_dir, command = train("hung-up", data, epochs=6, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=terminal)
    os.close(theirs)
    seen = b""
    while not (moved := re.search(r"[█▉▊▋▌▍▎▏] +epoch \d/6, step \d/8", seen.decode(errors="replace"))) and len(seen) < 100_000:
        try:
            seen += os.read(ours, 4096)
        except OSError:
            break
    assert moved, seen.decode()
    os.close(ours)
    wait_for(lambda: command.poll() is not None)
    assert read_status(run_dir)["status"] == "completed"
    assert {mark for mark, *_ in executed(run_dir).values()} == {"completed"} and "image/png" in executed(run_dir)["plot-run"][2]


def test_detached_returns_when_the_run_has_begun_and_its_notebook_is_completed(data, home):
    run_dir, command = train("detached", data, "--detach", epochs=6)
    text, _ = command.communicate(timeout=300)
    assert command.returncode == 0 and "resnet-nb follow detached shows it, resnet-nb stop detached stops it" in text, text
    assert is_locked(run_dir) and epochs_done(run_dir) < 6
    wait_for(lambda: "done: " in (run_dir / "logs" / "command.log").read_text())
    assert read_status(run_dir)["status"] == "completed" and "image/png" in executed(run_dir)["plot-run"][2]
    _, refused = train("detached-2", data, "--detach", "-p", "hw", "g6")
    assert "did you mean 'g5'?" in refused.communicate(timeout=120)[0] and refused.returncode == 2


def test_a_detached_command_asks_for_what_was_asked_for(data, home, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "_detached", lambda run_dir, given: asked.append([run_dir.name, *given]))
    wish = json.dumps({"overrides": SMALL | {"accelerator": "cpu"}})
    options = lambda seed: ["-y", wish, "-y", f"seed: {seed}", "-r", "data_dir", str(data), "-p", "recipe", "digits"]
    for name, seed in (("asked", 7), ("asked-too", 8)):
        done = CliRunner().invoke(cli.main, ["train", name, "--detach", *options(seed)])
        assert done.exit_code == 0, done.output
    assert asked == [["asked", *options(7)], ["asked-too", *options(8)]]


def test_a_killed_kernel_leaves_the_command_with_the_run_and_the_notebook_says_so(data, home):
    run_dir, command = train("kernel-killed", data, epochs=6)
    wait_for(lambda: epochs_done(run_dir))
    os.kill(kernel_of(command), signal.SIGKILL)
    text, _ = command.communicate(timeout=300)
    assert command.returncode == 0 and "the run goes on; it is shown here" in text and "epoch   6/6" in text, text
    assert "Traceback" not in text and "█" not in text  # a bar is for terminals
    told = executed(run_dir)
    assert told["train"][0] == "failed" and told["plot-run"][:2] == ("pending", None) and "image/png" in told["plot-run"][2]
    assert "is completed, after 6 of 6 epochs" in (run_dir / "train.ipynb").read_text()


def test_after_a_killed_command_plot_mends_the_notebook_and_train_makes_it_anew(data, home):
    run_dir, command = train("command-killed", data, epochs=6)
    wait_for(lambda: epochs_done(run_dir))
    command.kill()
    command.communicate()
    wait_for(lambda: not is_locked(run_dir))
    assert read_status(run_dir)["status"] == "completed" and executed(run_dir)["train"][0] == "running"
    done = subprocess.run([BIN / "resnet-nb", "plot", "command-killed"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = executed(run_dir)
    assert told["train"][0] == "failed" and told["provenance"][0] == "pending" and "image/png" in told["plot-run"][2]
    again = subprocess.run([BIN / "resnet-nb", "train", "command-killed"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and {mark for mark, *_ in executed(run_dir).values()} == {"completed"}
    assert len(read_status(run_dir)["attempts"]) == 1


@pytest.mark.parametrize("hw", ["local", "cpu2"])
def test_a_killed_supervisor_ends_no_training_and_the_next_command_mends_the_status(hw, make_config):
    config = make_config(f"no-supervisor-{hw}", hw, image_sizes=[16], epochs=8)
    run_dir = launch.start(config)
    wait_for(lambda: steps(run_dir))
    (supervisor,) = processes_of(run_dir, "resnet_nb.run.launch")
    os.kill(supervisor, signal.SIGKILL)
    assert steps_on(run_dir)
    wait_for(lambda: not is_locked(run_dir))
    written = run_dir / "run.json"
    assert read_status(run_dir)["status"] == "completed" and json.loads(written.read_text())["status"] == "running"
    launch.train(config)
    status = json.loads(written.read_text())
    assert (status["status"], [attempt["status"] for attempt in status["attempts"]]) == ("completed", ["completed"])


def test_two_runs_of_one_second_have_two_names(data, home):
    from datetime import datetime

    from resnet_nb.config import Parameters
    from resnet_nb.run.plan import resolve

    names = {resolve(Parameters(recipe="digits", data_dir=str(data)), datetime(2026, 1, 1)).name for _ in range(3)}
    assert len(names) == 3


def test_another_user_s_run_is_shown_and_nothing_in_its_folder_changes(one, tmp_path, monkeypatch):
    """Of a folder that can't be written; root obeys only without the capability that overrides it."""
    words = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if words and not shutil.which("setpriv"):
        pytest.skip("root may write everywhere, and there is no setpriv")
    run_dir = Path(shutil.copytree(one, tmp_path / "runs" / "theirs", ignore=shutil.ignore_patterns("checkpoints")))
    write_json(run_dir / "run.json", read_json(run_dir / "run.json") | {"status": "running"})  # something that could be mended
    (run_dir / "train.ipynb").write_text("{")
    (mine := tmp_path / "mine").mkdir()
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path))
    folders = [run_dir, *(path for path in run_dir.rglob("*") if path.is_dir())]
    try:
        for path in (*run_dir.rglob("*"), *folders):
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.stat().st_mtime_ns for path in (run_dir, *run_dir.rglob("*"))}
        for asked, says in ((["runs"], "theirs"), (["follow", "theirs"], "epoch   3/3"), (["plot", "theirs"], "theirs-curves.png")):
            done = subprocess.run([*words, BIN / "resnet-nb", *asked], cwd=mine, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and says in done.stdout, done.stdout + done.stderr
        assert before == {path: path.stat().st_mtime_ns for path in (run_dir, *run_dir.rglob("*"))}
        assert (mine / "theirs-curves.png").stat().st_size
    finally:
        for path in folders:
            path.chmod(0o755)


WRAPPED = [  # code after SIGINT to the whole group of processes, as a terminal sends it, when the command has been at work for some seconds
    ("check data DIR", 130, 0.5),
    ("predict NAME DIR/val --out TABLE", 130, 2),
    ("evaluate NAME", 130, 2),
    ("compare NAME NAME", 130, 2),
]


@pytest.mark.parametrize("command, code, seconds", WRAPPED)
def test_commands_that_wrap_others_end_with_one_sentence_and_nothing_half_written(command, code, seconds, one, home, tmp_path):
    names = {"NAME": one.name, "TABLE": tmp_path / "table.csv", "DIR/val": home / "all digits" / "val"}
    names["DIR"] = home / "all digits"
    shutil.rmtree(home / "data" / "cache", ignore_errors=True)  # no index yet, so that processes are at work
    before = {path for path in one.rglob("*") if path.name != "__pycache__"}
    ran = start([BIN / "resnet-nb", *(names.get(word, word) for word in command.split())])
    wait_for(lambda: listens(ran.pid))
    time.sleep(seconds)
    os.killpg(ran.pid, signal.SIGINT)
    text, _ = ran.communicate(timeout=120)
    assert ran.returncode == code and "Traceback" not in text and text.count("ended by SIGINT; nothing is half written") == 1, text
    assert not names["TABLE"].exists() and set(one.rglob("*")) == before
    wait_for(lambda: not group(ran.pid), 30)


@pytest.mark.parametrize("begun", ["the kernel", "a cell"])
def test_an_interrupt_leaves_no_kernel_that_would_speak_later(begun, one):
    ran, page = start([BIN / "resnet-nb", "evaluate", one.name]), one / ".evaluate.ipynb"
    wait_for(lambda: kernel_of(ran) if begun == "the kernel" else page.exists() and '"running"' in page.read_text())
    kernel = kernel_of(ran)
    os.killpg(ran.pid, signal.SIGINT)
    text, _ = ran.communicate(timeout=120)  # until the kernel, too, has let go of the pipe
    assert ran.returncode == 130 and "Traceback" not in text and text.endswith("\nended by SIGINT; nothing is half written\n"), text
    assert not Path(f"/proc/{kernel}").exists() and not page.exists()


# memory is collected at the end, where it might be at any time: it must not meet sockets that are open, whose context waits for them
IN_A_CHANNEL = """
import atexit, gc, os, signal, sys, zmq
from jupyter_client.channels import AsyncZMQSocketChannel as Channel

gc.disable()
atexit.register(gc.collect)
start = Channel.start
Channel.start = lambda channel: (start(channel), os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["resnet-nb", "evaluate", sys.argv[1]]
from resnet_nb.entry import main

main()
"""


def test_an_interrupt_while_a_client_connects_to_its_kernel_ends_the_command(one):
    ran = start([sys.executable, "-c", IN_A_CHANNEL, one.name])
    text, _ = ran.communicate(timeout=120)
    assert ran.returncode == 130 and text == "\nended by SIGINT; nothing is half written\n", text


def test_seeds_stop_with_a_checkpoint_and_the_same_command_goes_on(data, home):
    wish = json.dumps({"overrides": SMALL | {"accelerator": "cpu", "image_sizes": [16], "epochs": 900}})
    ran = start(
        [BIN / "resnet-nb", "seeds", "--count", "2", "-r", "name", "sd", "-p", "recipe", "digits", "-r", "data_dir", data, "-y", wish]
    )
    run_dir = run_path("sd-seed-0")
    wait_for(lambda: steps(run_dir))
    ran.terminate()
    text, _ = ran.communicate(timeout=120)
    assert ran.returncode == 75 and "Traceback" not in text and "the same command goes on" in text, text
    assert read_status(run_dir)["status"] == "stopped" and list(run_dir.glob("checkpoints/step-*"))
    assert not run_path("sd-seed-1").exists()
