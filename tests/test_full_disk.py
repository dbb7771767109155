"""A full disk: one sentence, exit code 5, a status that is true, nothing half there; and the run goes on when there is room."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import papermill
import pytest
from conftest import SMALL, losses, supervise_here, wait_for

from resnet_nb import cli
from resnet_nb.files import DiskFull, no_room, read_json
from resnet_nb.results import executed
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints, damage
from resnet_nb.run.folder import create_run, load_config, lock_run, read_rows, read_status, write_status

CHECKPOINT = 90  # MiB, more than one of a resnet18 with momentum takes


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """disk(MiB): a small disk, on which runs lie from then on."""
    folder = tmp_path / "a small disk"
    folder.mkdir()

    def mount(size):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        monkeypatch.setenv("RESNET_NB_HOME", str(folder))
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Another program's file, which takes all but `leave` bytes."""
    taken = folder / "ballast"
    with open(taken, "wb") as file:
        for _ in range(1000):  # the run may take a block between the question and the answer
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_blocks * 512 + free - leave)
                return taken
    pytest.fail(f"{folder} can't be filled")


def command(*words, data, **how):
    wish = json.dumps({"overrides": SMALL | {"accelerator": "cpu"}})
    words = [
        str(Path(sys.executable).with_name("resnet-nb")),
        "train",
        "-p",
        "recipe",
        "digits",
        "-r",
        "data_dir",
        str(data),
        "-y",
        wish,
        *words,
    ]
    return subprocess.run(words, capture_output=True, text=True, timeout=400, **how)


@pytest.mark.parametrize("hw", ["local", "cpu2"])
def test_room_for_three_checkpoints_is_needed_before_the_first_step(disk, make_config, hw):
    disk(2 * CHECKPOINT)
    with pytest.raises(
        launch.RunFailed, match="three checkpoints have no room: the disk is full: asked for were 255.9 MiB in .*, free are 1.* MiB"
    ) as failure:
        launch.train(make_config(f"little-{hw}", hw))
    assert failure.value.code == 5 and "\n" not in str(failure.value)
    run_dir = launch.run_path(f"little-{hw}")
    status = read_json(run_dir / "run.json")
    assert (status["status"], len(status["attempts"])) == ("failed", 1) and not read_rows(run_dir, "step")


@pytest.mark.parametrize("hw, leave", [("local", 2**20), ("cpu2", 2**20), ("local", 0)])
def test_a_disk_that_others_fill_ends_the_run_with_the_truth_and_it_goes_on_later(disk, make_config, one, two, hw, leave):
    folder, config = disk(4 * CHECKPOINT), make_config("filled", hw, num_workers=int(hw == "cpu2"))
    run_dir = launch.start(config)
    wait_for(lambda: checkpoints(run_dir), 200)
    ballast = fill(folder, leave)
    with pytest.raises(launch.RunFailed, match="the disk is full: asked for w.* in '.*', free are .*; make room") as failure:
        launch.follow(run_dir)
    assert failure.value.code == 5 and "\n" not in str(failure.value)
    status = read_json(run_dir / "run.json")
    assert (status["status"], len(status["attempts"])) == ("failed", 1) and "disk is full" in status["reason"]
    assert [damage(checkpoint) for checkpoint in checkpoints(run_dir)] == [""] * len(checkpoints(run_dir))
    assert not list(run_dir.glob("**/*.partial")) and not list(run_dir.glob("**/*.tmp"))
    ballast.unlink()
    launch.train(config)
    assert losses(run_dir) == losses(one if hw == "local" else two)


def test_the_command_ends_with_code_5_where_nothing_can_be_begun(disk, data):
    folder = disk(1)
    (folder / "runs").mkdir()
    fill(folder)
    done = command("-r", "name", "nothing", data=data)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "this run needs 0.3 GB for checkpoints, and there is 0 MB free; make room in" in done.stderr and "Traceback" not in done.stderr


FULL = """
import errno, sys
from resnet_nb.run import {module}, worker
usual, calls = {module}.{name}, []
def full(*args, **kwargs):
    calls.append(None)
    if len(calls) > {after}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return usual(*args, **kwargs)
{module}.{name} = full
sys.exit(worker.main(sys.argv[1]))
"""
PLACES = {
    "train.log": ("recording", "TextLoggingCallback._write", 1),
    "TensorBoard": ("worker", "TensorBoardLogger.log_metrics", 2),
    "model_info.txt": ("recording", "write_file", 0),
    "manifest.json": ("worker", "record_manifest", 0),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_told_from_wherever_it_is_met(make_config, tmp_path, monkeypatch, place):
    module, name, after = PLACES[place]
    (tmp_path / "full.py").write_text(FULL.format(module=module, name=name, after=after))
    config = make_config(f"full-{place.replace('.', '-')}", "local")
    run_dir = supervise_here(config, tmp_path / "full.py", monkeypatch=monkeypatch)
    status = read_status(run_dir)
    assert (status["status"], [attempt["kind"] for attempt in status["attempts"]]) == ("failed", ["DiskFull"])
    assert launch.failed(run_dir, status).code == 5 and "the disk is full" in str(launch.failed(run_dir, status))


def test_a_limit_on_the_size_of_files_is_told(data, home):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, 20 * 2**20))  # as `ulimit -f` in the shell
    done = command("-r", "name", "small-files", data=data, preexec_fn=limit)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "a file may not grow so large here: asked for were 8" in done.stderr and "ulimit -f" in done.stderr
    assert not list(launch.run_path("small-files").glob("**/*.partial"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_notebook_that_has_no_room_is_told_with_its_path():
    with pytest.raises(DiskFull, match="the disk is full: asked for was more in '/dev/full', free are .*; make room"):
        cli.execute(cli.notebook("explore.ipynb"), Path("/dev/full"), {})


@pytest.fixture
def train_without_room(monkeypatch):
    """A run's notebook, executed where papermill, which writes it before its kernel begins and then every 30 s, has no room for that."""

    def full(source, target, *args, **how):
        Path(target).write_text("")  # opened, and nothing written
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    return lambda run_dir: cli._train_in_notebook(load_config(run_dir), cli.notebook("train.ipynb"))


def test_a_run_is_not_begun_where_its_notebook_has_no_room(make_config, train_without_room):
    with pytest.raises(DiskFull, match="the disk is full: asked for was more in '.*train.ipynb', free are"):
        train_without_room(create_run(make_config("no-room", "local")))


@pytest.mark.parametrize("still_full", [False, True])
def test_a_run_whose_notebook_has_no_room_is_shown_to_its_end(make_config, train_without_room, capsys, monkeypatch, still_full):
    run_dir = create_run(make_config(f"room-later-{still_full}", "local"))
    lock = lock_run(run_dir)
    write_status(run_dir, status="running")

    def end():
        write_status(run_dir, status="completed", attempts=[{"attempt": 1}])
        lock.close()

    def full(path, content):
        raise no_room(path, len(content))

    threading.Timer(1, end).start()
    if still_full:
        monkeypatch.setattr(executed, "write_file", full)
        with pytest.raises(DiskFull, match="asked for was more in '.*train.ipynb'"):
            train_without_room(run_dir)
    else:
        train_without_room(run_dir)
    said = capsys.readouterr().err
    assert "the notebook has ended (DiskFull), and the run goes on; it is shown here" in said
    assert ("its notebook was completed from its folder" in said) != still_full
    assert ("is completed, after" in (run_dir / "train.ipynb").read_text()) != still_full
