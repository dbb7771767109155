"""What `exact` costs over `close`, and `close` over plain Lightning DDP: seconds per step, side by side, as ratios of medians.

    .venv/bin/python tests/bench/exact_cost.py DATA_DIR [ROUNDS]

Two CPU processes, resnet18, 96 px, four microbatches of 16 per rank and step, the same pictures for all. Plain DDP has torchvision's own BatchNorm and its
buffers broadcast as by default. Rounds take turns, so that a noisy machine is noisy for all.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from resnet_nb.config import Parameters
from resnet_nb.run.plan import resolve

KINDS, STEPS, WARMUP = ("plain", "close", "exact"), 8, 2


def rank(kind: str, run_dir: Path) -> None:
    """One rank: train STEPS steps and print the seconds of each after the first WARMUP."""
    import lightning as L
    import torch
    import torch.nn.functional as F
    import torchvision
    from lightning.pytorch.strategies import DDPStrategy

    from resnet_nb.data.datamodule import ImageNetDataModule
    from resnet_nb.learn.module import ResNetModule
    from resnet_nb.run import worker
    from resnet_nb.run.folder import load_config
    from resnet_nb.schedule import lr_at

    class Done(Exception):
        pass

    class Clock(L.Callback):
        def __init__(self):
            self.times = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                self.times.append(time.perf_counter())
                if len(self.times) > STEPS:
                    raise Done

    class Plain(L.LightningModule):
        def __init__(self, config, spe):
            super().__init__()
            self.network, self.recipe, self.spe = torchvision.models.resnet18(num_classes=10), config.recipe, spe
            self.register_buffer("mean", torch.tensor([123.7, 116.3, 103.5]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([58.4, 57.1, 57.4]).view(1, 3, 1, 1))

        def training_step(self, batch, batch_idx):
            logits = self.network((batch[0].float() - self.mean) / self.std)
            return F.cross_entropy(logits, batch[1], label_smoothing=self.recipe.label_smoothing)

        def configure_optimizers(self):
            r = self.recipe
            sgd = torch.optim.SGD(self.parameters(), lr=r.peak_lr, momentum=0.9, nesterov=True, weight_decay=r.weight_decay)
            schedule = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: lr_at(r, step, self.spe) / r.peak_lr)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    worker.quiet()
    config, clock = load_config(run_dir), Clock()
    worker.set_threads(config)
    data = ImageNetDataModule(config)
    data.setup()
    spe = data.train_sampler().steps_per_epoch
    if kind == "plain":
        module = Plain(config, spe)
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"), max_epochs=1, callbacks=[clock],
            accumulate_grad_batches=config.microbatches_per_rank, use_distributed_sampler=False, num_sanity_val_steps=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False,
        )  # fmt: skip
    else:
        module, trainer = ResNetModule(config, 10, spe), worker.make_trainer(config, run_dir, 1, 0)
        trainer.callbacks.append(clock)
    try:
        trainer.fit(module, datamodule=data)
    except Done:
        pass
    if trainer.is_global_zero:
        print("TIMES", json.dumps([b - a for a, b in zip(clock.times[WARMUP - 1 :], clock.times[WARMUP:])]), flush=True)
    os._exit(0)


def main(data_dir: str, rounds: int = 3) -> None:
    from resnet_nb.run.folder import create_run
    from resnet_nb.run.launch import command

    os.environ["RESNET_NB_HOME"] = tempfile.mkdtemp()
    seconds = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
            overrides = {"image_sizes": [96], "epochs": 2, "num_threads": 1}
            numerics = "close" if kind == "plain" else kind
            parameters = Parameters(
                hw="cpu2", recipe="imagenette", name=f"{kind}-{turn}", data_dir=data_dir, numerics=numerics, overrides=overrides
            )
            run_dir = create_run(resolve(parameters))
            words = command(run_dir, 2)
            words[words.index("-m", 3) :] = [__file__, "--rank", kind, str(run_dir)]
            ran = subprocess.run(words, capture_output=True, text=True, check=True)
            times = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("TIMES")).removeprefix("TIMES"))
            seconds[kind].append(median(times))
            print(f"round {turn + 1} {kind:<6} {seconds[kind][-1]:.3f} s per step", flush=True)
    of = {kind: median(values) for kind, values in seconds.items()}
    print(
        f"close / plain DDP: {of['close'] / of['plain']:.3f}   exact / close: {of['exact'] / of['close']:.3f}   (medians of {rounds} rounds of {STEPS} steps)"
    )


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1], *map(int, sys.argv[2:]))
