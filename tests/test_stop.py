"""Runs that stop, fail, are killed, and go on."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import STEPS, epochs_begun, losses, processes_of, ranks_of, supervise_here, trained_here, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from resnet_nb.cli import main
from resnet_nb.files import read_json, write_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import all_rows, lock_run, read_rows, read_status, run_path
from resnet_nb.run.worker import make_trainer


@pytest.fixture(scope="module")
def stopped(make_config, one):
    """The run `one` again under another name, stopped in its second epoch and run again, on one process."""
    config = make_config("stopped", "local")
    run_dir = launch.start(config)
    launch.stop(run_dir)  # before its first step, so that it stops after that
    status = launch.follow(run_dir)
    assert status["status"] == "stopped" and "STOP file" in status["reason"]
    assert [checkpoint.name for checkpoint in checkpoints(run_dir)] == ["step-00000001"]  # in the middle of an epoch
    launch.train(config)
    return run_dir


@pytest.fixture(scope="module")
def other_seed(make_config):
    """The control: a run that learns something else."""
    return trained_here(make_config("other-seed", "local", seed=1))


def test_a_stopped_run_goes_on_to_the_same_bits(stopped, one, other_seed):
    assert losses(stopped) == losses(one)
    assert losses(other_seed) != losses(one)


def test_a_resume_keeps_old_rows_and_says_so(stopped):
    attempts = [row["attempt"] for row in all_rows(stopped) if row["event"] == "step"]
    assert set(attempts) == {1, 2} and attempts == sorted(attempts)
    assert [step for step, _ in losses(stopped)] == list(range(1, 3 * STEPS + 1))
    assert "▶️ Resumes from step-" in (stopped / "logs" / "attempt-2-rank-0.log").read_text()
    assert [row["val/seen"] for row in read_rows(stopped, "val")] == [23] * 3


def test_an_epoch_in_two_halves_has_the_numbers_of_the_whole(stopped, one):
    def numbers(run_dir):
        return [(row["train/loss"], row["train/acc"], row["train/seen"]) for row in read_rows(run_dir, "epoch")]

    assert numbers(stopped) == numbers(one)


def test_a_second_writer_is_refused(make_config):
    config, other = make_config("busy", "local"), make_config("busy", "local", peak_lr=0.5)
    run_dir = launch.create_run(config)
    for wish in (config, other):
        with lock_run(run_dir), pytest.raises(ValueError, match="run 'busy' is being written by process"):
            launch.start(wish)
    with lock_run(run_dir), pytest.raises(ValueError, match="is being written by"):
        launch.train(other)  # another run can't be followed in its place
    assert launch.load_config(run_dir) == config != other
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_living_run_is_found_again(make_config):
    config = make_config("alive", epochs=1, image_sizes=[16])
    launch.start(config)
    said = []
    run_dir = launch.train(config, show=said.append)  # as a notebook that was opened again
    assert "alive is running already" in said[0] and said[-1].startswith("epoch   1/1")
    assert len(read_status(run_dir)["attempts"]) == 1


def test_a_run_stopped_elsewhere_is_no_finished_run(make_config):
    config = make_config("stopped-elsewhere", "local")
    run_dir = launch.start(config)
    launch.stop(run_dir)
    with pytest.raises(launch.RunStopped, match="was stopped before its end .a STOP file"):
        launch.train(config)


def test_a_resumed_run_has_one_graph_and_no_step_twice_in_tensorboard(stopped):
    graphs = 0
    for path in (stopped / "tensorboard").glob("events.*"):
        graphs += sum(event.HasField("graph_def") for event in EventFileLoader(str(path)).Load())
    assert graphs == 1
    reader = EventAccumulator(str(stopped / "tensorboard"))
    reader.Reload()
    found = [event.step for event in reader.Scalars("train/step_loss")]
    assert found == list(range(3 * STEPS))


SHUFFLED = """
import sys
from pathlib import Path
import lightning as L
from resnet_nb.run import worker
whole = L.Trainer
def shuffled(**kw):
    trainer = whole(**kw | {"callbacks": kw["callbacks"][::-1]})
    Path(sys.argv[2]).write_text(" ".join(type(callback).__name__ for callback in trainer.callbacks))
    return trainer
