"""On one NVIDIA GPU: the same numbers as on a CPU, the same bits for one process and for two, and steps that wait for nothing."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import run_here, tensors

from resnet_nb.data.datamodule import ImageNetDataModule, KeyedImages, KeyedLoader
from resnet_nb.files import read_json
from resnet_nb.learn.module import EpochSums, ResNetModule
from resnet_nb.learn.numerics import GradientSum
from resnet_nb.run.folder import create_run, load_config, make_run_dir, read_rows, run_path
from resnet_nb.run.worker import make_trainer

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read once, when a process first multiplies; Lightning would set it for exact runs alone
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that torch can use")

SHORT = {"epochs": 2, "image_sizes": [16, 24], "precision": "32-true", "channels_last": False}
EXACT = {"numerics": "exact", "mixup_alpha": 0.2, "ema_decay": 0.9}


def steps(run_dir, name):
    return [row[name] for row in read_rows(run_dir, "step")]


def here(config, attempt=1):
    """Folder of the run, after an attempt in this process."""
    run_dir, outcome = run_here(config, attempt)
    assert outcome == ("stopped: a STOP file; saved at step 1" if (run_dir / "STOP").exists() else "completed")
    return run_dir


@pytest.fixture(scope="module")
def on_gpu(make_config):
    """on_gpu(name, **overrides): the run's configuration on one GPU."""

    def make(name, numerics="close", **more):
        return make_config(f"gpu-{name}", "cuda", numerics=numerics, **({"devices": 1} | SHORT | more))

    return make


@pytest.fixture(scope="module")
def on_cpu(make_config):
    """Folder of the same run on the CPU."""
    return here(make_config("gpu-not", "local", **SHORT))


@pytest.mark.parametrize(
    "name, how, near",
    [
        ("fp32", {}, 2e-3),  # cuDNN may use TF32
        ("bf16", {"precision": "bf16-mixed", "channels_last": True}, 3e-2),
        ("fp16", {"precision": "16-mixed", "channels_last": True}, 1e-2),
        ("compiled", {"precision": "bf16-mixed", "channels_last": True, "compile": True, "image_sizes": [16], "epochs": 1}, 3e-2),
    ],
)
def test_a_run_begins_where_the_cpu_begins(on_gpu, on_cpu, name, how, near):
    run_dir = here(on_gpu(name, **how))
    assert steps(run_dir, "train/step_loss")[0] == pytest.approx(steps(on_cpu, "train/step_loss")[0], rel=near)
    assert steps(run_dir, "digest") == steps(on_cpu, "digest")[: how.get("epochs", 2) * 4]
    assert all(row["val/seen"] == 23 for row in read_rows(run_dir, "val"))
    assert not [key for key in tensors(run_dir) if "_orig_mod" in key]
    assert ("compile_seconds" in read_rows(run_dir, "epoch")[0]) == ("compile" in how)


@pytest.fixture(scope="module")
def exact(on_gpu):
    """Folder of a finished exact run of one process."""
    return here(on_gpu("exact", **EXACT))


def test_exact_bits_survive_a_stop(on_gpu, exact):
    config = on_gpu("exact-stopped", **EXACT)
    make_run_dir(config.name)
    (stop := run_path(config.name) / "STOP").touch()
    run_dir = here(config)
    assert tensors(run_dir) != tensors(exact)
    stop.unlink()
    here(config, attempt=2)
    assert tensors(run_dir) == tensors(exact) and steps(run_dir, "digest") == steps(exact, "digest")


@pytest.mark.parametrize("numerics", ["exact", "close"])
def test_exact_bits_alone_do_not_depend_on_the_number_of_processes(on_gpu, exact, numerics):
    config = on_gpu(f"two-{numerics}", **EXACT | {"numerics": numerics, "devices": 2})
    run_dir = make_run_dir(config.name)
    create_run(config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "shared-gpu", "RESNET_NB_ATTEMPT": "1",
    }  # fmt: skip
    words = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(run_dir)]
    ranks = [subprocess.Popen(words, env=both | {"RANK": str(rank), "GROUP_RANK": str(rank)}) for rank in range(2)]
    for rank, process in enumerate(ranks):
        assert process.wait(timeout=120) == 0, (run_dir / "logs" / f"attempt-1-rank-{rank}.log").read_text()[-3000:]
    assert read_rows(run_dir, "note")[0]["world_size"] == 2
    assert steps(run_dir, "digest") == steps(exact, "digest")
    assert (tensors(run_dir) == tensors(exact)) == (numerics == "exact")


