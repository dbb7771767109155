"""What else may be done to a picture, and how often it is shown: drawn by key, equal to its authors' code, the same on any number of ranks."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tensors, trained_here
from PIL import Image
from torchvision.transforms import v2

from resnet_nb.config import RECIPES, Recipe
from resnet_nb.data.datamodule import ImageNetDataModule, KeyedImages
from resnet_nb.data.sampler import SampleKey, microbatch_places
from resnet_nb.data.transforms import CHOICES, change_picture, draw_changes, draw_operation
from resnet_nb.learn.module import binary_cross_entropy
from resnet_nb.results.plots import plot_run
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import read_rows
from resnet_nb.run.plan import describe, validate

ALL = {"rand_augment": 2, "rand_magnitude": 12, "color_jitter": 0.3, "random_erasing": 0.5, "repeated_augmentation": 2}
ONE_EACH = [{"rand_augment": 2}, {"trivial_augment": True}, {"color_jitter": 0.4}, {"random_erasing": 1.0}]

y, x = np.mgrid[:48, :48]
PICTURE = np.stack([x * 5, y * 5, x * y % 256], -1).astype(np.uint8)
PICTURE[10:30, 10:30] = np.random.default_rng(0).integers(0, 256, (20, 20, 3))


def recipe(**fields):
    return Recipe(**RECIPES["imagenet"].model_dump() | fields)


# --- the operations are torchvision's ----------------------------------------------------------------------------------

BILINEAR = {"interpolation": v2.InterpolationMode.BILINEAR}  # as in torchvision's reference script


@pytest.mark.parametrize("wide, theirs", [(False, v2.RandAugment(**BILINEAR)), (True, v2.TrivialAugmentWide(**BILINEAR))])
def test_operations_and_strengths_are_torchvisions(wide, theirs):
    image, table = Image.fromarray(PICTURE), theirs._AUGMENTATION_SPACE
    assert list(table) == CHOICES
    unlike = {}
    for number, (name, (strengths, signed)) in enumerate(table.items()):
        strengths = strengths(31, *PICTURE.shape[:2])
        for strength, sign in [(s, sign) for s in range(31) for sign in ((0.2, 0.8) if signed else (0.8,))]:
            drawn, *given = draw_operation((number + 0.5) / len(table), sign, strength, len(PICTURE), wide)
            wanted = 0.0 if strengths is None else float(strengths[strength]) * (-1 if signed and sign < 0.5 else 1)
            assert drawn == name and (not given or given[0] == pytest.approx(wanted, abs=1e-5))
            found = np.asarray(theirs._apply_image_or_video_transform(image, name, *(given or [0.0]), theirs.interpolation, theirs._fill))
            unlike[name] = max(unlike.get(name, 0), (change_picture(PICTURE, [(name, *given)]) != found).mean())
    assert {name for name, share in unlike.items() if share} <= {"ShearX", "ShearY"}  # theirs goes by way of an angle, and rounds
    assert max(unlike.values()) < 0.01
    assert (
        change_picture(PICTURE, [("ShearX", 0.2)]) != change_picture(PICTURE, [("ShearX", 0.21)])
    ).mean() > 0.01  # what an error would look like


def test_colour_jitter_is_torchvisions():
    image, jitter = Image.fromarray(PICTURE), v2.ColorJitter(0.3, 0.3, 0.3)
    for i in range(20):
        changes = draw_changes(0, 0, i, 48, recipe(color_jitter=0.3))
        factors = {name: 1 + more for name, more in changes}
        order = [("Brightness", "Contrast", "Color").index(name) for name, _ in changes]
        given = dict(
            zip(("brightness_factor", "contrast_factor", "saturation_factor"), (factors[n] for n in ("Brightness", "Contrast", "Color")))
        )
        theirs = np.asarray(jitter.transform(image, given | {"fn_idx": order, "hue_factor": None}))
        assert np.array_equal(change_picture(PICTURE, changes), theirs)
        assert not np.array_equal(change_picture(PICTURE, changes[::-1]), theirs) or order == order[::-1]


def test_several_views_are_dealt_as_by_timms_sampler():
    timm_data = pytest.importorskip("timm.data.distributed_sampler")
    count, steps, num_microbatches, size, views = 240, 5, 4, 12, 3
    theirs = [
        list(timm_data.RepeatAugSampler(range(count), num_microbatches, rank, shuffle=False, num_repeats=views))
        for rank in range(num_microbatches)
    ]
    places = microbatch_places(count, steps, num_microbatches, views)
    for n, found in enumerate(places):
        step, microbatch = divmod(n, num_microbatches)
        assert [at // views for at in found] == theirs[microbatch][step * size :][:size]
    assert [at // views for at in microbatch_places(count, steps, num_microbatches)[1]] != theirs[1][:size]


def test_bce_is_timms_also_where_pictures_are_mixed():
    timm_loss, timm_mixup = pytest.importorskip("timm.loss"), pytest.importorskip("timm.data.mixup")
    logits, targets = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 1, 1, 2, 3])
    for smoothing in (0.0, 0.1):
        assert binary_cross_entropy(logits, targets, smoothing).equal(timm_loss.BinaryCrossEntropy(smoothing)(logits, targets))
        theirs = timm_mixup.mixup_target(targets, 5, lam=0.3, smoothing=smoothing)  # mixes with the batch in reverse
        shares = 0.3 * torch.nn.functional.one_hot(targets, 5) + 0.7 * torch.nn.functional.one_hot(targets.flip(0), 5)
        assert binary_cross_entropy(logits, shares, smoothing).item() == pytest.approx(
            timm_loss.BinaryCrossEntropy()(logits, theirs).item(), rel=1e-6
        )
    assert binary_cross_entropy(logits, targets, 0.1) != binary_cross_entropy(logits, targets)


# --- drawn by key ------------------------------------------------------------------------------------------------------


def states():
    kind, words, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), [kind, words.tolist(), *rest], random.getstate()]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """training(fields, seed=...): images and digests of nine pictures in three epochs, as a data worker makes them."""
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(PICTURE).save(path)
    index = SimpleNamespace(read=lambda i: path.read_bytes(), where=lambda i: path.name, labels=[0] * 9)

    def made(fields, seed=0):
        pictures = KeyedImages(index, SimpleNamespace(seed=seed, recipe=recipe(**fields)), train=True)
        images, _, digests, _ = pictures.__getitems__([SampleKey(epoch, i, 48) for epoch in range(3) for i in range(9)])
        return images, digests

    return made


@pytest.mark.parametrize("fields", [*ONE_EACH, ALL])
def test_no_generator_is_read_or_moved(fields, training):
    before, (images, digests) = states(), training(fields)
    assert states() == before
    torch.rand(1), np.random.rand(), random.random()
    assert states() != before
    assert training(fields)[0].equal(images) and training(fields)[1].equal(digests)
    assert not training(fields, seed=1)[0].equal(images)


@pytest.mark.parametrize("fields", ONE_EACH)
def test_a_field_changes_pictures_and_their_digests_and_leaves_crops_alone(fields, training):
    plain, changed, off = (training(f) for f in ({}, fields, dict.fromkeys(fields, 0)))
    assert plain[0].equal(off[0]) and plain[1].equal(off[1])
    assert (plain[0] != changed[0]).float().mean() > 0.05 and not (plain[1] == changed[1]).all()
    erased = training(fields | {"random_erasing": 1.0})  # another draw's key: what was drawn before it stays
    same = (erased[0] == changed[0]).float().mean(dim=(1, 2, 3))
    assert "random_erasing" in fields or (same > 0.6).all() and (same < 1).any()


def test_bce_and_views_that_cannot_be_are_refused_before_anything_starts(make_config):
    with pytest.raises(ValueError, match="repeated_augmentation=50: 96 training pictures give each of 4 steps 0 pictures in 50 views"):
        validate(make_config("too-many-views", repeated_augmentation=50))
    config = make_config("three-views", repeated_augmentation=3)
    assert describe(config, *validate(config))["step"].endswith("2 per rank; 3 views of each picture")
    with pytest.raises(ValueError, match="use one of both"):
        make_config("bce-balanced", loss="bce", class_weights="balanced")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_data_workers_change_nothing(make_config, num_workers):
    def batches(workers, **more):
        module = ImageNetDataModule(make_config(f"workers-{workers}", "local", num_workers=workers, **(ALL | more)))
        module.setup()
        return [part for batch in module.train_dataloader() for part in batch]

    none, some, plain = batches(0), batches(num_workers), batches(0, random_erasing=0.0)
    assert len(none) == len(some) > 0 and all(one.equal(other) for one, other in zip(none, some))
    assert not all(one.equal(other) for one, other in zip(none, plain))


# --- whole runs --------------------------------------------------------------------------------------------------------

RUN = ALL | {"epochs": 2, "image_sizes": [16, 24], "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "loss": "bce", "numerics": "exact"}


def steps(run_dir):
    return [(row["step"], row["digest"], row["train/step_loss"]) for row in read_rows(run_dir, "step")]


@pytest.fixture(scope="module")
def reference(make_config):
    return trained_here(make_config("views-1", devices=1, **RUN))


def test_bits_are_the_same_on_two_processes_and_after_a_stop(make_config, reference):
    two = launch.train(make_config("views-2", num_workers=1, **RUN))
    assert tensors(two) == tensors(reference) and steps(two) == steps(reference)
    config = make_config("views-stopped", **RUN)
    run_dir = launch.start(config)
    launch.stop(run_dir)
    launch.follow(run_dir)
    assert checkpoints(run_dir)[0].name == "step-00000001"  # in mid-epoch
    launch.train(make_config("views-stopped", devices=1, **RUN))
    assert tensors(run_dir) == tensors(reference) and steps(run_dir) == steps(reference)
    other = trained_here(make_config("views-other", devices=1, **(RUN | {"rand_magnitude": 13})))
    assert tensors(other) != tensors(reference) and not {step[1] for step in steps(other)} & {step[1] for step in steps(reference)}


def test_metrics_count_views_and_validation_is_cross_entropy(reference):
    rows = read_rows(reference, "epoch")
    assert [row["train/seen"] for row in rows] == [96, 96]  # 12 of 96 pictures in each of four steps, twice
    assert max(row["train/loss"] for row in rows) < 0.8  # a mean over four classes
    assert [row["val/seen"] for row in read_rows(reference, "val")] == [23, 23]
    assert min(row["val/loss"] for row in read_rows(reference, "val")) > 0.8
    loss = plot_run(reference).axes[1]
    assert loss.get_yscale() == "log" and loss.get_ylabel() == "training: bce, nats\nvalidation: cross-entropy"
