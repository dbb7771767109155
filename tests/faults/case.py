"""A run of two ranks that something happens to: started by the command, seen from outside, and started again by the same command."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from conftest import SMALL, STEPS, tensors

from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import all_rows, code_facts, is_locked, read_status

COMMAND = str(Path(sys.executable).with_name("resnet-nb"))
TRAIN = Path(__file__).parents[2] / "nbs/train.ipynb"
SHORT = SMALL | {"epochs": 2, "image_sizes": [16, 24], "num_workers": 1}
LIMIT = 240  # s that a command may take; a hang is longer
ROLES = {  # words in the command line of a process
    "supervisor": "resnet_nb.run.launch",
    "torchrun": "torch.distributed.run",
    "rank": "resnet_nb.run.worker",
}


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank: not torchrun, whose command line names the worker, too, nor a data worker, which is a rank's child with its words."""
    trains = lambda words: ROLES["rank"] in words and ROLES["torchrun"] not in words
    return trains(process.cmdline()) and not trains(process.parent().cmdline() if process.parent() else [])


class Case:
    """One run in a home of its own, with what happened to it."""

    def __init__(self, home: Path, data: Path, name: str = "run", plain: bool = False, **overrides):
        self.home, self.name, self.command = home, name, None
        home.mkdir(parents=True, exist_ok=True)
        wish = {"overrides": SHORT | overrides, "data_dir": str(data), "recipe": "digits", "hw": "cpu2", "numerics": "exact"}
        page = [str(Path(COMMAND).with_name("papermill")), str(TRAIN), str(home / "plain.ipynb")]  # without our command around it
        self.words = [*(page if plain else [COMMAND, "train"]), "-r", "name", name, "-y", json.dumps(wish)]
        self.seen = {}  # what the table of faults shows

    @contextlib.contextmanager
    def recorded(self, kind: str, fault: str):
        """Append what was seen to the file $RESNET_NB_FAULTS, if it is set: a line of JSON for each fault."""
        self.seen |= {"kind": kind, "fault": fault, "held": False, "commit": code_facts()["git_commit"]}
        try:
            yield
            self.seen["held"] = True
        finally:
            if record := os.environ.get("RESNET_NB_FAULTS"):
                with open(record, "a", encoding="utf-8") as file:
                    file.write(json.dumps(self.seen, ensure_ascii=False) + "\n")

    @property
    def run_dir(self) -> Path:
        return self.home / "runs" / self.name

    def start(self, phase: str = "", prefix: tuple = (), env: dict | None = None, words: list | None = None) -> None:
        """Start the command; with a phase it waits there."""
        fault = {"folder": str(self.home)} | ({"phase": phase} if phase else {})
        inside = str(Path(__file__).with_name("inside"))
        path = os.pathsep.join(filter(None, [inside, os.environ.get("PYTHONPATH")]))
        env = os.environ | {"RESNET_NB_HOME": str(self.home), "PYTHONPATH": path, "RESNET_NB_FAULT": json.dumps(fault)} | (env or {})
        self.log = open(self.home / "command.log", "w+b")
        self.command = subprocess.Popen(
            [*prefix, *(words or self.words)], env=env, start_new_session=True, stdout=self.log, stderr=self.log
        )

    def said(self) -> str:
        return (self.home / "command.log").read_text(errors="replace")

    def wait_for(self, what, seconds: float = LIMIT) -> bool:
        until = time.monotonic() + seconds
        while not what():
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True

    def wait_here(self) -> None:
        """Until rank zero has come to the phase."""
        here = self.home / "here"
        assert self.wait_for(lambda: here.exists() or self.command.poll() is not None) and here.exists(), self.said()
        time.sleep(0.3)

    def go(self) -> None:
        (self.home / "go").touch()

    def processes(self) -> list[psutil.Process]:
        """All that belong to the run: those that name its folder, the command, the kernel, and their children."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            mine = process.pid == self.command.pid or str(self.run_dir) in " ".join(process.info["cmdline"] or [])
            try:
                for one in [process, *process.children(recursive=True)] if mine else []:
                    found[one.pid] = one
            except psutil.NoSuchProcess:
                continue
        return list(found.values())

    def process(self, role: str) -> psutil.Process:
        """The process of a role: command (papermill where there is no other), kernel, supervisor, torchrun, rank 0, rank 1, data worker (of rank 0)."""
        if role in ("command", "papermill"):
            return psutil.Process(self.command.pid)
        if role == "data worker":
            return next(child for child in self.process("rank 0").children() if child.status() != psutil.STATUS_ZOMBIE)
        word = {"kernel": "ipykernel_launcher"} | ROLES
        kind, _, rank = role.partition(" ")
        for process in self.processes():
            if kind == "rank" and is_rank(process) and process.environ().get("RANK") == rank:
                return process
            if kind != "rank" and word[kind] in process.cmdline():
                return process
        raise AssertionError(f"no {role} among {[' '.join(p.cmdline())[-90:] for p in self.processes()]}")

    def send(self, role: str, *numbers: signal.Signals) -> None:
        process = self.process(role)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.5)

    def end(self) -> int:
        """The command's exit code; the run may go on without it and is waited for, too."""
        known = self.processes()
        try:
            code = self.command.wait(LIMIT)
        except subprocess.TimeoutExpired:
            for process in known:
                process.kill()
            raise AssertionError(f"the command hangs after {LIMIT} s: {self.said()}") from None
        if self.run_dir.exists():
            assert self.wait_for(lambda: not is_locked(self.run_dir)), "the run does not end"
        known += [process for process in self.processes() if process not in known]
        left = psutil.wait_procs([process for process in known if process.pid != self.command.pid], timeout=5)[1]
        left = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
        words = [" ".join(process.cmdline())[-120:] for process in left]
        for process in left:
            process.kill()
        self.seen["left"] = len(left)
        assert not left, f"left behind after 5 s: {words}"
        return code

    def status(self) -> dict:
        return read_status(self.run_dir)

    def starts(self) -> list[int]:
        """The steps at which its attempts began."""
        return [row["step"] for row in all_rows(self.run_dir) if row.get("note") == "start"]

    def done_again(self) -> int:
        """Steps that were done more than once."""
        steps = [row["step"] for row in all_rows(self.run_dir) if row["event"] == "step"]
        return len(steps) - len(set(steps))

    def again(self, **how) -> int:
        """The exit code of the same command once more."""
        self.go()
        self.start(**how)
        return self.end()

    def completes(self, reference: Path) -> None:
        """Assert that the same command completes the run to the bits of an undisturbed one, with nothing lost beyond the last checkpoint."""
        kept = int(checkpoints(self.run_dir)[0].name.removeprefix("step-")) if checkpoints(self.run_dir) else 0
        fresh = self.status()["status"] != "completed"
        assert self.again() == 0, self.said()
        assert self.status()["status"] == "completed"
        assert not fresh or self.starts()[-1] == kept, "steps are lost that a checkpoint had"
        self.seen |= {"again": self.done_again(), "same": tensors(self.run_dir) == tensors(reference)}
        assert self.seen["same"], "other bits"
        assert self.seen["again"] <= STEPS, "more than an epoch was done again"


def undisturbed(home: Path, data: Path) -> Path:
    """Folder of a run that nothing happens to."""
    case = Case(home, data)
    assert case.again() == 0, case.said()
    return case.run_dir
