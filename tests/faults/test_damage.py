"""What happens to the files of a stopped run, its pictures and its surroundings: the command says so, changes nothing it shouldn't, and completes the run."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
from case import Case, undisturbed
from conftest import tensors

from resnet_nb.files import read_json, write_json
from resnet_nb.run.checkpoints import STATE, checkpoints


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), data)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A run that was stopped in its second epoch, with checkpoints of steps 4 and 6."""
    case = Case(tmp_path_factory.mktemp("stopped"), data)
    case.start("step")
    case.wait_here()
    (case.run_dir / "STOP").touch()
    case.go()
    assert case.end() and case.status()["status"] == "stopped", case.said()
    assert [path.name for path in checkpoints(case.run_dir)] == ["step-00000006", "step-00000004"]
    return case


@pytest.fixture
def stopped(base, data, tmp_path):
    """A copy of that run, in a home of its own."""
    case = Case(tmp_path / "home", data)
    shutil.copytree(base.home / "runs", case.home / "runs")
    return case


def newest(run_dir: Path) -> Path:
    return checkpoints(run_dir)[0]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def hole(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(bytes(4096))


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def garbage_within(path: Path) -> None:
    whole = path.read_bytes()
    at = whole.index(b"\n", len(whole) // 2) + 1
    path.write_bytes(whole[:at] + bytes(range(128, 256)) + b"\n" + whole[at:])


def edited(path: Path) -> None:
    about = read_json(path)
    about["files"][STATE]["sha256"] = "0" * 64
    write_json(path, about)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch malicious",)


def malicious(run_dir: Path) -> None:
    "A checkpoint that is a program, with a manifest that fits it."
    state = newest(run_dir) / STATE
    state.write_bytes(pickle.dumps(Malicious()))
    about = read_json(state.with_name("MANIFEST.json"))
    about["files"][STATE] = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    write_json(state.with_name("MANIFEST.json"), about)


# to the files of the run: what is done, what is said of it; where the command can go on, it goes on from the newest checkpoint that is whole
HEALS = {
    "newest checkpoint cut short": (lambda run: cut(newest(run) / STATE), "is passed over: state.ckpt has"),
    "newest checkpoint with a flipped bit": (lambda run: flip(newest(run) / STATE), "is passed over: the sha256 of state.ckpt is not"),
    "newest checkpoint with a hole": (lambda run: hole(newest(run) / STATE), "is passed over: the sha256 of state.ckpt is not"),
    "newest checkpoint without its state": (lambda run: (newest(run) / STATE).unlink(), "is passed over: state.ckpt is missing"),
    "newest checkpoint without a manifest": (lambda run: (newest(run) / "MANIFEST.json").unlink(), "is passed over: its MANIFEST.json is missing"),
    "manifest of a checkpoint edited": (lambda run: edited(newest(run) / "MANIFEST.json"), "is passed over: the sha256 of state.ckpt is not"),
    "manifest of a checkpoint garbage": (lambda run: garbage(newest(run) / "MANIFEST.json"), "is passed over: its MANIFEST.json is missing or"),
    "a partial checkpoint left behind": (lambda run: shutil.copytree(newest(run), run / "checkpoints/.step-00000007.partial"), ""),
    "metrics.jsonl with its last line cut": (lambda run: os.truncate(run / "metrics.jsonl", (run / "metrics.jsonl").stat().st_size - 9), ""),
    "metrics.jsonl with garbage between its rows": (lambda run: garbage_within(run / "metrics.jsonl"), ""),
    "train.log garbage": (lambda run: garbage(run / "train.log"), ""),
    "metrics.json garbage": (lambda run: garbage(run / "metrics.json"), ""),
    "train.ipynb garbage": (lambda run: garbage(run / "train.ipynb"), ""),
    "a STOP file left behind": (lambda run: (run / "STOP").touch(), ""),
    "a lock file left behind": (lambda run: (run / "lock").write_text("process 1 on another-host since 2001-01-01"), ""),
    "BEST names a checkpoint that is gone": (lambda run: (run / "checkpoints/BEST").write_text("step-00000099\n"), ""),
}  # fmt: skip
EVERY = pytest.mark.every_fault


def some(cases, *telling):
    """As parameters; all but the telling ones are run by `make faults` alone."""
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=[] if name in telling else EVERY)
        for name, row in cases.items()
    ]


