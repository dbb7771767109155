"""Machines that vanish: a notice from AWS, a mirror of the run, and a fresh machine, or one with fewer devices, that goes on to the same bits."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SMALL, STEPS, supervise_here, supervised, tensors, trained_here, wait_for

from resnet_nb.config import Hardware, Parameters
from resnet_nb.files import read_json
from resnet_nb.run import launch, mirror, plan, spot
from resnet_nb.run.checkpoints import STATE, checkpoints, commit_checkpoint, damage, partial_path, rotate, write_state
from resnet_nb.run.folder import RunBusy, append_rows, create_run, lock_run, read_rows, read_status, run_path
from resnet_nb.run.hardware import NO_DEVICES

PLANNED = "2026-05-04T12:02:00Z"


class Metadata(http.server.BaseHTTPRequestHandler):
    """The instance metadata service, version 2; a notice is there once `server.when()` says so."""

    def do_PUT(self):
        known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.reply(200 if known else 400, "a token")

    def do_GET(self):
        self.server.asked += 1
        notice = self.path == "/latest/meta-data/spot/instance-action" and self.server.when()
        if self.headers["X-aws-ec2-metadata-token"] != "a token":
            self.reply(401)
        else:
            self.reply(200 if notice else 404, json.dumps({"action": "terminate", "time": PLANNED}) if notice else "")

    def reply(self, code, text=""):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def metadata(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.asked, server.when = 0, lambda: False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(spot.ENDPOINT, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv(spot.DISABLED, raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def small_config(make_config):
    """A run in exact numerics on `devices` CPU processes, copied to `mirror`."""

    def make(name, mirror="", devices=1, seed=0):
        return make_config(name, "cpu2", seed=seed, numerics="exact", devices=devices, mirror=str(mirror), image_sizes=[16])

    return make


@pytest.fixture(scope="module")
def undisturbed(make_config):
    return trained_here(make_config("undisturbed", "cpu2", numerics="exact", devices=1, image_sizes=[16]))


def pulled(config, monkeypatch) -> Path:
    """Folder of a run that was pulled and supervised in this process, looking around often."""
    for module, name in ((spot, "POLL"), (mirror, "LOOK"), (mirror, "BEAT")):
        monkeypatch.setattr(module, name, 0.1)
    mirror.pull(config)
    return supervised(config)


def test_a_notice_saves_the_run_and_a_fresh_machine_goes_on_to_the_same_bits(
    metadata, small_config, undisturbed, home, tmp_path, monkeypatch
):
    config = small_config("taken", f"file://{tmp_path}/a mirror")
    metadata.when = lambda: len(read_rows(run_path("taken"), "step")) > STEPS
    run_dir = pulled(config, monkeypatch)
    status, newest = read_status(run_dir), checkpoints(run_dir)[0].name
    step = int(newest.removeprefix("step-"))
    assert status["status"] == "stopped" and STEPS < step < 3 * STEPS
    assert status["reason"] == f"AWS takes this machine at {PLANNED} (spot); saved at step {step}"
    copy = tmp_path / "a mirror" / "taken"
    assert [damage(copy / "checkpoints" / path.name) for path in checkpoints(run_dir)] == [""] * len(checkpoints(run_dir))
    assert read_json(copy / "run.json")["reason"] == status["reason"]
    assert launch.mirror_line(run_dir) == f"mirror: {newest} is in file://{tmp_path}/a mirror/taken"

    shutil.rmtree(run_dir)
    metadata.when = lambda: False
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path / "fresh machine"))
    said = []
    run_dir = launch.train(config, show=said.append)
    assert said[0] == f"{newest} comes from file://{tmp_path}/a mirror/taken" and said[1].startswith("epoch   1/3")
    assert f"resumed at step {step} (epoch {step // STEPS + 1}), attempt 2" in said
    assert [attempt["status"] for attempt in read_status(run_dir)["attempts"]] == ["stopped", "completed"]
    assert [row["step"] for row in read_rows(run_dir, "step")] == list(range(1, 3 * STEPS + 1))
    assert tensors(run_dir) == tensors(undisturbed)
    assert read_json(copy / "run.json")["status"] == "completed"
    assert launch.train(config, show=said.append) == run_dir  # it has ended; nothing is started, and nobody signs for it
    assert not (copy / mirror.OWNER).exists()


def test_the_same_command_ends_with_75_and_goes_on_elsewhere(metadata, data, tmp_path):
    command = [str(Path(sys.executable).with_name("resnet-nb")), "train", "-p", "recipe", "digits", "-r", "name", "by-command"]
    wish = {"overrides": SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu", "mirror": f"{tmp_path}/mirror"}}
    command += ["-r", "data_dir", str(data), "-y", json.dumps(wish)]

    def on(machine: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"RESNET_NB_HOME": str(tmp_path / machine)}
        return subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)

    metadata.when = lambda: True
    first = on("first")
    assert first.returncode == 75, first.stdout + first.stderr
    assert f"is stopped (AWS takes this machine at {PLANNED} (spot); saved at step " in first.stderr + first.stdout
    metadata.when = lambda: False
    second = on("second")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"comes from {tmp_path}/mirror/by-command" in second.stderr
    attempts = read_status(tmp_path / "second" / "runs" / "by-command")["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["stopped", "completed"]
    assert "execution" in (tmp_path / "mirror" / "by-command" / "train.ipynb").read_text()  # its notebook, to the end
    asked = [word.replace('"peak_lr": 0.01', '"peak_lr": 0.02') for word in command]
    other = subprocess.run(asked, capture_output=True, text=True, timeout=60, env=os.environ | {"RESNET_NB_HOME": str(tmp_path / "third")})
    assert other.returncode == 2 and "was trained with peak_lr=0.01, asked for is 0.02" in other.stderr


def test_a_mirror_that_goes_away_ends_no_run_and_outside_aws_nobody_is_asked(
    metadata, small_config, undisturbed, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv(spot.DISABLED, "true")
    metadata.when = lambda: True
    folder, config = tmp_path / "mirror", small_config("unreached", tmp_path / "mirror", seed=1)

    def take_away():
        wait_for(lambda: [*folder.glob("unreached/checkpoints/step-*/MANIFEST.json")])
        folder.rename(tmp_path / "gone")
        folder.touch()

    thief = threading.Thread(target=take_away)
    thief.start()
    run_dir = pulled(config, monkeypatch)
    thief.join()
    assert read_status(run_dir)["status"] == "completed" and metadata.asked == 0
    assert tensors(run_dir).keys() == tensors(undisturbed).keys() and tensors(run_dir) != tensors(undisturbed)  # of another seed
    line = launch.mirror_line(run_dir)
    assert line.startswith(f"mirror: {folder}/unreached was not reached since 20") and line.endswith("is on this machine alone")
    assert launch.describe_run("unreached")["mirror"] == line
    assert [text for text in capfd.readouterr().err.splitlines() if f"{folder}/unreached: " in text]  # in supervisor.log, else
    with pytest.raises(ValueError, match="can't be used: .*; mend that, or train without a mirror"):
        launch.start(config)


def made_up(run_dir, step):
    """A checkpoint with its row, and rotation; no network is needed for what follows."""
    append_rows(run_dir, [{"event": "step", "step": step, "epoch": 0, "attempt": 1}])
    write_state(partial_path(run_dir, step) / STATE, memoryview(bytes(5000) + bytes([step])))
    commit_checkpoint(run_dir, step, {"epoch": 0})
    rotate(run_dir, None, step)


@pytest.fixture
def mirrored(tmp_path, monkeypatch, make_config):
    """A run with two checkpoints on this machine and in its mirror; its configuration, folder and place."""
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path / "here"))
    config = make_config("copied", "local", mirror=str(tmp_path / "mirror"))
    run_dir, place = create_run(config), mirror.open_place(config.hardware.mirror, "copied")
    for step in (10, 20):
        made_up(run_dir, step)
    mirror.push(run_dir, place)
    return config, run_dir, place


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda newest: os.truncate(newest / "state.ckpt", 1000),
    "no state": lambda newest: (newest / "state.ckpt").unlink(),
    "no manifest": lambda newest: (newest / "MANIFEST.json").unlink(),
    "half a manifest": lambda newest: os.truncate(newest / "MANIFEST.json", 100),
    "a flipped bit": lambda newest: flip(newest / "state.ckpt"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_in_the_mirror_is_passed_over(how, mirrored, tmp_path, monkeypatch):
    config, run_dir, place = mirrored
    newest, before, *_ = checkpoints(run_dir)
    DAMAGES[how](Path(place.root) / "checkpoints" / newest.name)
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path / "fresh"))
    said = []
    assert mirror.pull(config, said.append)
    assert f"⚠️ Checkpoint {newest.name} of {place.url} is passed over: " in said[0] and said[1] == f"{before.name} comes from {place.url}"
    found = checkpoints(run_path("copied"))
    assert [path.name for path in found] == [before.name] and not damage(found[0])
    assert (run_path("copied") / "metrics.jsonl").read_bytes() == (run_dir / "metrics.jsonl").read_bytes()


def test_a_push_cut_off_anywhere_leaves_the_older_checkpoints_whole(mirrored, monkeypatch):
    _, run_dir, place = mirrored
    older = [path.name for path in checkpoints(run_dir)]
    made_up(run_dir, 30)  # and the oldest is rotated away
    newer = checkpoints(run_dir)[0]
    usual, there = mirror._copy, Path(place.root) / "checkpoints"

    def cut(source, target=None):
        if target:
            target.write(source.read(1000))
            raise ConnectionError("cut off")
        return usual(source)

    monkeypatch.setattr(mirror, "_copy", cut)
    with pytest.raises(ConnectionError):
        mirror.push(run_dir, place)
    assert [damage(there / name) for name in older] == ["", ""]
    assert (there / newer.name / "state.ckpt").stat().st_size == 1000 and damage(there / newer.name)
    monkeypatch.setattr(mirror, "_copy", usual)
    mirror.push(run_dir, place)
    assert not damage(there / newer.name) and not (there / older[-1]).exists()
    lost = lambda source, target=None: usual(source, target) if target else {"sha256": "", "bytes": 0}  # the store kept other bytes
    monkeypatch.setattr(mirror, "_copy", lost)
    (there / newer.name / "MANIFEST.json").unlink()
    with pytest.raises(OSError, match="0 bytes were read back"):
        mirror.push(run_dir, place)
    assert damage(there / newer.name) == "its MANIFEST.json is missing or unreadable"


def test_a_run_that_is_further_here_is_left_as_it_is(mirrored):
    config, run_dir, place = mirrored
    shutil.rmtree(Path(place.root) / "checkpoints" / checkpoints(run_dir)[0].name)
    (Path(place.root) / "metrics.jsonl").write_text("older\n")
    before = {path: path.read_bytes() for path in run_dir.rglob("*.json*") if path.name != "mirror.json"}
    assert not mirror.pull(config, print)
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(run_dir / "checkpoints")
    assert mirror.pull(config) and (run_dir / "metrics.jsonl").read_text() == "older\n"  # the control: further there


def test_a_machine_that_trains_keeps_others_away_until_it_has_ended_or_is_gone(mirrored, tmp_path, monkeypatch):
    config, run_dir, place = mirrored
    monkeypatch.setattr(mirror, "BEAT", 0.2)
    monkeypatch.setattr("resnet_nb.run.place.SILENCE", 2.0)
    monkeypatch.setattr(mirror, "LOOK", 0.2)
    said = []
    with mirror.keep_mirror(run_dir, config.hardware.mirror):
        wait_for(lambda: (Path(place.root) / mirror.OWNER).exists())
        time.sleep(1)  # signatures name whole seconds
        monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path / "fresh"))
        with pytest.raises(
            RunBusy, match=f"run 'copied' is being trained by process {os.getpid()} on .*stop it there, or choose another name"
        ):
            mirror.pull(config, said.append)
        assert said[0].endswith("2 s will show whether it still is")
    assert mirror.pull(config, said.append) and len(said) == 2  # it has ended: nobody waits
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path / "third"))
    assert mirror.pull(config, said.append)  # the second machine has signed, and is gone without a word
    assert "was written by process" in said[2]


DIES = """
import os, signal, sys
from resnet_nb.learn import module
from resnet_nb.run import worker
usual, calls = module.ResNetModule.training_step, []
def training_step(*args, **kwargs):
    calls.append(None)
    if len(calls) > 6 and os.environ["RESNET_NB_ATTEMPT"] == "1" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(*args, **kwargs)
