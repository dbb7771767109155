"""Runs that start from trained weights, and keep some of them as they are for a while."""

import hashlib
import re
import shutil
import time

import pytest
import torch
from click.testing import CliRunner
from conftest import STEPS, tensors, trained_here

from resnet_nb import cli
from resnet_nb.config import MEAN, STD
from resnet_nb.files import read_json
from resnet_nb.learn.module import ResNetModule
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import STATE, best_checkpoint, checkpoint_path, checkpoints, weights_source
from resnet_nb.run.folder import all_rows, load_config, read_rows, run_path
from resnet_nb.run.plan import validate
from resnet_nb.schedule import lr_at

HEIR = {"epochs": 1, "image_sizes": [16]}


def first_loss(run_dir):
    return read_rows(run_dir, "step")[0]["train/step_loss"]


@pytest.fixture(scope="module")
def donor(make_config):
    """Folder of a finished run with averaged weights, whose best checkpoint others start from."""
    return trained_here(make_config("donor", "local", epochs=2, image_sizes=[16], ema_decay=0.5))


@pytest.fixture(scope="module")
def heir(make_config, donor):
    """Folder of a run of two processes that starts from it."""
    return launch.train(make_config("heir", weights="donor", **HEIR))


def test_a_run_starts_from_the_best_checkpoint_of_another_and_says_so(donor, heir, make_config):
    facts = read_json(heir / "manifest.json")["weights"]
    state = best_checkpoint(donor) / STATE
    assert facts["sha256"] == hashlib.sha256(state.read_bytes()).hexdigest()
    assert facts["loaded"] == facts["of"] == 122 and facts["left_out"] == {}
    for log in ("train.log", "logs/attempt-1-rank-0.log"):
        assert (heir / log).read_text().count(f"🏁 Starts from state.ckpt (sha256 {facts['sha256'][:12]}): 122 of 122 tensors\n") == 1
    assert "🏁" not in (heir / "logs/attempt-1-rank-1.log").read_text()
    fresh = trained_here(make_config("fresh", "local", **HEIR))
    assert first_loss(heir) < 0.9 * first_loss(fresh), "it starts no better than from nothing"
    assert "weights" not in read_json(fresh / "manifest.json")


def test_verify_compares_what_the_weights_were_and_not_where_they_lay(donor, heir, make_config, tmp_path):
    def verdict(*runs):
        result = CliRunner().invoke(cli.main, ["verify", *(str(run) for run in runs)])
        return result.exit_code, result.output

    state = torch.load(best_checkpoint(donor) / STATE, weights_only=True)
    (tmp_path / "copy.ckpt").write_bytes((best_checkpoint(donor) / STATE).read_bytes())
    copied = launch.train(make_config("from-a-copy", "cpu2", weights=str(tmp_path / "copy.ckpt"), **HEIR))
    assert first_loss(copied) == first_loss(heir)
    code, text = verdict(heir, copied)
    assert code < 2 and "recipe, seed, numerics, stream version and data are the same" in text, text
    torch.save(state["state_dict"] | {"ema.module.fc.weight": 2 * state["state_dict"]["ema.module.fc.weight"]}, tmp_path / "copy.ckpt")
    other = launch.train(make_config("from-another", "cpu2", weights=str(tmp_path / "copy.ckpt"), **HEIR))
    assert first_loss(other) != first_loss(heir)
    code, text = verdict(copied, other)
    assert code == 2 and "NOT COMPARABLE  weights is" in text, text


def test_weights_that_do_not_fit_are_refused_before_anything_starts(donor, make_config, tmp_path):
    with pytest.raises(ValueError, match="is not of this network: layer1.2.conv1.weight is missing there"):
        validate(make_config("misfit", "local", weights="donor", arch="resnet34"))
    with pytest.raises(ValueError, match="no file .*no run, and no weights that torchvision has for resnet18"):
        validate(make_config("misspelt", "local", weights="doner"))
    validate(make_config("fits", "local", weights="donor"))


def test_of_the_head_of_other_classes_nothing_is_taken(donor, make_config):
    config, left_out = make_config("others", "local", weights="donor"), []
    names = torch.load(best_checkpoint(donor) / STATE, weights_only=True)["classes"]
    for classes in (names, names[::-1], [f"the {name}" for name in names]):
        module = ResNetModule(config, len(classes), 1)
        fresh = module.network.fc.weight.detach().clone()
        left_out.append(module.start_from(weights_source("donor"), classes)["left_out"])
        assert module.network.fc.weight.equal(fresh) == bool(left_out[-1])
    assert left_out == [{}, *[{"fc.weight": "of other classes", "fc.bias": "of other classes"}] * 2]


def test_pictures_are_normalized_as_they_were_for_the_weights_that_a_run_starts_from(donor, make_config, tmp_path):
    half = [[0.5] * 3, [0.25] * 3]
    state = best_checkpoint(trained_here(make_config("half", "local", normalization=half, **HEIR))) / STATE
    shutil.copy(state, tmp_path / "copy.ckpt")
    for weights in ("half", str(state), str(tmp_path / "copy.ckpt")):  # each says itself what it was shown
        with pytest.raises(ValueError, match=re.escape(f"add normalization: {half} in the recipe or the overrides")):
            validate(make_config("unlike", "local", weights=weights))
        validate(make_config("alike", "local", weights=weights, normalization=half))
    means = [float(ResNetModule(load_config(run_path(name)), 10, 1).mean[0, 0, 0, 0]) for name in ("half", "donor")]
    assert means == [127.5, pytest.approx(255 * MEAN[0])]
    with pytest.raises(ValueError, match="set normalization"):  # a file that says itself what it was shown is believed first
        validate(make_config("contrary", "local", weights="half", normalization=[MEAN, STD]))
    validate(make_config("unlike", "local", weights="half"), again=True)


