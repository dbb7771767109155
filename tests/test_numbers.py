"""Where a number can't be: what is said of the step, of its pictures, and of statistics that could not be held."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import STEPS, run_here

from resnet_nb.learn.module import JudgedClassifier
from resnet_nb.learn.network import build_model
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import STATE, checkpoint_path, commit_checkpoint, partial_path
from resnet_nb.run.folder import all_rows, make_run_dir, read_rows
from resnet_nb.run.recording import last_whole

SHORT = {"epochs": 1, "image_sizes": [16]}


def weights_file(folder, change) -> str:
    """The weights of a network for the small data, changed."""
    torch.manual_seed(0)
    network = build_model("resnet18", 4)
    change(network)
    torch.save(network.state_dict(), folder / "changed.pth")
    return str(folder / "changed.pth")


def failure_of(config) -> str:
    with pytest.raises(FloatingPointError) as failure:
        run_here(config)
    return str(failure.value)


def test_the_message_names_tensor_pictures_size_and_the_checkpoint_before(make_config, data):
    # the second epoch begins at a rate that no weight survives
    late = {"epochs": 2, "image_sizes": [16, 24], "schedule": "step", "step_epochs": 1, "step_gamma": 1e30, "warmup_ratio": 0}
    config = make_config("named", "local", **late)
    with pytest.raises(launch.RunFailed) as failure:
        launch.train(config)
    said = str(failure.value)
    assert failure.value.code == 4 and "the loss of step 6 is not a number" in said, said
    assert re.search(r"the output of \S+conv1 is not finite, in microbatch \d of 4 of epoch 2", said), said
    assert (
        "6 pictures at 24 px" in said
        and "step-00000004 is from before, and whole, with finite weights" in said
        and "numerics=close" not in said
    )
    listed = Path(re.search(r"\(all: '(.*)'\)", said)[1]).read_text().splitlines()
    assert len(listed) == 6 and all(Path(name).is_file() and data / "train" in Path(name).parents for name in listed)
    assert listed[0] in said


def test_a_checkpoint_that_an_update_has_spoiled_is_not_called_whole(tmp_path):
    for step, weight in ((4, 1.0), (8, 2.0), (12, math.nan)):
        torch.save({"state_dict": {"fc.weight": torch.tensor([0.0, weight])}}, partial_path(tmp_path, step) / STATE)
        commit_checkpoint(tmp_path, step, {})
    assert last_whole(tmp_path) == "step-00000008 is from before, and whole, with finite weights"
    (checkpoint_path(tmp_path, 8) / STATE).write_bytes(b"damaged")
    assert last_whole(tmp_path).startswith("step-00000004 is")
    shutil.rmtree(checkpoint_path(tmp_path, 4))
    assert last_whole(tmp_path) == "no checkpoint with finite weights was saved before"


def test_two_ranks_say_the_same_of_a_step(make_config, tmp_path):
    config = make_config("both", weights=weights_file(tmp_path, lambda network: network.fc.weight.data.fill_(1e38)), **SHORT)
    with pytest.raises(launch.RunFailed, match="the output of fc is not finite, in microbatch 1 of 4"):
        launch.train(config)


def test_close_is_advised_only_where_it_can_hold_what_exact_sums_cannot(make_config, tmp_path):
    def said(name, change, numerics="exact"):
        return failure_of(make_config(name, "local", numerics=numerics, weights=weights_file(tmp_path, change), **SHORT))

    large = said("large", lambda network: network.fc.weight.data.mul_(1e7))
    assert "and exact sums hold less than" in large and "or use numerics=close" in large
    broken = said("broken", lambda network: network.fc.weight.data.fill_(1e38))
    assert "the output of fc is not finite" in broken and "numerics=close" not in broken


def test_found_late_as_on_a_gpu_the_step_is_looked_into_with_its_own_weights(make_config, tmp_path, monkeypatch):
    weights = weights_file(tmp_path, lambda network: network.fc.weight.data.fill_(1e38))
    at_once = failure_of(make_config("at-once", "local", weights=weights, **SHORT))
    monkeypatch.setattr(JudgedClassifier, "at_hand", False)
    late = failure_of(make_config("late", "local", weights=weights, **SHORT))
    assert late.replace("late", "at-once") == at_once and "the output of fc is not finite" in late
    monkeypatch.setattr(JudgedClassifier, "take_back", lambda self: None)  # the control: the update has spoilt all
    assert "parameter conv1.weight is not finite" in failure_of(make_config("taken", "local", weights=weights, **SHORT))


@pytest.mark.parametrize("factor, steps", [(1e6, STEPS), (1, None)])
def test_a_step_whose_statistics_could_not_be_held_is_counted_and_said(make_config, tmp_path, factor, steps):
    weights = weights_file(tmp_path, lambda network: network.conv1.weight.data.mul_(factor))  # BatchNorm makes up for it
    run_dir, _ = run_here(make_config(f"unheld-{factor:.0f}", "local", weights=weights, **SHORT))
    (epoch,), rows = read_rows(run_dir, "epoch"), read_rows(run_dir, "step")
    assert epoch.get("steps_without_stats") == steps and len([row for row in rows if "stats_not_held" in row]) == (steps or 0)
    log = (run_dir / "train.log").read_text(encoding="utf-8")
    assert ("⚠️ EPOCH 1: in 4 steps a mean or variance of BatchNorm's was beyond what its sums hold" in log) == bool(steps)
    if steps:  # and a run that was stopped within the epoch counts as one that was not
        stopped = make_run_dir("unheld-and-stopped")
        stopped.joinpath("STOP").touch()
        config = make_config("unheld-and-stopped", "local", weights=weights, **SHORT)
        assert run_here(config)[1].startswith("stopped")
        stopped.joinpath("STOP").unlink(missing_ok=True)
        run_here(config, attempt=2)
        assert [row["step"] for row in all_rows(stopped) if row["attempt"] == 2 and row["event"] == "step"][0] > 1
        assert [row["steps_without_stats"] for row in read_rows(stopped, "epoch")] == [steps]
    shown = []
    launch.follow(run_dir, shown.append)
    assert ("BatchNorm's statistics beyond what is held in 4 steps" in shown[0]) == bool(steps)
