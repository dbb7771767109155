"""The stream is held to a record: what is drawn, and the pixels that come of it, change only together with STREAM_VERSION.

`python tests/test_stream.py` writes golden_stream.json, or adds the pixels of this machine to it; what is recorded it never replaces,
unless STREAM_VERSION was raised. In pictures/ are gradients and noise, encoded once: another encoder would write other bytes.
"""

import io
import json
from functools import partial
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
import torchvision
from PIL import Image

from resnet_nb.config import Recipe
from resnet_nb.data import splits, transforms
from resnet_nb.data.datamodule import KeyedImages
from resnet_nb.data.sampler import MicrobatchSampler, SampleKey, epoch_order
from resnet_nb.data.transforms import decode, draw_changes, draw_crop, eval_picture, jpeg_decoder
from resnet_nb.learn.module import ResNetModule, mixing, seed_draws
from resnet_nb.seed import AUGMENT, INIT, MICROBATCH, STREAM_VERSION, permutation, seed_key, torch_seed, uniform

RECORD = Path(__file__).with_name("golden_stream.json")
RECIPE = Recipe(
    dataset="digits", arch="resnet18", epochs=2, image_sizes=(24, 48), val_resize=8 / 7, num_microbatches=4, microbatch_size=6, peak_lr=0.1,
    crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5,
)  # fmt: skip


def short(value: object) -> str:
    """A short hash of bytes, or of plain numbers and words as Python writes them."""
    return blake2b(value if isinstance(value, bytes) else repr(value).encode(), digest_size=8).hexdigest()


# --- what is drawn: the same with every library ------------------------------------------------------------------------


def microbatches(seed, views=1):
    found = []
    for rank in range(2):
        sampler = MicrobatchSampler(100, 4, 6, seed, lambda epoch: 24 + 8 * epoch, rank, 2, views)
        for step in (0, 5, 7):  # whole epochs 0 and 1, and what step 7 of the run leaves of epoch 1
            sampler.seek(step)
            found.append([[tuple(key) for key in microbatch] for microbatch in sampler])
    return found


def crops(seed):
    """Of pictures in many shapes, one of which no attempt fits, by three recipes."""
    shapes = ((500, 375), (64, 64), (90, 400), (1000, 1))
    recipes = (((0.08, 1.0), (3 / 4, 4 / 3), 0.5), ((0.85, 1.0), (0.9, 1.1), 0.0), ((0.25, 0.25), (1.0, 1.0), 1.0))
    keys = [seed_key(seed, AUGMENT, epoch, index) for epoch in (0, 1, 59) for index in (*range(20), 1_281_166)]
    return [tuple(draw_crop(key, *shape, *recipe)) for key in keys for shape in shapes for recipe in recipes]


def changes(seed):
    """Of pictures at two sizes, under every field that changes them."""
    fields = ({"rand_augment": 2}, {"trivial_augment": True}, {"color_jitter": 0.4}, {"random_erasing": 0.5})
    recipes = [RECIPE.model_copy(update=one) for one in fields]
    return [draw_changes(seed, epoch, i, size, recipe) for recipe in recipes for epoch in (0, 59) for i in range(20) for size in SIZES]


def validation_digits() -> list[int]:
    return sorted(permutation(seed_key(0, splits.DIGITS), 1797)[:360].tolist())


def drawn(seeds=(0, 1), recipe=RECIPE) -> dict[str, str]:
    microbatch = [(MICROBATCH, step, number) for step in (0, 1, 99_999) for number in (0, 1, 7)]
    found = {
        "orders": [epoch_order(count, seed, epoch).tolist() for seed in seeds for count in (10, 1437) for epoch in (0, 1, 59)],
        "microbatches": [microbatches(seed) for seed in seeds],
        "views": [microbatches(seed, views=3) for seed in seeds],
        "crops": [crops(seed) for seed in seeds],
        "changes": [changes(seed) for seed in seeds],
        "digests of training pictures": [[digests for _, digests in training(seed, recipe)] for seed in seeds],
        "seeds of microbatches": [torch_seed(seed, *words) for seed in seeds for words in microbatch],
        "seeds of initial weights": [torch_seed(seed, INIT) for seed in seeds],
        "validation digits": validation_digits(),
    }
    return {name: short(value) for name, value in found.items()}


# --- pixels: the same with one decoder, one torch, one instruction set -------------------------------------------------