module.ResNetModule.training_step = training_step
sys.exit(worker.main(sys.argv[1]))
"""


@pytest.fixture
def all_devices(small_config, monkeypatch):
    """all_devices(name, left): a run that takes all devices there are, for which four processes stand; `left` are found after a failure."""

    def make(name, left):
        config = small_config(name, devices=4)
        processes = Hardware(**config.hardware.model_dump() | {"devices": left})
        monkeypatch.setattr(plan, "find_devices", functools.cache(lambda: NO_DEVICES))
        monkeypatch.setattr(plan, "_hardware", lambda parameters: processes)
        return config.model_copy(update={"hw": "cuda", "parameters": Parameters(hw="cuda", name=name)})

    return make


def test_a_run_on_four_goes_on_with_two_by_itself_to_the_same_bits(all_devices, undisturbed, tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text(DIES)
    run_dir, said = supervise_here(all_devices("four-then-two", 2), tmp_path / "dies.py", monkeypatch=monkeypatch), []
    status = launch.follow(run_dir, said.append)
    assert [(attempt["status"], attempt["world_size"]) for attempt in status["attempts"]] == [("failed", 4), ("completed", 2)]
    assert "killed by SIGKILL" in status["attempts"][0]["reason"]
    assert f"resumed at step {STEPS} (epoch 2), attempt 2, goes on with 2 devices, had 4" in said
    assert tensors(run_dir) == tensors(undisturbed)


def test_devices_that_cannot_share_the_microbatches_end_it_with_one_sentence(all_devices, monkeypatch):
    def attempt(run_dir, config, lock, attempts, begun):
        append_rows(run_dir, [{"event": "step", "step": 1, "epoch": 0, "attempt": len(attempts) + 1}])
        return {"status": "failed", "reason": "a rank was killed", "kind": ""}

    monkeypatch.setattr(launch, "_attempt", attempt)
    run_dir = create_run(all_devices("four-then-three", 3))
    with lock_run(run_dir) as lock:
        launch.supervise(run_dir, lock.fileno())
    status = read_status(run_dir)
    assert (status["status"], len(status["attempts"])) == ("failed", 1)
    with pytest.raises(launch.RunFailed, match="cannot be shared evenly by 3 devices; use 1, 2 or 4 devices") as failure:
        launch.follow(run_dir)
    assert failure.value.code == 2 and "before that: a rank was killed" in str(failure.value) and "\n" not in str(failure.value)
