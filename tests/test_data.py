"""The input side as a whole: the same augmentation as torchvision's, the same run from every form of data, commands that look after pictures."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import trained_here
from PIL import Image
from torchvision import transforms as T

from resnet_nb.cli import main
from resnet_nb.data import datamodule, transforms
from resnet_nb.data.datamodule import ImageNetDataModule, KeyedImages, KeyedLoader, torch_resize
from resnet_nb.data.index import cache_dir, fingerprint
from resnet_nb.data.inspect import inspect_data
from resnet_nb.data.pack import pack
from resnet_nb.data.splits import index_data
from resnet_nb.data.transforms import decode, draw_crop, eval_picture, train_picture
from resnet_nb.files import read_json
from resnet_nb.run import plan
from resnet_nb.run.folder import read_rows
from resnet_nb.seed import seed_key

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def photo(width, height, seed=0, format="JPEG", **options):
    """Smooth colours with some grain, as a file."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (8, 10, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 5, (height, width, 3))
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file := io.BytesIO(), format, **options)
    return file.getvalue()


# --- the same augmentation as torchvision's ---------------------------------------------------------------------------


def furthest(one: np.ndarray, other: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest distance between two empirical distributions."""
    points = np.sort(np.concatenate([one, other]))
    share = lambda values: np.searchsorted(np.sort(values), points, side="right") / len(values)
    return np.abs(share(one) - share(other)).max()


def boxes_like(crops) -> dict[str, np.ndarray]:
    left, top, width, height = np.array(crops, float).T
    return {"area": width * height, "aspect": width / height, "left": left, "top": top, "right": left + width, "bottom": top + height}


@pytest.mark.parametrize("width, height", [(500, 375), (120, 900)])
def test_crops_are_distributed_as_torchvisions(width, height):
    count = 8000
    ours = boxes_like([draw_crop(seed_key(0, "augment", 0, i), width, height, SCALE, RATIO, 0.5)[:4] for i in range(count)])
    torch.manual_seed(0)
    drawn = [T.RandomResizedCrop.get_params(torch.empty(3, height, width), list(SCALE), list(RATIO)) for _ in range(count)]
    theirs = boxes_like([(left, top, w, h) for top, left, h, w in drawn])
    limit = 1.95 * (2 / count) ** 0.5  # a test at the 0.1 % level
    assert {name: furthest(ours[name], theirs[name]) for name in ours if furthest(ours[name], theirs[name]) > limit} == {}
    other = boxes_like([draw_crop(seed_key(0, "augment", 0, i), width, height, (0.12, 1.0), RATIO, 0.5)[:4] for i in range(count)])
    assert furthest(other["area"], theirs["area"]) > limit


def test_pixels_of_a_crop_are_torchvisions():
    image = Image.open(io.BytesIO(photo(300, 200)))
    crop = draw_crop(seed_key(1, 2), 300, 200, SCALE, RATIO, 1.0)
    theirs = T.functional.hflip(T.functional.resized_crop(image, crop.top, crop.left, crop.height, crop.width, [64, 64]))
    assert (train_picture(np.array(image), crop, 64) == np.asarray(theirs)).all()
    by_torch = train_picture(np.array(image), crop, 64, torch_resize).astype(int)
    assert np.abs(by_torch - np.asarray(theirs)).max() <= 1
    assert np.abs(train_picture(np.array(image), crop._replace(flip=False), 64, torch_resize).astype(int) - np.asarray(theirs)).max() > 1


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (224, 224), (90, 400)])
def test_validation_pictures_are_those_of_torchvisions_preset(size):
    data = photo(*size)
    preset = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])
    theirs = preset(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy()
    assert (eval_picture(decode(data), 224, 256 / 224) == theirs).all()
    assert (eval_picture(decode(data), 224, 1.0) != theirs).any()


def test_without_simplejpeg_pillow_decodes_the_same_pixels(monkeypatch):
    data = photo(90, 70, quality=90)
    fast = decode(data)
    assert transforms.jpeg_decoder().startswith("simplejpeg")
    monkeypatch.setattr(transforms, "simplejpeg", None)
    assert (decode(data) == fast).all() and transforms.jpeg_decoder().startswith("pillow")
    assert (decode(photo(90, 70, seed=1)) != fast).any()


def test_what_simplejpeg_refuses_is_measured_and_decoded_by_pillow(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("not by this decoder")

    data = photo(90, 70, quality=90)
    fast = decode(data)
    monkeypatch.setattr(transforms.simplejpeg, "decode_jpeg_header", refuse)
    assert transforms.read_size(data) == (90, 70) and (decode(data) == fast).all()
    assert transforms.read_size(data[:10]) == (1, 1)


# --- the same run from every form of data ------------------------------------------------------------------------------


def digests(run_dir):
    return [row["digest"] for row in read_rows(run_dir, "step")]


def test_a_run_on_a_pack_is_the_run_on_the_files(data, home, one, make_config):
    same = pack(data, home / "packed", short_side=0)
    packed = trained_here(make_config("from a pack".replace(" ", "-"), "local", data_dir=same))
    assert digests(packed) == digests(one)
    assert [row["val/loss"] for row in read_rows(packed, "val")] == [row["val/loss"] for row in read_rows(one, "val")]
    smaller = index_data(pack(data, home / "smaller", short_side=6))[0]
    assert fingerprint(smaller) != fingerprint(index_data(data)[0])


def test_bad_pictures_that_are_listed_are_left_out_and_named(data, home, make_config):
    damaged = shutil.copytree(data, home / "damaged")
    victim = sorted((damaged / "train" / "1").iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:40])
    name = f"1/{victim.name}"
    config = make_config("leaves-out", "local", data_dir=damaged, bad_pictures="skip-listed", epochs=1)
    with pytest.raises(ValueError, match="there is no check of this data as it is now; run resnet-nb check data"):
        plan.validate(config)
    inspect_data(damaged)
    with pytest.raises(ValueError, match=f"1 pictures can't be trained on, '{name}' for one"):
        plan.validate(make_config("fails", "local", data_dir=damaged))
    manifest = read_json(trained_here(config) / "manifest.json")
    assert manifest["data"]["train_pictures"] == 95
    assert manifest["attempts"][0]["inspection"]["left_out"] == {"train": [name], "val": []}
    assert len(manifest["attempts"][0]["inspection"]["content_sha256"]["train"]) == 64


# --- data workers ------------------------------------------------------------------------------------------------------


def equal(batches, others):
    return all(part.equal(same) for one, other in zip(batches, others, strict=True) for part, same in zip(one, other, strict=True))


@pytest.mark.parametrize("room", [6 * 16 * 16 * 3, 0])  # the pictures fit into the shared buffers, or travel by themselves
def test_spawned_data_workers_see_the_same_pictures(data, make_config, room):
    datamodule = ImageNetDataModule(make_config("spawned"))
    datamodule.setup()
    here = list(datamodule.train_dataloader())
    pictures, sampler = KeyedImages(datamodule.train_index, datamodule.config, train=True), datamodule.train_sampler()
    assert equal(KeyedLoader(pictures, sampler, 2, room, multiprocessing_context="spawn"), here)  # as on macOS
    assert not equal(KeyedLoader(pictures, sampler, 0), here[1:] + here[:1])


def test_a_data_worker_that_hangs_as_it_is_made_is_replaced(data, make_config, monkeypatch):
    hangs = torch.zeros(1, dtype=torch.int64).share_memory_()  # how many are still to hang

    def hang():
        if hangs[0] > 0:
            hangs[0] -= 1
            time.sleep(1000)

    os.register_at_fork(after_in_child=hang)  # for good, and harmless where none is to hang
    monkeypatch.setattr(datamodule, "START", 1.0)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # s that DataLoader waits for the end of a worker
    pictures = ImageNetDataModule(make_config("unused", hw="local", num_workers=2))
    pictures.setup()
    wanted = [targets.tolist() for _, targets, *_ in pictures.train_dataloader()]
    hangs[0], began = 1, time.monotonic()
    assert [targets.tolist() for _, targets, *_ in pictures.train_dataloader()] == wanted
    assert hangs[0] == 0 and time.monotonic() - began > 1
    hangs[0] = 6
    with pytest.raises(RuntimeError, match="data workers did not begin within 1 s, three times"):
        next(iter(pictures.train_dataloader()))
    assert not multiprocessing.active_children()


def test_too_little_shared_memory_is_one_clear_sentence(data, make_config, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    datamodule = ImageNetDataModule(make_config("crowded", num_workers=2))
    datamodule.setup()
    with pytest.raises(ValueError, match="num_workers=2 data workers need 0 MiB of shared memory, which can't be had; use fewer, or"):
        datamodule.train_dataloader()


# --- commands ----------------------------------------------------------------------------------------------------------


def said(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    return result.exit_code, result.output


def test_check_data_makes_a_page_and_has_an_exit_code(data, home):
    code, output = said("check", "data", data)
    assert code == 0 and "healthy" in output
    page = json.loads((cache_dir(data) / "check.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    copy = shutil.copytree(data, home / "to be damaged")
    next((copy / "val" / "0").iterdir()).write_bytes(b"")
    code, output = said("check", "data", copy, "--no-page")
    assert code == 1 and "PROBLEM val: 1 empty pictures" in output
    assert said("check", "data", home / "nothing here")[0] == 2


def test_a_pack_that_was_interrupted_goes_on(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "a").mkdir(parents=True)
        for i in range(300):
            (tmp_path / "photos" / split / "a" / f"{i}.jpg").write_bytes(photo(400, 300, seed=i % 3))
    command = [sys.executable, "-m", "resnet_nb.cli", "pack", str(tmp_path / "photos"), str(tmp_path / "pack"), "--size", "128"]
    code = "from resnet_nb.cli import main; main()"
    packing = subprocess.Popen([sys.executable, "-c", code, *command[3:]], start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert packing.stdout.readline().startswith("train-00000.arrow: 300 pictures")
    os.killpg(packing.pid, signal.SIGINT)
    assert packing.wait(60) != 0
    assert not [path.name for path in (tmp_path / "pack").iterdir() if path.name == "val-00000.arrow"]
    with pytest.raises(ValueError, match="is not finished; run the same resnet-nb pack command again"):
        index_data(tmp_path / "pack")
    written = (tmp_path / "pack" / "train-00000.arrow").stat().st_mtime_ns
    code, output = said(*command[3:])
    assert code == 0, output
    assert (tmp_path / "pack" / "train-00000.arrow").stat().st_mtime_ns == written
    assert [len(index) for index in index_data(tmp_path / "pack")] == [300, 300]


def test_a_full_disk_stops_a_pack_with_one_sentence(tmp_path, data):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    code = f"{limit}; from resnet_nb.cli import main; main(['pack', {str(data)!r}, {str(tmp_path / 'pack')!r}, '--size', '0'])"
    packing = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert packing.returncode == 2, packing.stderr
    assert "train-00000.arrow' can't be written" in packing.stderr and "Traceback" not in packing.stderr
    assert [path.name for path in (tmp_path / "pack").iterdir()] == ["pack.json"]
    pack(data, tmp_path / "pack", short_side=0)


# --- a kept index ------------------------------------------------------------------------------------------------------


def test_a_kept_index_is_dropped_when_the_data_changes(data, home):
    copy = shutil.copytree(data, home / "aged")
    for folder in (copy / "train", copy / "val", *copy.glob("*/*")):
        os.utime(folder, (time.time() - 60, time.time() - 60))
    train, _ = index_data(copy)
    (kept,) = cache_dir(copy).glob("index-*")
    written = (kept / "state.json").stat().st_mtime_ns
    assert fingerprint(index_data(copy)[0]) == fingerprint(train)
    assert (kept / "state.json").stat().st_mtime_ns == written  # not built again
    shutil.copy(copy / "train" / "0" / os.path.basename(train.where(0)), copy / "train" / "0" / "one more.png")
    assert len(index_data(copy)[0]) == len(train) + 1
