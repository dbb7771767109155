"""Small data and whole runs, shared by the tests: every run here is real processes, started as a person would start them."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from resnet_nb.config import Parameters
from resnet_nb.data.splits import make_digits
from resnet_nb.files import read_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoint_path, checkpoints
from resnet_nb.run.folder import all_rows, create_run, lock_run, make_run_dir, read_rows
from resnet_nb.run.plan import resolve

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that puts pytest in the background has it ignored, by children too

# resnet18 on 96 + 23 digits: 23 validation pictures share out evenly over neither 2 ranks nor batches of 6
SMALL = {
    "epochs": 3, "image_sizes": [16, 24, 32], "num_microbatches": 4, "microbatch_size": 6, "peak_lr": 0.01, "num_workers": 0, "num_threads": 1,
    "hang_minutes": 3.0,  # a run that hangs is found while the tests still have time
}  # fmt: skip
STEPS = 4  # optimizer steps in an epoch of SMALL
NUM_VAL = 23

# files that take minutes, the longest first
SLOW = [
    "printed_commands", "exact", "leaving", "damage", "finetune", "stop", "full_disk", "signals", "nodes", "lab", "watchdogs", "commands", "spot",
]  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """A slow file that begins last keeps one process busy while the others have nothing left; xdist keeps this order with --no-loadscope-reorder."""
    names = {item: item.path.stem.removeprefix("test_") for item in items}
    items.sort(key=lambda item: SLOW.index(names[item]) if names[item] in SLOW else len(SLOW))


def small_data(folder: Path) -> Path:
    """96 training and 23 validation digits of 4 classes, below `folder`."""
    digits = folder / "all digits"
    make_digits(digits)
    for split, count in (("train", 96), ("val", NUM_VAL)):
        for label in range(4):
            target = folder / "small" / split / str(label)
            target.mkdir(parents=True)
            for path in sorted((digits / split / str(label)).iterdir())[: count // 4 + (label < count % 4)]:
                shutil.copy(path, target)
    return folder / "small"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder of runs/ and data/ for this session; its path has a space."""
    folder = tmp_path_factory.mktemp("a home")
    patch = pytest.MonkeyPatch()
    patch.setenv("RESNET_NB_HOME", str(folder))
    yield folder
    patch.undo()


@pytest.fixture(scope="module", autouse=True)
def room(tmp_path_factory):
    """A module's runs go with it, as they would fill a small disk: each holds 86 MB a checkpoint. Those that modules share stay."""
    yield
    for run in tmp_path_factory.getbasetemp().glob("a home*/runs/*/"):
        if run.name not in ("one", "two"):
            shutil.rmtree(run)


@pytest.fixture(scope="session")
def data(home):
    """Folder of the small data."""
    return small_data(home)


@pytest.fixture(scope="session")
def make_config(data):
    """config(name, hw=..., seed=..., **overrides): a small run."""

    def make(name, hw="cpu2", seed=0, data_dir=None, numerics="close", **overrides):
        wish = SMALL | ({"accelerator": "cpu"} if hw == "local" else {}) | overrides
        given = {"name": name, "hw": hw, "recipe": "digits", "data_dir": str(data_dir or data)}
        return resolve(Parameters(seed=seed, numerics=numerics, overrides=wish, **given))

    return make


def wait_for(what, seconds=90):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def epochs_begun(run_dir):
    return sum(row.get("note") == "epoch" for row in all_rows(run_dir))


def losses(run_dir):
    return [(row["step"], row["train/step_loss"]) for row in read_rows(run_dir, "step")]


def tensors(run_dir, step=None):
    """sha256 of every weight, statistic and momentum, at the end or after a step, by name."""
    path = checkpoint_path(run_dir, step) if step else checkpoints(run_dir)[0]
    return read_json(path / "MANIFEST.json")["tensors"]


def processes_of(run_dir):
    """Command lines of living processes that name the run's folder, the oldest first."""
    found = subprocess.run(["ps", "-ww", "-e", "-o", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if str(run_dir) in line and "resnet_nb" in line]


def ranks_of(run_dir):
    """Process ids of living ranks, each a leader of its session; data workers are not."""
    found = subprocess.run(["ps", "-ww", "-e", "-o", "pid,sess,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line.split(maxsplit=2) for line in found if f"-m resnet_nb.run.worker {run_dir}" in line and "torch.distributed" not in line]
    return [int(pid) for pid, session, _ in lines if pid == session]


def supervised(config) -> Path:
    """Folder of a run after it was supervised in this process, whose signals are as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run_dir = create_run(config)
    with lock_run(run_dir) as lock:
        launch.supervise(run_dir, lock.fileno())
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return run_dir


def supervise_here(config, script: Path, *words, monkeypatch):
    """A run under a supervisor in this process, its ranks run by `script`, a patch of the worker; returns the folder."""
    usual = launch.command

    def command(run_dir, world_size, private, **how):
        whole = usual(run_dir, world_size, private, **how)
        return [*whole[:-3], str(script), str(run_dir), *map(str, words)]  # -m resnet_nb.run.worker RUN_DIR

    monkeypatch.setattr(launch, "command", command)
    return supervised(config)


def run_here(config, attempt: int = 1) -> tuple[Path, str]:
    """Folder of a run after an attempt in this process, which has torch already, and how it ended; signals, variables and threads are as before."""
    import torch

    from resnet_nb.run.worker import run_rank

    run_dir, threads = make_run_dir(config.name), torch.get_num_threads()
    create_run(config)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with launch.variables():
            return run_dir, run_rank(run_dir, attempt)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        for number, handler in handlers.items():
            signal.signal(number, handler)


def trained_here(config) -> Path:
    """Folder of a run after it was trained in this process: its records and checkpoints, without what a supervisor and the ranks' own processes write."""
    run_dir, outcome = run_here(config)
    assert outcome == "completed"
    return run_dir


@pytest.fixture(scope="session")
def one(make_config):
    """Folder of a finished run of one process."""
    return launch.train(make_config("one", "local"))


@pytest.fixture(scope="session")
def two(make_config):
    """Folder of a finished run of two processes."""
    return launch.train(make_config("two", num_workers=1))
