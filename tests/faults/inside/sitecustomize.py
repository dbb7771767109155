"""Waits in the middle of a run, so that a fault can be brought about just there. Every Python process of a run finds this file through PYTHONPATH.

$RESNET_NB_FAULT is JSON: `phase`, where rank zero (or its data worker) waits once, in the first attempt; `folder`, in which it writes its process id
to `here` and waits for a file `go`; `clock`, seconds by which time.time is wrong.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

fault = json.loads(os.environ.get("RESNET_NB_FAULT", "{}"))
is_rank = "resnet_nb.run.worker" in sys.orig_argv and os.environ.get("RANK", "0") == "0"

# phase: module, class or nothing, function, and when; the second epoch is steps 5 to 8
PHASES = {
    "start-up": ("resnet_nb.data.datamodule", "ImageNetDataModule", "setup", lambda *args, **kwargs: True),
    "data wait": (
        "resnet_nb.data.datamodule",
        "KeyedImages",
        "__getitems__",
        lambda self, keys, *memory: self.train and keys[0].epoch == 1,
    ),
    "step": ("resnet_nb.learn.module", "ResNetModule", "training_step", lambda self, *args: self.trainer.global_step == 5),
    "validation": ("resnet_nb.learn.module", "ResNetModule", "validation_step", lambda self, *args: self.trainer.global_step == 8),
    "checkpoint write": ("resnet_nb.run.stopping", None, "commit_checkpoint", lambda run_dir, step, about: step == 8),
    "after its rename": (
        "resnet_nb.run.stopping",
        None,
        "rotate",
        lambda run_dir, *steps: (run_dir / "checkpoints/step-00000008").exists(),
    ),
}


def wait():
    folder = Path(fault["folder"])
    try:
        with open(folder / "here", "x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return
    until = time.monotonic() + 200
    while not (folder / "go").exists() and time.monotonic() < until:
        time.sleep(0.02)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module of the phase as it would be found anyhow, and changes its function after it was executed."""

    def find_spec(self, name, path=None, target=None):
        module, owner, function, when = PHASES[fault["phase"]]
        if name != module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(found):
            execute(found)
            holder = getattr(found, owner) if owner else found
            whole = getattr(holder, function)

            def call(*args, **kwargs):
                if when(*args, **kwargs):
                    wait()
                return whole(*args, **kwargs)

            setattr(holder, function, call)

        spec.loader.exec_module = exec_module
        return spec


if is_rank and "phase" in fault and os.environ.get("RESNET_NB_ATTEMPT") == "1":
    sys.meta_path.insert(0, Finder())
if "clock" in fault:
    right = time.time
    time.time = lambda: right() + fault["clock"]
