"""On one NVIDIA GPU: the tests of this folder, then what a run costs there, our loop beside a bare one, whole runs beside timm's train.py; a record more in a JSON file.

    .venv/bin/python tests/gpu/bench.py RECORDS.json [IMAGENETTE_DIR [TIMM_TRAIN_PY]]

ResNet-50, bf16, channels last, two microbatches of 128 pictures per step. Our loop and the bare one train on one batch that lies on the GPU, and take turns, some steps each.
Whole runs need pictures: IMAGENETTE_DIR, of which a pack is made.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from xml.etree import ElementTree

import lightning as L
import torch
import torch.nn.functional as F
import torchvision

from resnet_nb.config import MEAN, STD, Parameters
from resnet_nb.data.pack import pack
from resnet_nb.data.splits import make_digits
from resnet_nb.learn.module import ResNetModule
from resnet_nb.run import launch
from resnet_nb.run.folder import code_facts, create_run, environment_facts, make_run_dir, read_rows
from resnet_nb.run.plan import resolve
from resnet_nb.run.worker import make_trainer

SIZES, MICROBATCHES, BATCH, STEPS, TURNS, CLASSES = (128, 176, 224), 2, 128, 15, 4, 10
PACKAGES = ("torch", "torchvision", "lightning", "timm", "simplejpeg")
MADE = {"arch": "resnet50", "num_microbatches": MICROBATCHES, "microbatch_size": BATCH, "epochs": 3}


class Enough(Exception):
    """Measured."""


def bare(size, compiled):
    """STEPS optimizer steps at a time of a plain PyTorch loop, for ever."""
    torch.manual_seed(0)
    network = torchvision.models.resnet50(num_classes=CLASSES).cuda().to(memory_format=torch.channels_last).train()
    if compiled:
        network.compile(dynamic=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, targets = batch(size)
    mean, std = (255 * torch.tensor(values, device="cuda").view(1, 3, 1, 1) for values in (MEAN, STD))
    while True:
        for _ in range(STEPS):
            for _ in range(MICROBATCHES):
                with torch.autocast("cuda", torch.bfloat16):
                    logits = network((images.contiguous(memory_format=torch.channels_last).float() - mean) / std)
                    loss = F.cross_entropy(logits, targets, label_smoothing=0.1) / MICROBATCHES
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


def batch(size):
    images = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return images.cuda(), torch.randint(CLASSES, (BATCH,)).cuda()


class Resident(L.LightningDataModule):
    """One batch that lies on the GPU, again and again."""

    def __init__(self, config):
        super().__init__()
        self.size = config.recipe.image_sizes[0]

    def train_dataloader(self):
        images, targets = batch(self.size)
        return torch.utils.data.DataLoader(
            [[images, targets, torch.arange(BATCH), torch.zeros(1)]] * 1000 * MICROBATCHES, batch_size=None, collate_fn=lambda batch: batch
        )

    def train_sampler(self):
        return SimpleNamespace(places=[range(BATCH)])  # the one length that a compiled network meets

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class Turns(L.Callback):
    """STEPS steps of ours, then as many of the bare loop; both are timed, with nothing left to do on the GPU."""

    def __init__(self, other):
        self.other, self.seconds, self.since = other, [], 0.0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (batch_idx + 1) % (MICROBATCHES * STEPS):
            return
        torch.cuda.synchronize()
        middle = time.perf_counter()
        next(self.other, None)
        torch.cuda.synchronize()
        self.seconds.append((middle - self.since, time.perf_counter() - middle))
        if len(self.seconds) > TURNS + 1:
            raise Enough
        self.since = time.perf_counter()


def loop(size, other, numerics="close", compiled=False):
    """Images per second of our loop and of the `other` one, medians over turns, the first two left out; and the memory of ours, MiB."""
    wish = MADE | {"image_sizes": [size], "compile": compiled, "num_workers": 0, "devices": 1}
    config = resolve(Parameters(hw="cuda", recipe="digits", name=f"loop-{size}-{time.time_ns()}", numerics=numerics, overrides=wish))
    run_dir, turns = make_run_dir(config.name), Turns(other)
    create_run(config)
    torch.backends.cudnn.benchmark = numerics == "close"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    module, trainer = ResNetModule(config, CLASSES, 1000), make_trainer(config, run_dir, 1, 0)
    trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ not in ("GraphCallback",)] + [turns]
    try:
        trainer.fit(module, datamodule=Resident(config))
    except Enough:
        pass
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    pictures = STEPS * MICROBATCHES * BATCH
    ours, others = ([pictures / turn[which] for turn in turns.seconds[2:]] for which in (0, 1))
    return {"images_per_second": round(median(ours)), "other": round(median(others)), "ratio": round(median(a / b for a, b in zip(ours, others)), 3),
            "peak_MiB": torch.cuda.max_memory_allocated() // 2**20}  # fmt: skip


def whole(size, packed, **more):
    """A whole run on a pack: images per second of its last epoch's training, and the share of its time in which it waited for data."""
    name = f"whole-{size}-{time.time_ns()}"
    config = resolve(
        Parameters(
            hw="cuda", recipe="imagenette", name=name, data_dir=str(packed), overrides=MADE | {"image_sizes": [size], "devices": 1} | more
        )
    )
    run_dir = launch.train(config)
    last = read_rows(run_dir, "epoch")[-1]
    return {
        "images_per_second": last["pictures_per_second"],
        "data_wait": last["data_wait"],
        "workers": config.hardware.num_workers,
    }