def test_sums_of_gradients_have_the_bits_of_the_cpu():
    torch.manual_seed(0)
    shapes = [(64, 3, 7, 7), (64,), (128, 64, 3, 3), ()]
    grads = [[torch.randn(shape) for shape in shapes] for _ in range(4)]

    def mean(device):
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        parameters[2].data = parameters[2].data.contiguous(memory_format=torch.channels_last)
        total = GradientSum(parameters, num_microbatches=4)
        for microbatch in grads:
            for parameter, grad in zip(parameters, microbatch):
                parameter.grad = grad.to(device).clone(memory_format=torch.preserve_format)
                if grad.dim() == 4:
                    parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
            total.add()
            assert not any(parameter.grad.any() for parameter in parameters)
        total.write_mean(lambda tensor: tensor)
        return [parameter.grad.cpu() for parameter in parameters]

    assert all(a.equal(b) for a, b in zip(mean("cuda"), mean("cpu")))
    assert not mean("cuda")[0].equal(sum(g[0] for g in grads).div(4))
    grads[1][2][5, 5, 1, 1] = float("nan")
    with pytest.raises(FloatingPointError, match="exact sums can't hold it"):
        mean("cuda")


def test_epoch_sums_are_those_of_the_cpu():
    torch.manual_seed(0)
    logits, targets = torch.randn(64, 10), torch.randint(-1, 10, (64,))

    def added(device, targets):
        sums = EpochSums(10)
        for _ in range(3):
            sums.update(torch.tensor(1.5, device=device), logits.to(device), targets.to(device))
        return sums.vector.cpu()

    assert added("cuda", targets).equal(added("cpu", targets))
    assert not added("cuda", targets).equal(added("cpu", targets.flip(0)))


class Enough(Exception):
    """Measured."""


class NoWaiting(L.Callback):
    """torch raises an error wherever the host waits for the GPU, from step `first` to step `last`."""

    def __init__(self, first, last, then=lambda module: None):
        self.first, self.last, self.then = first, last, then

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.first <= trainer.global_step < self.last:
            torch.cuda.set_sync_debug_mode("error")
            self.then(module)
        if trainer.global_step == self.last:
            raise Enough

    def on_exception(self, trainer, module, exception):
        torch.cuda.set_sync_debug_mode("default")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step >= self.last:
            torch.cuda.set_sync_debug_mode("default")


def waits(config, then=lambda module: None):
    run_dir = make_run_dir(config.name)
    create_run(config)
    data = ImageNetDataModule(config)
    data.setup()
    module = ResNetModule(config, 4, data.train_sampler().steps_per_epoch)
    trainer = make_trainer(config, run_dir, 1, 0)
    trainer.callbacks.insert(0, NoWaiting(12, 18, then))
    try:
        trainer.fit(module, datamodule=data)
    except Enough:
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "it ended too early"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_never_waits_for_the_gpu(on_gpu, precision):
    one = {"num_microbatches": 1, "microbatch_size": 4, "epochs": 1, "image_sizes": [32], "num_workers": 1, "precision": precision}
    assert waits(on_gpu(f"waits-{precision}", **one)) == ""


def test_a_step_that_waits_is_seen(on_gpu):
    one = {"num_microbatches": 1, "microbatch_size": 4, "epochs": 1, "image_sizes": [32]}
    assert "synchronizing" in waits(on_gpu("waits", **one), then=lambda module: module.network.fc.bias.sum().item())


def test_images_are_pinned(on_gpu, home):
    config = on_gpu("pinned")
    data = ImageNetDataModule(config)
    data.setup()
    for workers in (0, 1):
        loader = KeyedLoader(
            KeyedImages(data.train_index, config, train=True), data.train_sampler(), workers, room=6 * 16 * 16 * 3, pin_memory=True
        )
        assert next(iter(loader))[0].is_pinned()
    assert not next(iter(KeyedLoader(KeyedImages(data.train_index, config, train=True), data.train_sampler(), 0)))[0].is_pinned()


def test_the_run_says_which_device_it_had(exact):
    attempt = read_json(exact / "manifest.json")["attempts"][-1]
    assert attempt["devices"] == [torch.cuda.get_device_name()] and attempt["numerics_class"]["cudnn"]
    assert load_config(exact).hardware.accelerator == "cuda"
