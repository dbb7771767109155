"""Signals to every process of a run, in every phase: what the command says and ends with, what is left, and that the same command completes the run."""

from signal import SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
from case import Case, tensors, undisturbed

# phase, process, signals | exit code of the command | status of the run then | attempts that it took by itself
SIGNALS = [
    ("start-up", "rank 1", [SIGKILL], 1, "failed"),
    ("start-up", "torchrun", [SIGKILL], 1, "failed"),
    ("start-up", "supervisor", [SIGKILL], 0, "completed"),
    ("start-up", "command", [SIGINT], 75, "stopped"),
    ("start-up", "command", [SIGTERM], 75, "stopped"),
    ("data wait", "data worker", [SIGKILL], 0, "completed"),
    ("data wait", "data worker", [SIGSTOP], 0, "completed"),
    ("data wait", "data worker", [SIGTERM], 0, "completed"),
    ("data wait", "rank 0", [SIGTERM], 75, "stopped"),
    ("data wait", "command", [SIGKILL], -SIGKILL, "completed"),
    ("step", "rank 0", [SIGKILL], 0, "completed"),
    ("step", "rank 0", [SIGSTOP], 0, "completed"),
    ("step", "rank 0", [SIGINT], 75, "stopped"),
    ("step", "rank 0", [SIGHUP], 0, "completed"),
    ("step", "rank 1", [SIGKILL], 0, "completed"),
    ("step", "rank 1", [SIGSTOP], 0, "completed"),
    ("step", "rank 1", [SIGTERM], 75, "stopped"),
    ("step", "torchrun", [SIGTERM], 75, "stopped"),
    ("step", "torchrun", [SIGKILL], 0, "completed"),
    ("step", "torchrun", [SIGSTOP], 0, "completed"),
    ("step", "torchrun", [SIGHUP], 0, "completed"),
    ("step", "supervisor", [SIGTERM], 75, "stopped"),
    ("step", "supervisor", [SIGHUP], 0, "completed"),
    ("step", "supervisor", [SIGKILL], 0, "completed"),
    ("step", "supervisor", [SIGINT], 75, "stopped"),
    ("step", "supervisor", [SIGSTOP], 0, "completed"),
    ("step", "kernel", [SIGKILL], 0, "completed"),
    ("step", "kernel", [SIGTERM], 0, "completed"),
    ("step", "command", [SIGINT], 75, "stopped"),
    ("step", "command", [SIGINT, SIGINT], 130, "stopped"),
    ("step", "command", [SIGTERM], 75, "stopped"),
    ("step", "command", [SIGHUP], 0, "completed"),
    ("step", "command", [SIGKILL], -SIGKILL, "completed"),
    ("step", "papermill", [SIGINT], 1, "completed"),
    ("step", "papermill", [SIGTERM], -SIGTERM, "completed"),
    ("step", "papermill", [SIGKILL], -SIGKILL, "completed"),
    ("validation", "rank 0", [SIGKILL], 0, "completed"),
    ("validation", "rank 1", [SIGTERM], 0, "completed"),
    ("validation", "torchrun", [SIGKILL], 0, "completed"),
    ("validation", "command", [SIGTERM], 0, "completed"),
    ("checkpoint write", "rank 0", [SIGKILL], 0, "completed"),
    ("checkpoint write", "rank 0", [SIGSTOP], 0, "completed"),
    ("checkpoint write", "rank 1", [SIGKILL], 0, "completed"),
    ("checkpoint write", "torchrun", [SIGKILL], 0, "completed"),
    ("checkpoint write", "command", [SIGINT], 0, "completed"),
    ("after its rename", "rank 0", [SIGKILL], 0, "completed"),
    ("after its rename", "supervisor", [SIGKILL], 0, "completed"),
]
# run by `make test`, one of each kind; `make faults` runs all
TELLING = [
    ("start-up", "torchrun", SIGKILL), ("data wait", "data worker", SIGSTOP), ("step", "rank 1", SIGKILL), ("step", "torchrun", SIGKILL),
    ("step", "kernel", SIGKILL), ("checkpoint write", "rank 0", SIGKILL),
]  # fmt: skip


def name_of(phase, role, signals):
    return f"{phase}: {role} gets {' twice, '.join([signals[0].name]) + (' twice' if len(signals) > 1 else '')}"


CASES = [
    pytest.param(*row, id=name_of(*row[:3]), marks=[] if (*row[:2], row[2][0]) in TELLING else pytest.mark.every_fault) for row in SIGNALS
]


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("undisturbed"), data)


@pytest.mark.parametrize("phase, role, signals, code, status", CASES)
def test_signal(phase, role, signals, code, status, reference, data, tmp_path):
    patience = {"hang_minutes": 0.5} if SIGSTOP in signals else {}  # until a watchdog finds it
    case = Case(tmp_path, data, plain=role == "papermill", **patience)
    with case.recorded("signal", name_of(phase, role, signals)):
        case.start(phase)
        case.wait_here()
        case.send(role, *signals)
        case.go()
        ended = case.end()
        case.seen |= {"code": ended, "status": case.status()["status"], "attempts": len(case.starts())}
        assert ended == code, case.said()
        assert case.seen["status"] == status, case.said()
        assert status != "stopped" or not case.done_again()
        assert "Traceback" not in case.said() or role == "papermill"  # its own
        case.completes(reference)


def test_another_learning_rate_gives_other_bits(reference, data, tmp_path):
    """The control: what is compared differs where the run differs."""
    other = Case(tmp_path, data, peak_lr=0.02)
    assert other.again() == 0
    assert tensors(other.run_dir) != tensors(reference)
