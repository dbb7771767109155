"""Memory that is used up: what the run says, and with which code it ends."""

import re

import pytest
from conftest import supervise_here

from resnet_nb.run import launch
from resnet_nb.run.folder import read_status

PATCH = """
import os, resource, signal, sys
import torch
from resnet_nb.learn import module
from resnet_nb.run import worker
usual, calls = module.ResNetModule.training_step, []
def training_step(*args, **kwargs):
    calls.append(None)
    if len(calls) > 4 * 2:  # in the third step
        if sys.argv[2] == "limit":
            now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))  # as `ulimit -v` would; threads beside it have room
            torch.ones(2**28)
        if sys.argv[2] == "python":
            raise MemoryError
        if sys.argv[2] == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel would
    return usual(*args, **kwargs)
module.ResNetModule.training_step = training_step
sys.exit(worker.main(sys.argv[1]))
"""


@pytest.fixture
def ended(make_config, tmp_path, monkeypatch):
    """ended(how): a run after its memory was used up."""

    def run(how, name=""):
        (tmp_path / "patch.py").write_text(PATCH)
        return supervise_here(
            make_config(f"memory-{how}{name}", "local", num_workers=2), tmp_path / "patch.py", how, monkeypatch=monkeypatch
        )

    return run


@pytest.mark.parametrize("how", ["limit", "python", "cuda"])
def test_an_error_of_memory_names_the_remedies(ended, how):
    run_dir = ended(how)
    status = read_status(run_dir)
    assert (status["status"], [attempt["kind"] for attempt in status["attempts"]]) == ("failed", ["OutOfMemoryError"])
    failure = launch.failed(run_dir, status)
    assert failure.code == 5 and "\n" not in str(failure)
    more = r"let a process have more than \d+.\d GB \(ulimit -v\), " if how == "limit" else ""
    assert re.search(rf"memory is used up in epoch 1, with pictures of 16 px: {more}lower num_workers \(now 2 per rank\)", str(failure))
    assert "microbatch_size (now 6" in str(failure)


@pytest.mark.parametrize("counted", [1, 0, None])
def test_a_killed_rank_says_what_the_kernel_counts(ended, monkeypatch, counted):
    counts = iter([3, 3 + counted] * 2 if counted is not None else [None] * 4)
    monkeypatch.setattr(launch, "oom_kills", lambda: next(counts))
    run_dir = ended("kill", f"-{counted}")
    status = read_status(run_dir)
    failure = launch.failed(run_dir, status)
    assert status["status"] == "failed" and len(status["attempts"]) == 2  # the second came no further
    if counted:
        assert "memory was used up, and the kernel killed a rank: lower num_workers (now 2 per rank)" in str(failure) and failure.code == 5
    else:
        assert "a rank was killed by SIGKILL (exit code -9)" in str(failure) and failure.code == 1
        assert "starts it again (logs: " in str(failure) and "\n" not in str(failure)  # no traceback of torchrun
        assert ("the kernel did not do it for want of memory" in str(failure)) == (counted == 0)
