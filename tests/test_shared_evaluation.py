"""An evaluation that several processes share: the same files to the last byte, and one sentence where a process, or a person, ends it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import wait_for

from resnet_nb.files import read_json

BIN = Path(sys.executable).parent
EVALUATE = [BIN / "resnet-nb", "evaluate", "--json", "--num-threads", "1", "--device", "cpu"]


def ranks_of(parent: int) -> list[int]:
    "Processes that share the work of `parent`."
    rows = subprocess.check_output(["ps", "-ww", "-e", "-o", "pid=,ppid=,args="], text=True).splitlines()
    return [int(pid) for pid, of, args in (row.split(None, 2) for row in rows) if int(of) == parent and "spawn_main" in args]


def alive(ranks: list[int]) -> set[int]:
    return {*ranks} & {*map(int, subprocess.check_output(["ps", "-e", "-o", "pid="], text=True).split())}


def all_gone(ranks: list[int], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while alive(ranks) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not alive(ranks)


def evaluated(run_dir: Path, *words) -> tuple[str, dict]:
    "sha256 of the predictions, and the numbers, after the command."
    said = subprocess.check_output([*EVALUATE, run_dir, *words], text=True)
    kept = read_json(run_dir / "evaluation.json")
    found = hashlib.sha256((run_dir / "predictions.parquet").read_bytes()).hexdigest()
    assert kept["predictions_sha256"] == found and kept == json.loads(said)
    return found, kept


def test_one_two_and_three_processes_write_the_same_bytes(one):
    alone = evaluated(one, "--split", "train")
    for devices in (2, 3):
        assert evaluated(one, "--split", "train", "--devices", str(devices)) == alone
    assert evaluated(one, "--split", "train", "--image-size", "40")[0] != alone[0]  # the control: other pixels


def hears(rank: int) -> bool:
    "Whether a process has begun its share: until then, while it imports torch, it is deaf to Ctrl-C."
    blocked = subprocess.check_output(["ps", "-o", "blocked=", "-p", str(rank)], text=True)
    return not int(blocked.strip().lstrip("<"), 16) >> (signal.SIGINT - 1) & 1


@pytest.fixture(scope="module")
def kept(one):
    "What is kept of an evaluation."
    evaluated(one)
    return one / "evaluation.json", one / "predictions.parquet"


@pytest.fixture
def under_way(one, kept):
    "An evaluation of two processes, once both of them are at work; and what was kept before it."
    before = {path: path.read_bytes() for path in kept}
    parent = subprocess.Popen(
        [*EVALUATE, one, "--devices", "2", "--image-size", "1024", "--split", "train"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: len(ranks_of(parent.pid)) == 2 or parent.poll() is not None, 200)
        ranks = ranks_of(parent.pid)
        wait_for(lambda: all(map(hears, ranks)), 200)
        begun = {rank: psutil.Process(rank).cpu_times().user for rank in ranks}
        wait_for(lambda: all(psutil.Process(rank).cpu_times().user > begun[rank] + 1 for rank in ranks), 200)
        assert len(ranks) == 2 and alive(ranks) == {*ranks}
        yield parent, ranks
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
    assert {path: path.read_bytes() for path in before} == before  # nothing half-written, nothing new


def ended(parent, ranks) -> tuple[int, str]:
    said = parent.communicate(timeout=120)
    assert all_gone(ranks)
    assert "Traceback" not in "".join(said), said
    return parent.returncode, said[1]


def test_a_killed_process_ends_the_others_with_one_sentence(under_way):
    parent, ranks = under_way
    os.kill(ranks[1], signal.SIGKILL)
    code, said = ended(parent, ranks)
    assert code and "of 2 was killed by SIGKILL" in said and "nothing was kept" in said


def test_ctrl_c_ends_all_of_them(under_way):
    parent, ranks = under_way
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    code, said = ended(parent, ranks)
    assert code and "killed" not in said


def test_none_is_left_behind_by_a_parent_that_was_killed(under_way):
    parent, ranks = under_way
    parent.kill()
    assert all_gone(ranks)