def logs(case):
    return case.said() + "".join(path.read_text(errors="replace") for path in (case.run_dir / "logs").glob("*.log"))


@pytest.mark.parametrize(
    "damage, words", some(HEALS, "newest checkpoint with a flipped bit", "metrics.jsonl with garbage between its rows")
)
def test_goes_on_from_what_is_whole(damage, words, stopped, reference, request):
    with stopped.recorded("files", request.node.callspec.id):
        damage(stopped.run_dir)
        code = stopped.again()
        assert code == 0, stopped.said()
        assert words in logs(stopped)
        assert stopped.starts()[-1] == (4 if "passed over" in words else 6)
        stopped.seen |= {"code": code, "status": stopped.status()["status"], "attempts": len(stopped.starts())}
        stopped.completes(reference)


REFUSED = {
    "all checkpoints damaged": (
        lambda run: [flip(path / STATE) for path in checkpoints(run)],
        3,
        "all 2 checkpoints of run 'run' are damaged",
    ),
    "config.json garbage": (lambda run: garbage(run / "config.json"), 3, "config.json"),
    "config.json cut short": (lambda run: cut(run / "config.json"), 3, "config.json"),
    "run.json garbage": (lambda run: garbage(run / "run.json"), 3, "run.json"),
    "manifest.json garbage": (lambda run: garbage(run / "manifest.json"), 3, "manifest.json"),
    "a checkpoint that is a program": (malicious, 3, "state.ckpt"),
}


@pytest.mark.parametrize("damage, code, words", some(REFUSED, "all checkpoints damaged", "a checkpoint that is a program"))
def test_says_what_is_damaged_and_completes_when_it_is_restored(damage, code, words, stopped, reference, tmp_path, request):
    with stopped.recorded("files", request.node.callspec.id):
        shutil.copytree(stopped.run_dir, tmp_path / "before")
        damage(stopped.run_dir)
        ended = stopped.again()
        stopped.seen |= {"code": ended, "status": "", "attempts": 0}
        assert not (Path.cwd() / "malicious").exists() and not (stopped.run_dir / "malicious").exists()
        assert ended == code and words in stopped.said(), stopped.said()
        assert "Traceback" not in stopped.said()
        shutil.rmtree(stopped.run_dir)
        shutil.copytree(tmp_path / "before", stopped.run_dir)
        stopped.completes(reference)


# to the pictures, between the stop and the same command, and while a run trains
def swap(train: Path) -> None:
    "Two pictures of one class change places, made as large as each other, so that no size tells."
    one, other = sorted((train / "0").iterdir())[:2]
    contents = one.read_bytes(), other.read_bytes()
    size = max(map(len, contents))
    one.write_bytes(contents[1].ljust(size, b"\0"))
    other.write_bytes(contents[0].ljust(size, b"\0"))


PICTURES = {
    "a picture removed": (lambda train: next((train / "0").iterdir()).unlink(), "was started on other data"),
    "a class renamed": (lambda train: (train / "0").rename(train / "9"), ""),
    "a picture cut short": (lambda train: cut(next((train / "0").iterdir())), "data must not change under a run"),
    "two pictures swapped": (swap, ""),
    "the folder removed": (lambda train: shutil.rmtree(train), ""),
}


