"""The range test as a person starts it: it leaves no run, ends with what was found at Ctrl-C, and its rates train."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, run_here, wait_for

from resnet_nb.results.lr_find import range_test, suggest
from resnet_nb.run.folder import read_rows
from resnet_nb.run.plan import validate

TEST = [Path(sys.executable).parent / "resnet-nb", "lr-find", "-p", "recipe", "digits"]
ON_CPU = ["-y", json.dumps({"overrides": SMALL | {"accelerator": "cpu"}})]


@pytest.fixture(scope="module")
def found(make_config):
    config = make_config("never", "local")
    return range_test(config, validate(config)[0], steps=60)


def test_a_suggested_rate_trains_and_one_from_the_end_does_not(found, make_config):
    suggestions, problem = suggest(found.rates, found.losses)
    assert [s.name for s in suggestions] == ["steepest", "minimum"] and not problem and found.ended == "the loss diverged"

    def last_loss(name, rate):
        run_dir, _ = run_here(make_config(name, "local", peak_lr=rate, image_sizes=[16], epochs=4))
        return read_rows(run_dir, "val")[-1]["val/loss"]

    start = found.losses[:5].mean()
    assert all(last_loss(s.name, s.peak_lr) < start for s in suggestions)
    assert not last_loss("wild", float(found.rates[-1])) < start  # the control


def test_variables_left_in_a_shell_do_not_steer_it(make_config, monkeypatch):
    for name, value in {"FAST_DEV_RUN": "1", "LIMIT_TRAIN_BATCHES": "2"}.items():  # one step, or half of one
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    before, config = os.environ.copy(), make_config("never", "local")
    assert len(range_test(config, validate(config)[0], highest=1e-4, steps=10).losses) == 10
    assert os.environ == before


def test_no_run_is_made_and_nothing_of_one_is_touched(one, data, home):
    before = {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")}
    said = subprocess.check_output([*TEST, "-p", "data_dir", data, *ON_CPU, "--steps", "20", "--json"], text=True)
    assert len(json.loads(said)["losses"]) <= 20
    assert {path: path.stat().st_mtime_ns for path in (home / "runs").rglob("*")} == before


# the command, which makes a file once a step is done
TELLS = """
import sys
from pathlib import Path
from resnet_nb.cli import main
from resnet_nb.results.lr_find import RisingRate
usual, done = RisingRate.on_train_batch_end, Path(sys.argv.pop(1))
def on_train_batch_end(self, *words):
    usual(self, *words)
    if self.losses:
        done.touch()
RisingRate.on_train_batch_end = on_train_batch_end
main()
"""


def test_ctrl_c_tells_what_was_found_so_far(data, tmp_path):
    test = subprocess.Popen(
        [sys.executable, "-c", TELLS, tmp_path / "done", *TEST[1:], "-p", "data_dir", data, *ON_CPU, "--steps", "100000", "--highest", "1e-4"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "done").exists() or test.poll() is not None, 200)
        if test.poll() is None:
            os.killpg(test.pid, signal.SIGINT)  # as a terminal does
        wait_for(lambda: test.poll() is not None, 120)
    finally:
        test.kill()
    said, errors = test.communicate()
    assert "it was interrupted" in said and "steps at 16 px" in said, errors
    assert "Traceback" not in errors
