"""A rank or a data worker that hangs or was stopped, and processes whose parent is gone: the run goes on, and nobody is left."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import epochs_begun, losses, processes_of, ranks_of, wait_for

from resnet_nb.run import launch
from resnet_nb.run.folder import all_rows, create_run, hold_as_rank, lock_run, read_status, wake_supervisor, write_status

PATIENCE = 0.4  # minutes; ranks start within three times that, on a slow machine, too


def data_worker_of(rank: int) -> int:
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    return min(int(pid) for pid, parent in (line.split() for line in found) if int(parent) == rank)


def launchers_of(run_dir) -> list[int]:
    return [int(line.split()[0]) for line in processes_of(run_dir) if "torch.distributed.run" in line]


def second_epoch(config):
    run_dir = launch.start(config)
    wait_for(lambda: epochs_begun(run_dir) >= 2, 200)
    return run_dir


@pytest.mark.parametrize("what", ["rank", "data worker"])
def test_a_run_goes_on_when_something_of_it_was_stopped(make_config, two, what):
    run_dir = second_epoch(make_config(f"stopped-{what.replace(' ', '-')}", num_workers=1, hang_minutes=PATIENCE))
    rank = ranks_of(run_dir)[1]
    os.kill(rank if what == "rank" else data_worker_of(rank), signal.SIGSTOP)
    status = launch.follow(run_dir)
    assert [(attempt["status"], attempt.get("kind")) for attempt in status["attempts"]] == [("failed", "Hang"), ("completed", None)]
    assert "did not get" in status["attempts"][0]["reason"] and "hang_minutes" in status["attempts"][0]["reason"]
    if what == "rank":
        assert status["attempts"][0]["reason"].startswith("rank 1 did not get ")
    said = "".join(log.read_text() for log in (run_dir / "logs").glob("attempt-1-rank-*.log"))
    assert "Timeout (0:00:24)!" in said or "Timeout (0:01:12)!" in said  # the latter where an epoch's first microbatch was under way
    assert losses(run_dir) == losses(two)
    wait_for(lambda: not processes_of(run_dir), 5)


def test_a_dead_rank_beside_a_stopped_data_worker_holds_nobody(make_config, two):
    run_dir = second_epoch(make_config("dead-beside-stopped", num_workers=1))  # with the patience of every run
    first, second = ranks_of(run_dir)
    os.kill(data_worker_of(first), signal.SIGSTOP)
    os.kill(second, signal.SIGKILL)
    status = launch.follow(run_dir)
    assert [attempt["status"] for attempt in status["attempts"]] == ["failed", "completed"]
    assert losses(run_dir) == losses(two)
    wait_for(lambda: not processes_of(run_dir), 5)


@pytest.mark.parametrize("stopped", [False, True])
def test_ranks_of_a_killed_torchrun_are_gone_before_the_next_attempt(make_config, two, stopped):
    run_dir = second_epoch(make_config(f"torchrun-{stopped}", num_workers=1))
    if stopped:  # this one can't leave by itself
        os.kill(ranks_of(run_dir)[1], signal.SIGSTOP)
    before = set(ranks_of(run_dir))
    os.kill(killed := launchers_of(run_dir)[0], signal.SIGKILL)
    wait_for(lambda: {*launchers_of(run_dir)} - {killed} or not processes_of(run_dir))  # it may still be listed for a moment
    assert not before & set(ranks_of(run_dir))
    status = launch.follow(run_dir)
    assert [attempt["status"] for attempt in status["attempts"]] == ["failed", "completed"]
    assert "torchrun was killed" in status["attempts"][0]["reason"]
    attempts = [row["attempt"] for row in all_rows(run_dir)]
    assert attempts == sorted(attempts) and losses(run_dir) == losses(two)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sends a signal at a parent's end")
@pytest.mark.parametrize("when", ["start", "steps, one stopped"])
def test_nobody_is_left_where_supervisor_and_torchrun_are_killed(make_config, when):
    run_dir = launch.start(make_config(f"orphans-{when[:5]}", epochs=40, image_sizes=[32]))
    wait_for(lambda: epochs_begun(run_dir) >= 1 if when != "start" else ranks_of(run_dir), 200)
    if when != "start":
        os.kill(ranks_of(run_dir)[1], signal.SIGSTOP)
    for line in processes_of(run_dir):
        if "resnet_nb.run.launch" in line or "torch.distributed.run" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    wait_for(lambda: not processes_of(run_dir), 5 if when == "start" else 15)
    wait_for(lambda: not launch.is_locked(run_dir), 5)  # the threads of one that was killed may hold it for a moment more


def test_a_killed_supervisor_ends_no_training_and_the_next_command_tells_the_truth(make_config, one):
    config = make_config("no-supervisor", "local")
    run_dir = second_epoch(config)
    for line in processes_of(run_dir):
        if "resnet_nb.run.launch" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    wait_for(lambda: not launch.is_locked(run_dir))
    assert read_status(run_dir)["status"] == "completed" and losses(run_dir) == losses(one)
    assert launch.train(config) == run_dir


SUPERVISOR = """
import signal, sys, time
from pathlib import Path
from resnet_nb.run.folder import sign_lock, write_status
sign_lock(int(sys.argv[3]))
signal.signal(signal.SIGCONT, lambda *_: (write_status(Path(sys.argv[2]), status="completed"), sys.exit()))
print("ready", flush=True)
for _ in range(600):
    time.sleep(0.1)
"""


def stopped_supervisor(run_dir, module="resnet_nb.run.launch"):
    """A process that holds the run's lock, and was stopped when it only had to write how the run ended."""
    with lock_run(run_dir) as lock:
        words = [sys.executable, "-c", SUPERVISOR, module, str(run_dir), str(lock.fileno())]
        process = subprocess.Popen(words, pass_fds=[lock.fileno()], stdout=subprocess.PIPE)
        process.stdout.readline()
        write_status(run_dir, status="running")
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, 10)
    return process


def test_a_supervisor_that_was_stopped_holds_nobody_after_its_ranks_have_ended(make_config):
    run_dir, said = create_run(make_config("stopped-supervisor")), []
    supervisor = stopped_supervisor(run_dir)
    with hold_as_rank(run_dir):  # it has somebody to wait for
        assert not wake_supervisor(run_dir)
    assert launch.observe(run_dir, said.append)["status"] == "completed"
    assert len(said) == 1 and "its supervisor had been stopped" in said[0] and supervisor.wait(10) == 0
    supervisor = stopped_supervisor(run_dir)
    lock_run(run_dir).close()  # of who trains the run again
    assert supervisor.wait(10) == 0
    wait_for(lambda: not launch.is_locked(run_dir), 5)
    stranger = stopped_supervisor(run_dir, "another.module")
    assert not wake_supervisor(run_dir) and launch.is_locked(run_dir)
    stranger.kill()
    stranger.wait()