L.Trainer = shuffled
sys.exit(worker.main(sys.argv[1]))
"""


def test_the_order_of_callbacks_changes_no_file(make_config, tmp_path, one, other_seed):
    def without_times(run_dir):
        rows = all_rows(run_dir)
        kept = [{k: v for k, v in row.items() if "second" not in k and k not in ("data_wait", "peak_memory")} for row in rows]
        return kept, [line for line in (run_dir / "train.log").read_text().splitlines() if "🏁" not in line]

    config = make_config("shuffled", "local")
    run_dir = launch.create_run(config)
    (tmp_path / "shuffled.py").write_text(SHUFFLED)
    subprocess.run([sys.executable, str(tmp_path / "shuffled.py"), str(run_dir), str(tmp_path / "order")], check=True)
    usual = [type(callback).__name__ for callback in make_trainer(config, tmp_path, attempt=1, first_step=0).callbacks]
    order = (tmp_path / "order").read_text().split()
    assert order != usual and sorted(order) == sorted(usual)
    assert without_times(run_dir) == without_times(one)
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {p.name for p in (one / "checkpoints").iterdir()}
    assert without_times(run_dir)[0] != without_times(other_seed)[0]


def kill_a_rank(run_dir):
    os.kill(ranks_of(run_dir)[1], signal.SIGKILL)


def test_a_rank_killed_before_any_checkpoint_is_started_again_from_nothing(make_config, home, data):
    # all digits: enough steps in an epoch to be killed among them
    config = make_config("killed", epochs=1, image_sizes=[16], data_dir=home / "all digits")
    run_dir = launch.start(config)
    wait_for(lambda: len(read_rows(run_dir, "step")) > 4)
    kill_a_rank(run_dir)
    assert not checkpoints(run_dir)
    status = launch.follow(run_dir)
    assert [attempt["status"] for attempt in status["attempts"]] == ["failed", "completed"]
    assert "a rank was killed by SIGKILL (exit code -9)" in status["attempts"][0]["reason"]
    assert [(row["step"], row["attempt"]) for row in all_rows(run_dir) if row.get("note") == "start"] == [(0, 1), (0, 2)]
    assert not processes_of(run_dir)


DIES = """
import os, signal, sys
from resnet_nb.learn import module
from resnet_nb.run import worker
usual, calls = module.ResNetModule.training_step, []
def training_step(*args, **kwargs):
    calls.append(None)
    if len(calls) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(*args, **kwargs)
