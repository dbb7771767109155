"""What a run leaves behind, for one process and for two."""

import json
import re

import numpy as np
import pytest
from conftest import NUM_VAL, SMALL, STEPS, trained_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resnet_nb.config import Parameters
from resnet_nb.data.sampler import steps_per_epoch
from resnet_nb.files import read_json
from resnet_nb.run import launch
from resnet_nb.run.folder import all_rows, read_rows, read_status
from resnet_nb.run.plan import resolve, validate
from resnet_nb.schedule import lr_at


def values(run_dir, event, name):
    return [row[name] for row in read_rows(run_dir, event)]


def test_two_ranks_count_each_validation_picture_once(one, two):
    assert values(one, "val", "val/seen") == values(two, "val", "val/seen") == [NUM_VAL] * 3
    assert values(two, "epoch", "train/seen") == [96] * 3


def test_accuracies_are_quotients_of_counts_to_the_last_bit(two):
    accuracies = values(two, "val", "val/acc")
    assert accuracies == [round(value * NUM_VAL) / NUM_VAL for value in accuracies]
    assert float(np.float32(7 / NUM_VAL)) != 7 / NUM_VAL  # a float32 on the way would be seen
    assert read_json(two / "metrics.json")["best"]["val/acc"] == max(accuracies)


def test_two_ranks_learn_what_one_learns(one, two, make_config):
    other_seed = trained_here(make_config("seed-1", "local", seed=1))

    def first_losses(run_dir):
        return values(run_dir, "step", "train/step_loss")[:3]

    # rounding grows quickly in BatchNorm over 6 pictures, so three steps are compared
    assert first_losses(two) == pytest.approx(first_losses(one), rel=1e-4)
    assert first_losses(other_seed) != pytest.approx(first_losses(one), rel=1e-2)


def test_one_log_line_an_epoch(one, two):
    for run_dir in (one, two):
        log = (run_dir / "train.log").read_text()
        console = (run_dir / "logs" / "attempt-1-rank-0.log").read_text()
        for epoch in (1, 2, 3):
            for text in (log, console):
                assert len(re.findall(rf"^📚 Epoch {epoch}/3 \| Learning Rate: \d\.\d{{6}}e-\d\d$", text, re.M)) == 1
                assert len(re.findall(rf"^🔄 EPOCH {epoch}/3 - Starting\.\.\.$", text, re.M)) == 1
                assert len(re.findall(rf"^📈 EPOCH {epoch} TRAIN - Loss: \d+\.\d{{4}}, Acc: \d+\.\d\d%, F1: N/A$", text, re.M)) == 1
                assert len(re.findall(rf"^📊 EPOCH {epoch} VAL   - Loss: \d+\.\d{{4}}, Acc: \d+\.\d\d%, F1: \d\.\d{{4}}$", text, re.M)) == 1
    silent = (two / "logs" / "attempt-1-rank-1.log").read_text()
    assert "EPOCH" not in silent and "📐" not in silent and "training and" not in silent


def test_logs_carry_no_warnings(one, two):
    for run_dir in (one, two):
        for path in (run_dir / "logs").glob("attempt-1-rank-*.log"):
            assert not re.search("warn|deprecat|recommended", path.read_text(), re.I), path.name


def test_learning_rate_is_logged_as_planned(two):
    recipe = launch.load_config(two).recipe
    planned = [lr_at(recipe, step, STEPS) for step in range(3 * STEPS)]
    assert values(two, "step", "train/learning_rate") == pytest.approx(planned, rel=1e-12)
    assert values(two, "step", "train/learning_rate") != pytest.approx(planned[::-1], rel=1e-2)
    starts = [row for row in all_rows(two) if row.get("note") == "epoch"]
    assert [row["train/learning_rate"] for row in starts] == pytest.approx(planned[::STEPS], rel=1e-12)


def test_sizes_grow_as_planned(two):
    assert values(two, "step", "image_size") == [16] * STEPS + [24] * STEPS + [32] * STEPS
    console = (two / "logs" / "attempt-1-rank-0.log").read_text()
    assert console.count("📐 Image sizes: 16 px from epoch 1, 24 px from epoch 2, 32 px from epoch 3") == 1
    assert console.count("📐 Epoch 2: image size 16 → 24 px") == 1


def test_tensorboard_has_one_graph_and_a_smooth_learning_rate(two):
    events = list((two / "tensorboard").glob("events.*"))
    assert len(events) == 1
    reader = EventAccumulator(str(two / "tensorboard"))
    reader.Reload()
    assert reader.Tags()["graph"] and "model/summary/text_summary" in reader.Tags()["tensors"]
    logged = {event.step: event.value for event in reader.Scalars("train/learning_rate")}
    assert list(logged.values()) == pytest.approx(values(two, "step", "train/learning_rate"), rel=1e-6)
    assert len({(event.step, event.value) for event in reader.Scalars("train/learning_rate")}) == len(logged)  # one value a step
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "val/acc5", "val/f1"} <= set(reader.Tags()["scalars"])
    assert b"peak_lr" in reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]


def test_the_run_folder_is_complete(two):
    names = {path.name for path in two.iterdir()}
    assert names >= {"config.json", "run.json", "train.log", "model_info.txt", "metrics.jsonl", "metrics.json", "manifest.json"}
    assert not [path for path in two.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    status = read_status(two)
    assert status["status"] == "completed" and status["best"]["val/acc"] == max(values(two, "val", "val/acc"))
    assert "GhostBatchNorm2d" in (about := (two / "model_info.txt").read_text()) and "Total params" in about and "Flops" not in about
    summary = read_json(two / "metrics.json")
    assert [row["epoch"] for row in summary["val"]] == [0, 1, 2]
    manifest = read_json(two / "manifest.json")
    assert manifest["data"]["train_pictures"] == 96 and manifest["attempts"][0]["world_size"] == 2
    json.dumps(manifest, allow_nan=False)


def test_best_and_last_checkpoints_stay_and_others_go(two):
    names = {path.name for path in (two / "checkpoints").glob("step-*")}
    last = {f"step-{STEPS * epoch:08d}" for epoch in (2, 3)}
    accuracy = values(two, "val", "val/acc")
    best = f"step-{STEPS * (accuracy.index(max(accuracy)) + 1):08d}"
    assert (two / "checkpoints" / "BEST").read_text().strip() == best
    assert names == last | {best}


def test_a_finished_run_is_not_trained_again(one, make_config):
    rows = (one / "metrics.jsonl").read_text()
    assert launch.train(make_config("one", "local")) == one
    assert (one / "metrics.jsonl").read_text() == rows


def test_another_recipe_under_the_same_name_is_refused(one, make_config):
    with pytest.raises(ValueError, match="run 'one' was trained with peak_lr=0.01, asked for is 0.02"):
        launch.train(make_config("one", "local", peak_lr=0.02))


def test_small_is_what_the_tests_think(make_config, data):
    config = make_config("small")
    train, val = validate(config)
    steps = steps_per_epoch(len(train), config.recipe.num_microbatches, config.recipe.microbatch_size)
    assert (len(train), len(val), steps) == (96, NUM_VAL, STEPS)
    assert config.recipe.epochs == SMALL["epochs"] and resolve(Parameters()).recipe.epochs != SMALL["epochs"]
