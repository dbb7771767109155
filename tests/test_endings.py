"""How a run ends that can't go on: in one sentence, with an exit code of its own, and with nothing lost."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SMALL

from resnet_nb.cli import main
from resnet_nb.data.index import BadPicture
from resnet_nb.files import read_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import append_rows, create_run, load_config, lock_run, read_rows, read_status, run_path, write_status


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


def test_seeds_go_on_after_a_variant_that_diverged_and_the_command_ends_with_code_4(home, data):
    wish = json.dumps({"overrides": SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu"}})
    words = ["-p", "recipe", "digits", "-r", "name", "nan-seeds", "-r", "data_dir", str(data), "-y", wish, "--count", "1"]
    variants = ["--variant", "{peak_lr: 1.0e+30, warmup_ratio: 0}", "--variant", "{flip: 0.5}"]
    result = CliRunner().invoke(main, ["seeds", *words, *variants, "--json"])
    assert result.exit_code == 4, result.output
    diverged, whole = json.loads(result.stdout).values()  # in the order in which they were given
    assert diverged["accuracies"] == [None] and "mean" not in diverged and "is not a number" in result.stderr
    assert [whole["mean"]] == whole["accuracies"] and whole["seeds"] == 1
    again = CliRunner().invoke(main, ["seeds", *words, *variants[2:], "--json"])  # what is done is not done again
    assert again.exit_code == 0 and list(json.loads(again.stdout).values()) == [whole]


def test_the_last_attempt_that_is_allowed_ends_the_run(make_config, monkeypatch):
    def fails(run_dir, config, lock, attempts, begun):
        """An attempt that gets on, and fails."""
        number = len(attempts) + 1
        append_rows(run_dir, [{"event": "step", "step": number, "epoch": 0, "attempt": number}])
        return {"status": "failed", "reason": "a rank was killed", "kind": ""}

    monkeypatch.setattr(launch, "_attempt", fails)
    monkeypatch.setattr(launch, "_count_devices", lambda run_dir: "")
    run_dir = create_run(make_config("attempts", "local"))
    with lock_run(run_dir) as lock:
        launch.supervise(run_dir, lock.fileno(), max_attempts=3)
    status = read_json(run_dir / "run.json")
    assert (status["status"], status["reason"], len(status["attempts"])) == ("failed", "a rank was killed (after 3 attempts)", 3)


def test_of_a_run_whose_folder_is_renamed_it_is_said_that_it_is_gone(make_config, monkeypatch):
    import papermill

    from resnet_nb import cli

    gone = "run 'renamed.*' is not in '.*' any more: its folder was renamed or removed"

    def begun(name):
        run_dir = create_run(make_config(name, "local"))
        write_status(run_dir, status="running")
        return run_dir, lambda *args, **how: run_dir.rename(run_dir.with_name(f"{name} elsewhere"))

    run_dir, rename = begun("renamed")
    with lock_run(run_dir), pytest.raises(launch.RunFailed, match=gone):
        launch.observe(run_dir, on_progress=rename)
    run_dir, rename = begun("renamed-too")
    with monkeypatch.context() as patch, lock_run(run_dir), pytest.raises(launch.RunFailed, match=gone):
        patch.setattr(papermill, "execute_notebook", lambda *args, **how: rename() and (run_dir / "train.ipynb").write_text(""))
        cli._train_in_notebook(load_config(run_dir), cli.notebook("train.ipynb"))


@pytest.mark.parametrize(
    "reported, kind",
    [("RunBusy", ValueError), ("FileNotFoundError", ValueError), ("BadPicture", BadPicture), ("KeyError", launch.RunFailed)],
)
def test_a_command_ends_as_what_its_notebook_reports(make_config, reported, kind):
    from resnet_nb import cli

    class Reported(Exception):
        """As papermill tells of an error in a cell."""

        ename, evalue = reported, "what it said"

    run_dir = create_run(make_config(f"reports-{reported}", "local"))
    with pytest.raises(kind, match="what it said"):
        cli._raise_ending(run_dir, Reported(), begun=False, mended=False)


def test_of_two_commands_that_begin_one_name_each_means_its_own_run(make_config, monkeypatch):
    from resnet_nb import cli

    config, other = (make_config("one-name", "local", epochs=1, image_sizes=[16], seed=seed) for seed in (0, 1))
    usual = cli.execute
    with monkeypatch.context() as patch:  # the other one writes the folder while the kernel of the first begins
        patch.setattr(cli, "execute", lambda *args, **environment: (create_run(other), usual(*args, **environment)))
        create_run(config)
        cli._train_in_notebook(config, cli.notebook("train.ipynb"))
    run_dir = run_path("one-name")
    assert load_config(run_dir) == config and read_status(run_dir)["status"] == "completed"
    with pytest.raises(ValueError, match="seed=0, asked for is 1"):
        cli._train_in_notebook(other, cli.notebook("train.ipynb"))
    assert load_config(run_dir) == config