module.ResNetModule.training_step = training_step
sys.exit(worker.main(sys.argv[1]))
"""


def test_a_run_that_dies_at_the_same_step_again_is_not_started_for_ever(make_config, tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text(DIES)
    run_dir = supervise_here(make_config("dies", "local"), tmp_path / "dies.py", 9, monkeypatch=monkeypatch)  # in its third step
    status = read_status(run_dir)
    assert [attempt["status"] for attempt in status["attempts"]] == ["failed", "failed"]
    assert status["status"] == "failed" and "killed by SIGKILL" in status["reason"]
    assert {row["step"] for row in read_rows(run_dir, "step")} == {1, 2}


def test_a_rank_killed_later_is_started_again_and_learns_the_same(make_config, two):
    run_dir = launch.start(make_config("restarted", num_workers=1))
    wait_for(lambda: epochs_begun(run_dir) >= 2)
    kill_a_rank(run_dir)
    status = launch.follow(run_dir)
    assert [attempt["status"] for attempt in status["attempts"]] == ["failed", "completed"]
    assert "SIGKILL" in status["attempts"][0]["reason"]
    assert losses(run_dir) == losses(two)


def test_an_undecodable_picture_stops_the_run_with_its_path(make_config, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "with a space")
    picture = next((broken / "train" / "2").iterdir())
    picture.write_bytes(picture.read_bytes()[:60])
    config = make_config("broken", data_dir=broken, num_workers=1)
    with pytest.raises(launch.RunFailed) as failure:
        launch.train(config)
    sentence = f"{str(picture)!r} can't be decoded as a picture: "
    assert sentence in str(failure.value) and "replace it or remove it" in str(failure.value)
    assert "\n" not in str(failure.value) and "Traceback" not in str(failure.value)
    error = launch.first_error(run_path("broken"), 1)
    assert error["error"].startswith(f"BadPicture: {sentence}") and "\n" not in error["error"]
    assert "Traceback" in error["traceback"] and "exit code 1" in read_status(run_path("broken"))["reason"]
    assert any("Traceback" in log.read_text() for log in (run_path("broken") / "logs").glob("attempt-1-rank-*.log"))
    followed = CliRunner().invoke(main, ["follow", "broken"])
    assert followed.exit_code == 3 and sentence in followed.output and followed.output.count("\n") == 1
    wait_for(lambda: not processes_of(run_path("broken")), 20)


def test_other_data_under_the_same_name_is_refused(make_config, data, tmp_path, one):
    other = shutil.copytree(data, tmp_path / "other")
    next((other / "train" / "2").iterdir()).unlink()
    shutil.copytree(one, one.parent / "one-copy")
    run = one.parent / "one-copy" / "run.json"
    write_json(run, read_json(run) | {"status": "stopped"})  # as if it had not ended
    with pytest.raises(launch.RunFailed, match="was started on other data: train_pictures was 96"):
        launch.train(make_config("one-copy", "local", data_dir=other))


WRONG_SIZE = """
import sys
from resnet_nb.data import datamodule
from resnet_nb.run import worker
planned = datamodule.ImageNetDataModule.size_at
datamodule.ImageNetDataModule.size_at = lambda self, epoch: 40 if self.trainer and self.trainer.global_rank == 1 else planned(self, epoch)
sys.exit(worker.main(sys.argv[1]))
"""


def test_ranks_with_different_sizes_stop_with_both_numbers(make_config, tmp_path):
    """A rank whose pictures are larger than planned, from its very first batch."""
    run_dir = launch.create_run(make_config("sizes", num_workers=1))
    (tmp_path / "wrong.py").write_text(WRONG_SIZE)
    words = launch.command(run_dir, 2)
    words[words.index("-m", words.index("--rdzv-backend")) :] = [str(tmp_path / "wrong.py"), str(run_dir)]
    assert subprocess.run(words, capture_output=True).returncode
    error = launch.first_error(run_dir, 1)["error"]
    assert "epoch 1: planned are pictures of 16 px, but rank 1 got 40 x 40 px" in error


def test_ranks_stop_when_their_starter_is_killed(make_config):
    """SIGKILL of torchrun leaves no orphans: the ranks save and leave."""
    config = make_config("orphans", epochs=40, image_sizes=[32])
    run_dir = launch.start(config)
    wait_for(lambda: epochs_begun(run_dir) >= 1)
    for line in processes_of(run_dir):
        if "resnet_nb.run.launch" in line or "torch.distributed.run" in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    wait_for(lambda: not processes_of(run_dir), 60)
    status = read_status(run_dir)
    assert status["status"] == "stopped" and "the process that started this one is gone" in status["reason"]
    assert list((run_dir / "checkpoints").glob("step-*"))


def test_a_signal_stops_ranks_together(make_config):
    config = make_config("signalled", epochs=40, image_sizes=[32])
    run_dir = launch.start(config)
    wait_for(lambda: epochs_begun(run_dir) >= 1)
    supervisor = next(line for line in processes_of(run_dir) if "resnet_nb.run.launch" in line)
    os.kill(int(supervisor.split()[0]), signal.SIGTERM)
    status = launch.follow(run_dir)
    assert status["status"] == "stopped" and "SIGTERM" in status["reason"]
    assert not processes_of(run_dir)