def test_a_run_with_a_checkpoint_goes_on_without_the_weights_that_it_started_from(donor, heir, make_config, tmp_path):
    validate(make_config("heir", weights=str(tmp_path / "gone.ckpt"), **HEIR))
    with pytest.raises(ValueError, match="there is no file"):
        validate(make_config("another", weights=str(tmp_path / "gone.ckpt"), **HEIR))


FROZEN = {
    "epochs": 3,
    "image_sizes": [16],
    "weights": "donor",
    "freeze_epochs": 1,
    "layer_lr_decay": 0.7,
    "ema_decay": 0.9,
    "numerics": "exact",
}


@pytest.fixture(scope="module")
def frozen(make_config, donor):
    """One process, exact, its first epoch frozen, never interrupted."""
    return trained_here(make_config("frozen", devices=1, **FROZEN))


def test_frozen_weights_stay_in_frozen_epochs_and_move_afterwards(donor, make_config, frozen):
    run_dir = trained_here(make_config("watched", devices=1, **FROZEN | {"epochs": 2}))
    loaded = torch.load(best_checkpoint(donor) / STATE, weights_only=True)["state_dict"]

    def moved(step):
        now = torch.load(checkpoint_path(run_dir, step) / STATE, weights_only=True)
        backbone = [name for name in now["state_dict"] if name.startswith("network.") and not name.startswith("network.fc.")]
        same = [name for name in backbone if now["state_dict"][name].equal(loaded[name.replace("network.", "ema.module.")])]
        return set(backbone) - set(same), not now["state_dict"]["network.fc.weight"].equal(loaded["ema.module.fc.weight"])

    assert moved(STEPS) == (set(), True)  # nothing but the head, BatchNorm's statistics included
    assert not [name for name in tensors(run_dir, STEPS) if "momentum" in name and "network.fc." not in name]
    learned, head = moved(2 * STEPS)
    should = {name for name in tensors(run_dir, STEPS) if name.startswith("network.") and (".conv" in name or "running" in name)}
    assert head and should and should <= learned  # a norm's weight may move by less than its last bit
    assert len([name for name in tensors(run_dir, 2 * STEPS) if "momentum" in name]) == 62


@pytest.mark.parametrize("devices, num_workers", [(2, 1), (4, 0)])
def test_frozen_epochs_have_the_same_bits_on_any_number_of_processes(make_config, frozen, devices, num_workers):
    other = launch.train(make_config(f"frozen-{devices}", devices=devices, **FROZEN | {"num_workers": num_workers}))
    assert "ema.module.bn1.running_var" in tensors(other)
    assert tensors(other) == tensors(frozen)


def test_without_freezing_the_bits_are_others(make_config, frozen):
    other = trained_here(make_config("not-frozen", devices=1, **FROZEN | {"freeze_epochs": 0}))
    assert tensors(other)["network.conv1.weight"] != tensors(frozen)["network.conv1.weight"]


@pytest.mark.parametrize("first, stops, then", [(2, 1, 1), (1, STEPS + 1, 2)])
def test_a_run_stopped_in_a_frozen_epoch_or_after_it_goes_on_to_the_same_bits(make_config, frozen, first, stops, then):
    name = f"frozen-on-{first}-then-{then}"
    run_dir = launch.start(make_config(name, devices=first, **FROZEN))
    while stops > STEPS and not [row for row in all_rows(run_dir) if row.get("note") == "epoch" and row["epoch"] == 1]:
        time.sleep(0.02)
    launch.stop(run_dir)
    launch.follow(run_dir)
    (newest, *_) = checkpoints(run_dir)
    assert int(newest.name[5:]) % STEPS, "it was not stopped in the middle of an epoch"
    assert (int(newest.name[5:]) > STEPS) == (stops > STEPS)
    launch.train(make_config(name, devices=then, **FROZEN))
    assert tensors(run_dir) == tensors(frozen)


def test_close_freezes_on_two_processes_and_norms_stay_fixed_where_asked(make_config, donor):
    run_dir = launch.train(
        make_config("fixed-norms", "cpu2", **FROZEN | {"numerics": "close", "epochs": 2, "freeze_norm": True, "ema_decay": 0.0})
    )
    state = torch.load(checkpoints(run_dir)[0] / STATE, weights_only=True)["state_dict"]
    loaded = torch.load(best_checkpoint(donor) / STATE, weights_only=True)["state_dict"]
    same = {name for name in state if state[name].equal(loaded[name.replace("network.", "ema.module.")])}
    statistics = {name for name in state if "running" in name or "tracked" in name}
    assert statistics <= same and len(statistics) == 60
    assert not [name for name in same - statistics if "conv" in name or "fc." in name or "downsample.0" in name]  # the control: they learn


def test_clipping_shares_and_class_weights_have_the_same_bits_on_two_processes(make_config):
    wish = {"epochs": 1, "image_sizes": [16], "numerics": "exact", "clip_norm": 0.5, "backbone_lr_share": 0.1, "class_weights": "balanced"}

    def bits(name, devices, **more):
        run_dir = (trained_here if devices == 1 else launch.train)(make_config(name, devices=devices, **wish | more))
        rates = [row["train/learning_rate"] for row in read_rows(run_dir, "step")]  # the head's
        assert rates == pytest.approx([lr_at(load_config(run_dir).recipe, step, STEPS) for step in range(STEPS)])
        return tensors(run_dir)

    one = bits("clipped-1", 1)
    assert bits("clipped-2", 2) == one
    assert bits("clipped-less", 1, clip_norm=5.0) != one
