"""What a run needs is said before it starts, and what it would cost is measured by processes that leave nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import SMALL

from resnet_nb import cli
from resnet_nb.data import datamodule
from resnet_nb.learn.network import step_size
from resnet_nb.run import hardware
from resnet_nb.run.folder import run_path
from resnet_nb.run.forecast import before_lines, beside_lines, parity, parity_config
from resnet_nb.run.hardware import STEP_SIZES, check_machine

COMMAND = str(Path(sys.executable).with_name("resnet-nb"))
FEW = SMALL | {"epochs": 2, "image_sizes": [16, 24], "accelerator": "cpu"}


def check_hw(data, *more, **overrides):
    wish = json.dumps({"overrides": FEW | overrides})
    return ["check", "hw", "local", "-p", "recipe", "digits", "-r", "data_dir", str(data), "-y", wish, *more]


def output_of(*words, before="", **environment):
    line = ["bash", "-c", f'{before} exec "$0" "$@"', COMMAND, *words]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment, stdin=subprocess.DEVNULL, timeout=300)


def trials(home):
    return list((home / "data" / "cache").glob("trial-*"))


def test_numbers_that_are_kept_so_that_nobody_waits_for_torch_are_torchs():
    assert hardware.BUFFERS == datamodule.BUFFERS
    for arch, (parameters, per_pixel) in STEP_SIZES.items():
        counted, kept = step_size(arch, 224)
        assert counted == parameters and abs(kept / 224**2 / per_pixel - 1) < 0.002, arch
    assert step_size("resnet50", 128)[1] < step_size("resnet50", 224)[1] / 3  # the control: it is measured


def test_a_forecast_is_measured_kept_and_later_stands_beside_the_run(home, data, make_config, one):
    done = output_of(*check_hw(data, "--seconds", "0.1", "--price-per-hour", "2", "--json"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["image_size"] for row in found["sizes"]] == [16, 24] and found["price"] == 2 * found["hours"] > 0
    assert all(row["pictures_per_second"] > 0 and 0 <= row["data_wait"] <= 1 and row["peak_memory"] > 1e8 for row in found["sizes"])
    assert "the whole schedule takes about" in done.stderr and all(check["problem"] == "" for check in found["checks"])
    assert trials(home) == []
    config = make_config("forecast", "local", epochs=2, image_sizes=[16, 24])
    (small,) = beside_lines(one, config, check_machine(config))[:1]  # what `one` measured at its first size
    assert "16 px" in small and f"(forecast: {found['sizes'][0]['pictures_per_second']:,.0f} pictures/s" in small
    assert [line[:8] for line in before_lines(config)[:2]] == ["  16 px ", "  24 px "]
    other = make_config("other", "local", epochs=3)
    assert before_lines(other)[0].startswith("how long it takes here is not measured yet: resnet-nb check hw")
    assert "forecast" not in beside_lines(one, other, check_machine(other))[0]


def test_two_processes_are_measured_together(home, data):
    done = output_of(*check_hw(data, "--seconds", "0.1", "--json", devices=2, num_workers=1, image_sizes=[16], epochs=1))
    assert done.returncode == 0 and len(json.loads(done.stdout)["sizes"]) == 1, done.stderr
    assert trials(home) == []


@pytest.mark.parametrize(
    "before, environment, overrides, says",
    [
        ("ulimit -n 60;", {}, {}, "raise it with ulimit -n 128"),
        ("", {"RESNET_NB_HOME": "/sys"}, {}, "run folder '/sys' can't be written, locked and renamed in"),
        ("", {}, {"microbatch_size": 10**9}, "lower microbatch_size"),
        ("", {}, {"microbatch_size": 10**7, "num_workers": 4}, "use fewer num_workers (now 4)"),
    ],
)
def test_what_is_short_is_said_with_the_number_to_change_and_nothing_starts(home, data, before, environment, overrides, says):
    words = check_hw(data, **overrides)
    done = output_of(*words, before=before, **environment)
    assert done.returncode == 1 and says in done.stdout, done.stdout + done.stderr
    train = ["train", *words[3:], "-r", "name", "short"]
    done = output_of(*train, before=before, **environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not run_path("short").exists(), done.stderr


def test_a_trial_that_fails_is_told_in_one_sentence_and_leaves_nothing(home, data, tmp_path):
    subprocess.run(["cp", "-r", data, tmp_path / "bad"], check=True)
    for path in (tmp_path / "bad" / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    result = CliRunner().invoke(cli.main, check_hw(tmp_path / "bad", "--seconds", "0"))
    assert result.exit_code == 3 and "the trial failed, as the run would: BadPicture: " in result.output, result.output
    assert str(tmp_path / "bad" / "train") in result.output and trials(home) == []


def test_parity_holds_between_kernels_and_not_where_updates_differ_a_little(home):
    result = CliRunner().invoke(cli.main, ["check", "hw", "local", "--parity"])
    assert result.exit_code == 0, result.output  # with only a CPU there is nothing to compare; with an accelerator, they agree
    reference = parity_config(accelerator="cpu", num_threads=1)
    same = parity(reference, parity_config(accelerator="cpu", num_threads=1, channels_last=True))  # other kernels
    assert same["same"] and len(same["losses"][0]) == 20 and same["losses"][0] != same["losses"][1], same
    other = parity(reference, parity_config(accelerator="cpu", num_threads=1, momentum=0.8))
    assert not other["same"] and other["losses"][0][0] == other["losses"][1][0], other
    assert trials(home) == []
