"""The same bits: for any number of processes and data workers, and after any kill."""

import shutil
import subprocess

import pytest
from click.testing import CliRunner
from conftest import tensors, trained_here

from resnet_nb import cli
from resnet_nb.files import read_json, write_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import STATE, checkpoint_path, checkpoints
from resnet_nb.run.folder import create_run, lock_run, read_rows

SHORT = {"epochs": 2, "image_sizes": [16, 24], "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "ema_decay": 0.9}


def digests(run_dir):
    return [(row["step"], row["digest"]) for row in read_rows(run_dir, "step")]


def validation(run_dir):
    """Loss, accuracy, top-5, F1 and count of every epoch."""
    return [{name: value for name, value in row.items() if name.startswith("val/")} for row in read_rows(run_dir, "val")]


@pytest.fixture(scope="module")
def exact(make_config):
    """exact(devices, num_workers, ...): folder of a finished run in exact numerics."""

    def train(devices, num_workers=0, name=None, numerics="exact", **more):
        name = name or f"{numerics}-{devices}-{num_workers}"
        return launch.train(make_config(name, numerics=numerics, devices=devices, num_workers=num_workers, **(SHORT | more)))

    return train


@pytest.fixture(scope="module")
def reference(exact):
    """One process, no data workers, never interrupted."""
    return exact(1)


@pytest.mark.parametrize("devices, num_workers", [(2, 1), (4, 0), (1, 3)])
def test_bits_do_not_depend_on_processes_and_workers(exact, reference, devices, num_workers):
    other = exact(devices, num_workers)
    names = " ".join(tensors(reference))
    assert all(part in names for part in ("network.conv1.weight momentum_buffer", "network.bn1.running_var", "ema.module.bn1.running_var"))
    assert tensors(other) == tensors(reference)
    assert digests(other) == digests(reference)
    assert validation(other) == validation(reference)  # on 23 pictures, which share out evenly over no number of ranks


def test_close_has_the_same_stream_and_other_bits(exact, reference):
    close = exact(2, numerics="close")
    assert digests(close) == digests(reference)
    assert tensors(close) != tensors(reference)
    assert validation(close) != validation(reference)


def test_another_seed_has_another_stream_and_other_bits(make_config, reference):
    other = trained_here(make_config("exact-seed-1", "local", seed=1, numerics="exact", **SHORT))
    assert not set(digests(other)) & set(digests(reference))
    counts = ("num_batches_tracked", "n_averaged")  # of steps: the same for all seeds
    names = [name for name in tensors(reference) if not name.endswith(counts)]
    same = [name for name in names if tensors(other)[name] == tensors(reference)[name]]
    assert "network.conv1.weight" not in same and len(same) < 0.02 * len(names), same


def test_verify_and_reproduce_say_so(reference, exact):
    def said(*words):
        result = CliRunner().invoke(cli.main, [str(word) for word in words])
        return result.exit_code, result.output

    again = said("reproduce", reference.name, "--hw", "cpu2", "--name", "again")
    assert again[0] == 0 and "digest is the same in all 8 steps" in again[1], again[1]
    assert "have the same sha256" in again[1]
    assert said("verify", reference.name, "again")[0] == 0
    assert said("verify", reference.name)[0] == 0
    close = [exact(devices, numerics="close").name for devices in (1, 2)]
    code, text = said("verify", reference.name, close[0])
    assert code == 2 and "NOT COMPARABLE  numerics is exact and close" in text, text
    code, text = said("verify", *close)
    assert code == 1 and "train/step_loss differs first at step" in text and "first differs network." in text, text


@pytest.mark.parametrize("first, then", [(2, 1), (1, 4)])
def test_stopped_in_mid_epoch_and_resumed_on_another_world_size_is_the_same(make_config, reference, first, then):
    name = f"on-{first}-then-{then}"
    run_dir = launch.start(make_config(name, numerics="exact", devices=first, **SHORT))
    launch.stop(run_dir)
    launch.follow(run_dir)
    assert checkpoints(run_dir)[0].name == "step-00000001"
    launch.train(make_config(name, numerics="exact", devices=then, **SHORT))
    assert tensors(run_dir) == tensors(reference)
    assert digests(run_dir) == digests(reference)
    assert validation(run_dir) == validation(reference)


def test_checkpoints_within_an_epoch_change_no_bit(exact, reference):
    often = exact(2, 1, name="often", checkpoint_minutes=1e-6)  # after every step
    assert tensors(often) == tensors(reference)
    assert digests(often) == digests(reference)
    assert validation(often) == validation(reference)
    assert {path.name for path in checkpoints(often)} >= {"step-00000007", "step-00000008"}  # two newest; an epoch has four steps
    assert "step-00000007" not in {path.name for path in checkpoints(reference)}


def stopped_at_once(config):
    run_dir = launch.start(config)
    launch.stop(run_dir)
    launch.follow(run_dir)
    return run_dir


def test_what_a_run_saves_stays_though_checkpoints_of_later_steps_are_damaged(make_config, reference):
    config = make_config("another-way", numerics="exact", devices=1, **SHORT)
    run_dir = stopped_at_once(config)
    for step in (6, 7):
        shutil.copytree(checkpoint_path(run_dir, 1), checkpoint_path(run_dir, step))
        (checkpoint_path(run_dir, step) / STATE).write_bytes(b"damaged")
    stopped_at_once(config)
    assert [path.name for path in checkpoints(run_dir)] == ["step-00000002", "step-00000001"]
    launch.train(config)
    assert [row["step"] for row in read_rows(run_dir, "note") if row["note"] == "start"][-1] == 2
    assert tensors(run_dir) == tensors(reference)


def test_an_exact_run_is_not_resumed_in_another_numerics_class(make_config, reference):
    def config(**more):
        return make_config("other-class", numerics="exact", devices=1, **(SHORT | more))

    run_dir = stopped_at_once(config())
    with pytest.raises(launch.RunFailed, match="threads_per_rank was 1, is 2; exact numerics can't promise the same bits then"):
        launch.train(config(precision="bf16-mixed", num_threads=2))
    launch.train(config())  # as it was
    assert tensors(run_dir) == tensors(reference)
    assert "numerics class" not in (run_dir / "train.log").read_text()


def test_a_close_run_goes_on_in_another_numerics_class_and_says_so(make_config):
    config = make_config("close-class", "local", **SHORT)
    run_dir = stopped_at_once(config)
    launch.train(make_config("close-class", "local", **(SHORT | {"num_threads": 2})))
    said = "goes on under another numerics class: threads_per_rank was 1, is 2"
    assert (run_dir / "train.log").read_text().count(said) == 1
    assert ["warning" in attempt for attempt in read_json(run_dir / "manifest.json")["attempts"]] == [False, True]
    verified = CliRunner().invoke(cli.main, ["verify", "close-class"])
    assert "attempt 2 ran under another numerics class: threads_per_rank was 1, then 2" in verified.output and verified.exit_code == 0


# Where a rank kills itself, in its second epoch: a patch of the worker, run instead of `-m resnet_nb.run.worker`
KILL = """
import functools, os, signal, sys
import torch
from resnet_nb.data import datamodule
from resnet_nb.learn import module, numerics
from resnet_nb.run import checkpoints, stopping, worker

def dying(owner, name, when, after=False):
    whole = getattr(owner, name)
    @functools.wraps(whole)
    def call(*args, **kwargs):
        dies = when(*args)
        if dies and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*args, **kwargs)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

calls = 0
def nth(n):
    def when(*args):
        global calls
        calls += 1
        return calls > n
    return when

at, steps_before, microbatches = sys.argv[2], 5, int(sys.argv[3])
if at == "data wait":
    dying(datamodule.KeyedImages, "__getitems__", lambda self, keys: self.train and keys[0].epoch == 1)
if at == "forward":
    dying(module.ResNetModule, "training_step", nth(steps_before * microbatches + 1))
if at == "gradient sum":
    dying(numerics.GradientSum, "write_mean", nth(steps_before))
if at == "optimizer step":
    dying(torch.optim.SGD, "step", nth(steps_before), after=True)
if at == "checkpoint write":
    dying(stopping, "commit_checkpoint", lambda run_dir, step, about: step == 8)
if at == "after its rename":
    dying(stopping, "rotate", lambda run_dir, *steps: (run_dir / "checkpoints/step-00000008").exists())
sys.exit(worker.main(sys.argv[1]))
"""
PLACES = {"data wait": 1, "forward": 2, "gradient sum": 2, "optimizer step": 1, "checkpoint write": 2, "after its rename": 1}


@pytest.mark.parametrize("at", PLACES)
def test_a_killed_run_goes_on_to_the_same_bits_on_another_world_size(at, make_config, reference, tmp_path):
    devices = PLACES[at]
    name = "killed-" + at.replace(" ", "-")
    config = make_config(name, numerics="exact", devices=devices, **SHORT)
    run_dir = create_run(config)
    (tmp_path / "kill.py").write_text(KILL)
    words = launch.command(run_dir, devices)
    words[len(words) - 3 :] = [str(tmp_path / "kill.py"), str(run_dir), at, str(4 // devices)]
    with lock_run(run_dir):
        killed = subprocess.run(words, capture_output=True, text=True)
    assert killed.returncode and not read_json(run_dir / "metrics.json"), "the rank lived to the end"
    write_json(run_dir / "run.json", {"status": "failed", "reason": "killed", "attempts": [{"attempt": 1}]})
    expected = "step-00000008" if at == "after its rename" else "step-00000004"
    assert checkpoints(run_dir)[0].name == expected
    launch.train(make_config(name, numerics="exact", devices=3 - devices, **SHORT))
    assert tensors(run_dir) == tensors(reference)
    assert digests(run_dir) == digests(reference)
    assert validation(run_dir) == validation(reference)
    assert [row["epoch"] for row in read_json(run_dir / "metrics.json")["val"]] == [0, 1]


@pytest.mark.parametrize(
    "kept, how, control",
    [
        ("lookahead_slow_buff", {"optimizer": "radam", "lookahead": 3}, {"lookahead": 0}),
        ("momentum_buffer", {"optimizer": "muon"}, {"optimizer": "sgd"}),
    ],
    ids=["lookahead", "muon"],
)
def test_exact_bits_hold_with_optimizers_of_timm_after_a_stop(make_config, request, kept, how, control):
    pytest.importorskip("timm")
    name, how = request.node.callspec.id, SHORT | how | {"peak_lr": 1e-3, "devices": 1}
    whole = trained_here(make_config(name, numerics="exact", **how))
    assert f"network.conv1.weight {kept}" in tensors(whole)
    run_dir = stopped_at_once(make_config(f"{name}-stopped", numerics="exact", **how))
    launch.train(make_config(f"{name}-stopped", numerics="exact", **(how | {"devices": 2})))
    assert tensors(run_dir) == tensors(whole)
    without = trained_here(make_config(f"no-{name}", numerics="exact", **(how | control)))
    assert tensors(without)["network.conv1.weight"] != tensors(whole)["network.conv1.weight"]