@pytest.mark.parametrize("damage, words", some(PICTURES, "a picture removed"))
def test_pictures_that_change_between_stop_and_resume(damage, words, base, data, reference, tmp_path, request):
    own = shutil.copytree(data, tmp_path / "pictures")
    case = Case(tmp_path / "home", own)
    with case.recorded("pictures", request.node.callspec.id):
        case.start("step")
        case.wait_here()
        (case.run_dir / "STOP").touch()
        case.go()
        case.end()
        damage(own / "train")
        code = case.again()
        case.seen |= {"code": code, "status": case.status()["status"], "attempts": len(case.starts())}
        assert code in (2, 3) and words in case.said() and "Traceback" not in case.said(), case.said()
        shutil.rmtree(own)
        shutil.copytree(data, own)
        case.completes(reference)


@pytest.mark.parametrize(
    "damage, code", some({"a picture removed in training": (lambda path: path.unlink(), 3), "a picture cut short in training": (cut, 3)})
)
def test_pictures_that_change_in_training(damage, code, data, reference, tmp_path, request):
    own = shutil.copytree(data, tmp_path / "pictures")
    case = Case(tmp_path / "home", own)
    with case.recorded("pictures", request.node.callspec.id):
        case.start("data wait")
        case.wait_here()
        for path in (own / "train").glob("*/*"):
            damage(path)
        case.go()
        ended = case.end()
        case.seen |= {"code": ended, "status": case.status()["status"], "attempts": len(case.starts())}
        assert ended == code and "Traceback" not in case.said(), case.said()
        shutil.rmtree(own)
        shutil.copytree(data, own)
        case.completes(reference)


@EVERY
def test_pictures_that_are_swapped_in_training(data, reference, tmp_path):
    """Nothing but another run is right then: steps were made of both."""
    own = shutil.copytree(data, tmp_path / "pictures")
    for path in (own / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(2000, b"\0"))  # what follows a PNG's end is not read
    case, other = Case(tmp_path / "home", own), Case(tmp_path / "home", own, name="another")
    with case.recorded("pictures", "pictures swapped in training, of the same names and sizes"):
        case.start("data wait")
        case.wait_here()
        files = sorted((own / "train").rglob("*.png"))
        contents = [path.read_bytes() for path in files]
        for path, content in zip(files, contents[30:] + contents[:30], strict=True):
            path.write_bytes(content)
        case.go()
        code = case.end()
        case.seen |= {"code": code, "status": case.status()["status"], "attempts": len(case.starts()), "again": 0}
        assert code == 3 and "was trained on other pictures of the same names and sizes" in case.said(), case.said()
        for path, content in zip(files, contents, strict=True):
            path.write_bytes(content)
        assert case.again() == 3 and "choose another name" in case.said(), case.said()
        assert other.again() == 0, other.said()
        case.seen["same"] = tensors(other.run_dir) == tensors(reference)
        assert case.seen["same"]


