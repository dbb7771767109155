"""Seconds from the command to the end of the first optimizer step: `resnet-nb train -p hw cpu2` on digits, beside a bare torchrun script.

    .venv/bin/python tests/bench/first_step.py [ROUNDS]

The bare script imports torch and lightning and takes one step of the same network on random pictures of the same size, in as many microbatches. What is between the two:
papermill and a kernel, the checks, the plots of the plan, the supervisor, the data, Lightning's trainer.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from resnet_nb.data.splits import make_digits
from resnet_nb.run.folder import read_rows

BARE = """
import torch, lightning, torchvision
import torch.nn.functional as F
torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
network = torch.nn.parallel.DistributedDataParallel(torchvision.models.resnet18(num_classes=10))
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
for microbatch in range(4):
    F.cross_entropy(network(torch.randn(24, 3, 16, 16)), torch.randint(10, (24,))).backward()
optimizer.step()
"""


def main(rounds: int = 3) -> None:
    home = Path(tempfile.mkdtemp())
    os.environ["RESNET_NB_HOME"] = str(home)
    make_digits(home / "data" / "digits")
    (home / "bare.py").write_text(BARE)
    seconds = {"bare torchrun": [], "resnet-nb train": []}
    for turn in range(rounds):
        started = time.perf_counter()
        bare = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(home / "bare.py")]
        subprocess.run(bare, check=True, capture_output=True)
        seconds["bare torchrun"].append(time.perf_counter() - started)

        name, started = f"round-{turn}", time.perf_counter()
        words = [
            Path(sys.executable).parent / "resnet-nb",
            "train",
            "-p",
            "hw",
            "cpu2",
            "-p",
            "name",
            name,
            "-y",
            "overrides: {epochs: 1, image_sizes: [16]}",
        ]
        ours = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        while not read_rows(home / "runs" / name, "step"):
            time.sleep(0.05)
        seconds["resnet-nb train"].append(time.perf_counter() - started)
        ours.wait()
    for name, values in seconds.items():
        print(f"{name:<16} median {median(values):5.1f} s of {', '.join(f'{v:.1f}' for v in values)}")
    print(f"ratio {median(seconds['resnet-nb train']) / median(seconds['bare torchrun']):.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
