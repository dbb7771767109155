"""How a run ends that can't go on: in one sentence, with an exit code of its own, and with nothing lost."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

from resnet_nb.files import read_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import read_rows, run_path


@pytest.mark.parametrize("numerics", ["close", "exact"])
def test_two_ranks_stop_together_where_the_loss_is_not_a_number(make_config, numerics):
    config = make_config(f"nan-{numerics}", numerics=numerics, peak_lr=1e30, warmup_ratio=0)
    with pytest.raises(launch.RunFailed, match="is not a number|can't hold it") as failure:
        launch.train(config)
    assert failure.value.code == 4 and "Traceback" not in str(failure.value)
    run_dir = run_path(config.name)
    assert checkpoints(run_dir) == [] and len(read_rows(run_dir, "step")) < 4  # of an epoch's four
    status = read_json(run_dir / "run.json")
    assert (status["status"], len(status["attempts"])) == ("failed", 1)  # and is not started again
    assert not launch.is_locked(run_dir)


def test_the_checkpoint_before_it_is_kept_and_the_run_is_not_started_again(make_config):
    # the second epoch begins at a rate that no weight survives
    late = {"schedule": "step", "step_epochs": 1, "step_gamma": 1e30, "warmup_ratio": 0}
    config = make_config("nan-late", "local", **late)
    with pytest.raises(launch.RunFailed, match=r"the loss of step \d is not a number"):
        launch.train(config)
    run_dir = run_path(config.name)
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000004"]
    assert len(read_json(run_dir / "run.json")["attempts"]) == 1
    assert math.isfinite(read_rows(run_dir, "val")[-1]["val/loss"])


def test_the_command_ends_with_code_4(home, data):
    command = str(Path(sys.executable).with_name("resnet-nb"))
    wish = json.dumps({"overrides": SMALL | {"peak_lr": 1e30, "warmup_ratio": 0, "accelerator": "cpu"}})
    done = subprocess.run(
        [command, "train", "-p", "recipe", "digits", "-r", "name", "nan-command", "-r", "data_dir", str(data), "-y", wish],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 4, done.stdout + done.stderr
    assert "is not a number" in done.stderr and "Lower peak_lr" in done.stderr and "Traceback" not in done.stderr
    ours = subprocess.run([command, "train", "nobody"], capture_output=True, text=True, timeout=60)
    assert ours.returncode == 2  # another ending has another code
