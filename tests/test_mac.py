"""A Mac, as far as a machine without one shows it: workers are spawned, memory is not pinned, images are contiguous, disks ignore case."""

import pickle
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from resnet_nb.data import datamodule as dm
from resnet_nb.data.datamodule import ImageNetDataModule, KeyedImages, make_loader
from resnet_nb.data.pack import pack
from resnet_nb.learn.module import ImageClassifier


def as_rows(data, target):
    target.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((data / split).rglob("*.png"))
        rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        table = pa.table({"image": rows, "label": [int(path.parent.name) for path in paths]})
        pq.write_table(table, target / f"{name}-00000-of-00001.parquet", row_group_size=10)
    return target


def as_pack(data, target):
    pack(data, target, 0, 90, "fail", lambda text: None)
    return target


@pytest.mark.parametrize("form", [lambda data, target: data, as_rows, as_pack], ids=["folders", "rows", "pack"])
def test_all_that_a_spawned_worker_needs_pickles_in_every_form_of_data(data, make_config, tmp_path, form):
    config = make_config("mac", data_dir=form(data, tmp_path / "form"), num_workers=1, devices=1)
    datamodule = ImageNetDataModule(config)
    datamodule.setup()
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=0, world_size=1)
    index = datamodule.train_index
    index.read(0)  # a file that was opened here does not travel
    loader = make_loader(KeyedImages(index, config, train=True), datamodule.train_sampler(), config, trainer)  # as a run makes it
    loader.multiprocessing_context = "spawn"  # what macOS does by itself
    here = make_loader(
        KeyedImages(index, config, train=True),
        datamodule.train_sampler(),
        config.model_copy(update={"hardware": config.hardware.model_copy(update={"num_workers": 0})}),
        None,
    )
    for batch, same in zip(loader, here, strict=True):
        assert all(part.equal(other) for part, other in zip(batch, same, strict=True))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(SimpleNamespace(f=lambda: 0).f)  # the control: what would not travel


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("mps", False), ("cuda", True)])
def test_memory_is_pinned_for_cuda_alone(data, make_config, monkeypatch, device, pinned):
    asked = []
    monkeypatch.setattr(dm, "KeyedLoader", lambda *given, pin_memory, **more: asked.append(pin_memory))
    config = make_config("pinned")
    datamodule = ImageNetDataModule(config)
    datamodule.setup()
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    make_loader(KeyedImages(datamodule.train_index, config, train=True), datamodule.train_sampler(), config, trainer)
    assert asked == [pinned]


def test_images_are_contiguous_unless_the_profile_says_otherwise(make_config):
    """Batches come channels last from the workers' buffers; MPS must get them contiguous, whose kernels were wrong otherwise."""
    batch = torch.zeros(2, 16, 16, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as the loader makes it
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()
    config = make_config("contiguous", "local", accelerator="cpu")
    for last in (False, True):
        changed = config.model_copy(update={"hardware": config.hardware.model_copy(update={"channels_last": last})})
        module, seen = ImageClassifier(changed, 4), []
        for layer in module.network.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d):
                layer.register_forward_pre_hook(lambda layer, given, seen=seen: seen.append(given[0].is_contiguous()))
        module(batch)
        assert all(seen) != last and len(seen) == 40  # the control: channels last is seen here
        assert all(weight.is_contiguous() for weight in module.network.parameters()) != last


NAMES = """
import collections, subprocess, sys
files = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True).stdout.split("\\0")
twice = [name for name, count in collections.Counter(name.casefold() for name in files).items() if count > 1]
sys.exit(f"the same name where case is ignored: {twice}" if twice else 0)
"""


def test_no_two_files_of_the_repository_have_the_same_name_where_case_is_ignored(tmp_path):
    assert subprocess.run([sys.executable, "-c", NAMES]).returncode == 0
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    for name in ("Readme", "README"):
        (tmp_path / name).touch()
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    assert subprocess.run([sys.executable, "-c", NAMES], cwd=tmp_path, stderr=subprocess.DEVNULL).returncode == 1  # the control