# the system around it
SYSTEM = {
    "files may hold 40 MB at most": (["bash", "-c", 'ulimit -f 40000; exec "$@"', "-"], {5}, "raise the limit (ulimit -f)"),
    "40 open files at most": (["bash", "-c", 'ulimit -n 40; exec "$@"', "-"], {2}, "open files"),
    "3 GB of memory at most": (["bash", "-c", 'ulimit -v 3000000; exec "$@"', "-"], {0, 5}, ""),
    "no room in /dev/shm": (["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=4k none /dev/shm && exec "$@"', "-"], {0, 1, 2, 5}, ""),
}


@pytest.mark.parametrize("prefix, codes, words", some(SYSTEM, "files may hold 40 MB at most"))
def test_a_system_that_refuses(prefix, codes, words, reference, data, tmp_path, request):
    if prefix[0] == "unshare" and subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("no mount namespace can be made here")
    case = Case(tmp_path, data)
    with case.recorded("system", request.node.callspec.id):
        code = case.again(prefix=tuple(prefix))
        case.seen |= {"code": code, "status": case.status()["status"] if case.run_dir.exists() else "", "attempts": len(case.starts())}
        assert code in codes and words in case.said(), case.said()
        assert "Traceback" not in case.said()
        case.completes(reference)


@contextlib.contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FULL = {"in a step": "step", "in validation": "validation", "while a checkpoint is written": "checkpoint write"}


@pytest.mark.parametrize(
    "phase", some({f"the disk is full {when}": (phase,) for when, phase in FULL.items()}, "the disk is full while a checkpoint is written")
)
def test_a_full_disk(phase, reference, data, tmp_path, request):
    with small_disk(tmp_path / "disk") as disk:
        case = Case(disk, data)
        with case.recorded("system", request.node.callspec.id):
            case.start(phase)
            case.wait_here()
            filled = subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=64k"], capture_output=True)
            assert filled.returncode
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - 4096)  # room for the file that says go
            case.go()
            code = case.end()
            case.seen |= {"code": code, "status": case.status()["status"], "attempts": len(case.starts())}
            assert code == 5 and "disk" in case.said() and "Traceback" not in case.said(), case.said()
            assert case.seen["status"] == "failed"
            (disk / "filler").unlink()
            case.completes(reference)


@EVERY
@pytest.mark.parametrize("what", ["before it starts", "between stop and resume"])
def test_a_folder_that_can_only_be_read(what, base, reference, data, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        case = Case(tmp_path / "home", data)
        if what != "before it starts":
            shutil.copytree(base.home / "runs", disk / "runs")
        case.home = disk
        with case.recorded("system", f"the home can only be read {what}"):
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            ended = subprocess.run(case.words, env=os.environ | {"RESNET_NB_HOME": str(disk)}, capture_output=True, text=True)
            case.seen |= {"code": ended.returncode, "status": "", "attempts": 0, "left": 0}
            assert ended.returncode == 2 and str(disk) in ended.stderr and "Traceback" not in ended.stderr, ended
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            case.completes(reference)


@EVERY
@pytest.mark.parametrize("what", ["renamed", "copied"])
def test_the_folder_in_training(what, data, reference, tmp_path):
    case = Case(tmp_path / "home", data)
    with case.recorded("files", f"the run's folder {what} in training"):
        case.start("step")
        case.wait_here()
        other = case.home / "runs/other"
        (case.run_dir.rename if what == "renamed" else lambda to: shutil.copytree(case.run_dir, to))(other)
        case.go()
        code = case.end()
        case.seen |= {"code": code, "attempts": 1}
        if what == "renamed":
            assert code not in (0, 75) and "renamed" in case.said() and "Traceback" not in case.said(), case.said()
            shutil.rmtree(case.run_dir, ignore_errors=True)
            other.rename(case.run_dir)
        else:
            assert code == 0, case.said()
            copy = Case(case.home, data, name="other")
            assert copy.again() == 0 and tensors(other) == tensors(reference), copy.said()
        case.seen["status"] = case.status()["status"]
        case.completes(reference)


@EVERY
def test_the_clock_is_set_back(stopped, reference):
    with stopped.recorded("system", "the clock is set back by a day"):
        code = stopped.again(env={"RESNET_NB_FAULT": json.dumps({"clock": -86400.0})})
        stopped.seen |= {"code": code, "status": stopped.status()["status"], "attempts": len(stopped.starts())}
        assert code == 0, stopped.said()
        stopped.completes(reference)


@EVERY
def test_the_folder_moves_between_stop_and_resume(stopped, data, reference, tmp_path):
    moved = Case(tmp_path / "another home", data)
    with moved.recorded("files", "the run's folder moved to another home"):
        (stopped.home / "runs").rename(moved.home / "runs")
        code = moved.again()
        moved.seen |= {"code": code, "status": moved.status()["status"], "attempts": len(moved.starts())}
        assert code == 0, moved.said()
        moved.completes(reference)


def test_two_commands_at_once(data, reference, tmp_path):
    case = Case(tmp_path, data)
    with case.recorded("system", "the same command twice at once"):
        case.start("step")
        case.wait_here()
        other = subprocess.run(case.words, env=os.environ | {"RESNET_NB_HOME": str(case.home)}, capture_output=True, text=True)
        assert other.returncode and "is being written by" in other.stderr and "Traceback" not in other.stderr, other
        case.go()
        code = case.end()
        case.seen |= {"code": code, "status": case.status()["status"], "attempts": len(case.starts())}
        assert code == 0, case.said()
        case.completes(reference)


# names that a shell, a notebook, a browser or a figure might take for more than a name
RUNS = ["..", ".", "a/b", "$(touch x)", "a\nb", "-rf", "<img src=x onerror=alert(1)>", "'\"", "x" * 300]
CLASSES = [
    b"$x^{$",
    b"a b",
    b"'quoted\" ",
    b"$(touch x)",
    b"<img src=x onerror=alert(1)>",
    b"two\nlines",
    b"\xff\xfe",
    "Ελλ 数字 🐈".encode(),
]


@pytest.mark.parametrize(
    "name", [pytest.param(name, id=f"a run called {name[:30]!r}", marks=[] if name == "a/b" else EVERY) for name in RUNS]
)
def test_run_names(name, data, tmp_path, request):
    case = Case(tmp_path / "home", data)
    with case.recorded("names", request.node.callspec.id):
        words = [word if word != "run" else name for word in case.words]
        case.start(words=words)
        code = case.command.wait(100)
        case.seen |= {"code": code, "status": "", "attempts": 0}
        assert code == 2 and "Traceback" not in case.said() and "name" in case.said(), case.said()
        assert not list((tmp_path / "home").rglob("config.json")) and not list(tmp_path.rglob("x"))


HOSTILE = "it's $(touch x) <img src=x onerror=alert(1)> $x^{$ {name} %s [ab]* ?#&;:: \\t \"\n🐈"


def harmless(case, fault, reference):
    """A run among such names completes, and none of them was taken for a command."""
    with case.recorded("names", fault):
        code = case.again()
        case.seen |= {"code": code, "status": case.status()["status"], "attempts": len(case.starts())}
        assert code == 0 and "Traceback" not in case.said(), case.said()
        assert not list(case.home.parent.rglob("x")) and not Path("x").exists()
        case.completes(reference)


@EVERY
def test_folder_names(data, reference, tmp_path):
    own = shutil.copytree(data, tmp_path / f"pictures {HOSTILE}")
    harmless(Case(tmp_path / f"home {HOSTILE}", own), "home and pictures in folders with quotes, lines, formulas, tags", reference)


@EVERY
def test_file_names(data, reference, tmp_path):
    own = shutil.copytree(data, tmp_path / "pictures")
    names = [*CLASSES, HOSTILE.encode()]
    for number, path in enumerate(sorted((own / "train").rglob("*.png"))):  # behind what they were called, so that all keep their order
        path.rename(Path(os.fsdecode(bytes(path.with_suffix("")) + names[number % len(names)] + b".png")))
    harmless(Case(tmp_path / "home", own), "pictures with quotes, lines, formulas, tags, bytes in their names", reference)


@EVERY
def test_class_names(data, reference, tmp_path):
    own = tmp_path / "pictures"
    for split in ("train", "val"):
        for name, old in zip(CLASSES, sorted((data / split).iterdir()) * 2, strict=True):
            shutil.copytree(old, Path(os.fsdecode(bytes(own / split) + b"/" + name)))
    case = Case(tmp_path / "home", own)
    with case.recorded("names", "class names with quotes, lines, formulas, tags, bytes"):
        code = case.again()
        case.seen |= {"code": code, "status": case.status()["status"], "attempts": len(case.starts())}
        assert code == 0, case.said()
        assert tensors(case.run_dir) != tensors(reference)  # twice as many pictures
        assert not list(tmp_path.rglob("x")) and "<img src=x" not in (case.run_dir / "train.ipynb").read_text().replace("&lt;img", "")