y, x = np.mgrid[:120, :85]
Image.fromarray(np.stack([x * 3, y * 2, x * y // 7 % 256], -1).astype(np.uint8)).save(written := io.BytesIO(), "PNG")
FILES = {path.name: path.read_bytes() for path in sorted(RECORD.with_name("pictures").glob("*.jpg"))}
FILES["drawn.png"] = written.getvalue()  # whoever writes a PNG, its pixels are the same
INDEX = SimpleNamespace(read=list(FILES.values()).__getitem__, where=list(FILES).__getitem__, labels=range(len(FILES)))
EPOCHS, SIZES = range(6), (24, 48)


def training(seed, recipe=RECIPE):
    """For each size all pictures in all epochs, as a data worker makes them, and their digests."""
    pictures = KeyedImages(INDEX, SimpleNamespace(seed=seed, recipe=recipe), train=True)
    for size in SIZES:
        images, _, digests, _ = pictures.__getitems__([SampleKey(epoch, i, size) for epoch in EPOCHS for i in range(len(FILES))])
        yield images, digests.tolist()


def mixed(seed, **alphas) -> bytes:
    """What mixup and CutMix make of the same eight pictures in six microbatches."""
    images, targets, found = (torch.arange(8 * 3 * 16 * 16) % 251).view(8, 3, 16, 16).byte(), torch.arange(8) % 5, b""
    for step, microbatch in ((0, 0), (0, 1), (1, 0), (1, 1), (99_999, 0), (99_999, 7)):
        seed_draws(torch_seed(seed, MICROBATCH, step, microbatch), torch.device("cpu"))
        for part in mixing(RECIPE.model_copy(update=alphas), 5)(images, targets):
            found += part.numpy().tobytes()
    return found


def pixels(seed=0, recipe=RECIPE) -> dict[str, str]:
    kinds = {"mixup": {"mixup_alpha": 0.2}, "CutMix": {"cutmix_alpha": 1.0}, "either": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}}
    found = {name: mixed(seed, **alphas) for name, alphas in kinds.items()}
    batches = [images for images, _ in training(seed, recipe)]
    judged = KeyedImages(INDEX, SimpleNamespace(seed=seed, recipe=recipe), train=False)
    for i, name in enumerate(FILES):
        found[f"training {name}"] = b"".join(images[i :: len(FILES)].numpy().tobytes() for images in batches)
        found[f"validation {name}"] = b"".join(judged.__getitems__([SampleKey(0, i, size)])[0].numpy().tobytes() for size in SIZES)
    return {name: short(value) for name, value in found.items()}


def combination() -> str:
    libraries = f"{jpeg_decoder()}, pillow {PIL.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{libraries}, {torch.backends.cpu.get_cpu_capability()}"


# --- the record --------------------------------------------------------------------------------------------------------

RECORDED = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"stream_version": 0, "drawn": {}, "pixels": {}}
AGAIN = "record again: python tests/test_stream.py"


def unlike(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    return sorted(name for name in recorded | found if recorded.get(name) != found.get(name))


def complaint(recorded: dict[str, str], found: dict[str, str]) -> str:
    """What to do where `found` is not what was recorded; empty where it is."""
    names = ", ".join(unlike(recorded, found))
    rule = f"raise STREAM_VERSION in nbs/01_seed.ipynb, note it in CHANGELOG.md, and {AGAIN}"
    return names and f"{names}: not what is recorded for stream version {STREAM_VERSION}; if this is meant, {rule}"


def updated(record: dict, version: int, drawn: dict[str, str], combination: str, pixels: dict[str, str]) -> dict:
    """The record with what it lacked; SystemExit where it says something else of the same version."""
    if record["stream_version"] != version:
        record = {"drawn": {}, "pixels": {}}
    for recorded, found in ((record["drawn"], drawn), (record["pixels"].get(combination, {}), pixels)):
        if text := complaint(recorded, {name: found.get(name, digest) for name, digest in recorded.items()}):
            raise SystemExit(text)
    return {"stream_version": version, "drawn": drawn, "pixels": record["pixels"] | {combination: pixels}}


def test_what_is_drawn_is_what_was_recorded():
    assert RECORDED["stream_version"] == STREAM_VERSION, f"STREAM_VERSION is {STREAM_VERSION}; {AGAIN}"
    text = complaint(RECORDED["drawn"], drawn())
    assert not text, text


def test_pixels_are_those_recorded_for_this_decoder_and_torch():
    if RECORDED["stream_version"] != STREAM_VERSION or combination() not in RECORDED["pixels"]:
        pytest.skip(f"no pixels of stream version {STREAM_VERSION} are recorded for {combination()}; to add them, {AGAIN}")
    text = complaint(RECORDED["pixels"][combination()], pixels())
    assert not text, text


def test_another_seed_draws_everything_anew_except_which_digits_are_for_validation():
    one = drawn(seeds=(0, 1))
    assert unlike(one, drawn(seeds=(2, 3))) == sorted(one.keys() - {"validation digits"})
    assert unlike(one, drawn(seeds=(0, 1))) == []


TRAINING, VALIDATION = ([f"{split} {name}" for name in sorted(FILES)] for split in ("training", "validation"))


def test_another_seed_or_crop_scale_changes_training_and_leaves_validation():
    other = RECIPE.model_copy(update={"crop_scale": (0.09, 1.0)})
    assert unlike(pixels(), pixels()) == []
    assert unlike(pixels(), pixels(seed=1)) == sorted([*TRAINING, "mixup", "CutMix", "either"])
    assert unlike(pixels(), pixels(recipe=other)) == TRAINING
    assert unlike(drawn(), drawn(recipe=other)) == ["digests of training pictures"]


@pytest.mark.skipif(transforms.simplejpeg is None, reason="pillow decodes in one way only")
@pytest.mark.parametrize("way", ["fast", "halve"])
def test_training_decodes_jpeg_fast_and_at_half_size_where_that_is_enough(monkeypatch, way):
    recorded = pixels()
    monkeypatch.setattr(transforms, "decode", lambda data, **how: decode(data, **how | {way: False}))
    assert unlike(recorded, pixels()) == [name for name in TRAINING if name.endswith(".jpg")]


def test_training_seeds_a_microbatch_by_its_step_and_its_number_in_the_global_batch():
    def stop(*_):
        raise InterruptedError(torch.initial_seed())

    config = SimpleNamespace(microbatches_per_rank=2, seed=7)
    rank = SimpleNamespace(config=config, global_rank=1, global_step=5, device=torch.device("cpu"), mix=stop)
    rank.mixed = partial(ResNetModule.mixed, rank)
    with pytest.raises(InterruptedError) as seeded:
        ResNetModule.training_step(rank, (None, None, torch.zeros(2), torch.zeros(1)), 9)  # the second of two microbatches of rank 1
    assert seeded.value.args[0] == torch_seed(7, MICROBATCH, 5, 3) != torch_seed(7, MICROBATCH, 5, 1)


def test_the_digits_for_validation_are_the_first_of_their_permutation(tmp_path):
    splits.make_digits(tmp_path / "digits")
    train, val = (sorted(int(path.stem) for path in tmp_path.glob(f"digits/{split}/*/*")) for split in ("train", "val"))
    assert val == validation_digits() != list(range(360)) and sorted(train + val) == list(range(1797))


# --- the rule: what is drawn changes with STREAM_VERSION, or not at all ------------------------------------------------

BROKEN = {
    "data.sampler.permutation": (lambda key, n: permutation(key, n)[::-1], ["microbatches", "orders", "views"]),
    "data.transforms.uniform": (lambda key, n: uniform(key, n + 1)[1:], ["changes", "crops", "digests of training pictures", *TRAINING]),
    "data.transforms.AUGMENT": ("augmentation", ["digests of training pictures", *TRAINING]),
    "data.splits.DIGITS": ("figures", ["validation digits"]),
    "seed.seed_key": (lambda seed, *words: seed_key(-seed - 1, *words), ["CutMix", "either", "mixup", "seeds of initial weights", "seeds of microbatches"]),
    "data.datamodule.torch_resize": (transforms.resize, TRAINING),
    "data.transforms.eval_picture": (lambda *picture: eval_picture(*picture)[:, ::-1], VALIDATION),
}  # fmt: skip


@pytest.mark.parametrize("place", BROKEN)
def test_a_change_without_a_raised_version_is_told_what_to_do(monkeypatch, place):
    before, (instead, names) = drawn() | pixels(), BROKEN[place]
    monkeypatch.setattr(f"resnet_nb.{place}", instead)
    text = f"{', '.join(names)}: not what is recorded for stream version {STREAM_VERSION}; if this is meant, raise STREAM_VERSION in nbs/01_seed"
    assert complaint(before, drawn() | pixels()).startswith(text)


def test_recording_adds_a_combination_replaces_nothing_and_begins_anew_for_a_raised_version():
    first = updated({"stream_version": 0}, 1, {"orders": "a"}, "this decoder", {"training": "b"})
    both = updated(first, 1, {"orders": "a", "crops": "c"}, "another decoder", {"training": "d"})
    assert both["pixels"] == {"this decoder": {"training": "b"}, "another decoder": {"training": "d"}} and len(both["drawn"]) == 2
    assert updated(both, 2, {"orders": "e"}, "this decoder", {"training": "f"})["pixels"] == {"this decoder": {"training": "f"}}
    assert unlike(first["drawn"], both["drawn"]) == ["crops"]  # what is not recorded does not pass for it
    for others in (({"orders": "e"}, {"training": "b"}), ({"orders": "a"}, {"training": "f"})):
        with pytest.raises(SystemExit, match="not what is recorded for stream version .*; if this is meant, raise STREAM_VERSION in"):
            updated(both, 1, others[0], "this decoder", others[1])


if __name__ == "__main__":
    record = updated(RECORDED, STREAM_VERSION, drawn(), combination(), pixels())
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{RECORD.name}: stream version {STREAM_VERSION}, with the pixels of", *record["pixels"], sep="\n  ")