def timm_run(script, pictures, size):
    """The same with timm's train.py: the same network, precision, crops and flips; images per second as it logs them itself, in the last epoch."""
    words = [sys.executable, script, "--data-dir", pictures, "--train-split", "train", "--val-split", "val", "--model", "resnet50", "--num-classes", str(CLASSES),
             "--img-size", str(size), "-b", str(MICROBATCHES * BATCH), "--epochs", "2", "--amp", "--amp-dtype", "bfloat16", "--channels-last", "-j",
             str(max(1, min(16, os.cpu_count() - 1))), "--color-jitter", "0", "--opt", "sgd", "--lr", "0.01", "--sched", "cosine", "--warmup-epochs", "0",
             "--output", tempfile.mkdtemp(), "--log-interval", "5"]  # fmt: skip
    ran = subprocess.run(words, capture_output=True, text=True)
    rates = re.findall(r"Train: 1 \[.*\([\d.]+s, +([\d.]+)/s\)", ran.stdout + ran.stderr)
    if ran.returncode or not rates:
        return {"error": (ran.stdout + ran.stderr)[-1500:]}
    return {"images_per_second": float(rates[-1])}


def tested():
    """How many tests of this folder passed and failed, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent), f"--junitxml={report}"])
        suite = ElementTree.parse(report).getroot()[0]
    bad = int(suite.get("failures")) + int(suite.get("errors"))
    return {"passed": int(suite.get("tests")) - bad - int(suite.get("skipped")), "failed": bad}


def main(records, pictures="", script=""):
    if not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use: nothing is tested or measured")
        return 0
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    before = json.loads(Path(records).read_text()) if Path(records).exists() else []
    versions = environment_facts()["packages"]
    found = {
        "gpu": torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "packages": {name: versions[name] for name in PACKAGES if name in versions},
        "commit": (code_facts()["git_commit"] or "no git")[:7] + " with changes" * bool(code_facts()["git_diff_sha256"]),
        "tests": tested(),
        "loops": {},
        "whole": {},
    }
    os.environ["RESNET_NB_HOME"] = tempfile.mkdtemp()
    make_digits(Path(os.environ["RESNET_NB_HOME"]) / "data" / "digits")

    def note(kind, name, numbers):
        found[kind][name] = numbers
        print(f"{kind:<6} {name:<16} {numbers}", flush=True)
        Path(records).write_text(json.dumps([*before, found], indent=1) + "\n")

    for size in SIZES:
        note("loops", f"close {size}", loop(size, bare(size, False)))
    note("loops", "exact 176", loop(176, bare(176, False), "exact"))
    if pictures:
        packed = pack(pictures, Path(tempfile.mkdtemp()) / "pack", short_side=0)
        note("whole", "ours 176", whole(176, packed))
        if script:
            note("whole", "timm 176", timm_run(script, pictures, 176))
    note("loops", "compiled 176", loop(176, bare(176, True), compiled=True))
    return 1 if found["tests"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
