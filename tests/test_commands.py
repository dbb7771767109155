"""The commands of the README, as a person types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from click.testing import CliRunner
from conftest import SMALL
from papermill.exceptions import PapermillExecutionError

from resnet_nb import cli
from resnet_nb.config import Hardware, Parameters, Recipe
from resnet_nb.data.index import cache_dir
from resnet_nb.run.checkpoints import find_run
from resnet_nb.run.folder import all_rows, create_run, read_status

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run(*words, cwd=ROOT):
    return subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def resnet_nb(*words, cwd=ROOT):
    return run(BIN / "resnet-nb", *words, cwd=cwd)


def outputs(notebook):
    cells = nbformat.read(notebook, 4).cells
    return {cell["id"]: cell.outputs for cell in cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def from_elsewhere(data, home):
    """`resnet-nb train`, typed in a folder that is not the project's, with a space in its path."""
    wish = json.dumps({"overrides": SMALL | {"epochs": 1, "image_sizes": [16]}, "data_dir": str(data), "recipe": "digits"})
    elsewhere = home / "some where"
    elsewhere.mkdir()
    return resnet_nb("train", "-p", "hw", "cpu2", "-p", "name", "2024_01", "-y", wish, cwd=elsewhere), home / "runs" / "2024_01"


def test_train_leaves_an_executed_notebook_with_its_curves(from_elsewhere):
    done, run_dir = from_elsewhere
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch   1/1 | train loss" in done.stdout and "done: " in done.stdout
    cells = outputs(run_dir / "train.ipynb")
    for cell in ("plot-plan", "plot-pictures", "plot-run"):
        assert any("image/png" in output.get("data", {}) for output in cells[cell]), cell
    assert not any(output.output_type == "error" for found in cells.values() for output in found)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_status(run_dir)["status"] == "completed"


def test_the_terminal_shows_one_line_an_epoch_and_no_warnings(from_elsewhere):
    done, _ = from_elsewhere
    assert done.stdout.count("epoch   1/1") == 1
    assert "warn" not in (done.stdout + done.stderr).lower(), done.stderr


def test_plot_writes_the_picture_of_the_notebook_again(from_elsewhere, home):
    _, run_dir = from_elsewhere
    before = (run_dir / "curves.png").read_bytes()
    (run_dir / "curves.png").unlink()
    assert resnet_nb("plot", "2024_01").returncode == 0
    assert (run_dir / "curves.png").read_bytes() == before
    assert resnet_nb("plot", run_dir, cwd=home).returncode == 0


def test_follow_and_stop_of_a_finished_run_say_so(from_elsewhere):
    followed = resnet_nb("follow", "2024_01")
    assert followed.returncode == 0 and followed.stdout.count("epoch   1/1") == 1
    assert "2024_01 is not running" in resnet_nb("stop", "2024_01").stdout


def papermill(*words, cwd):
    return run(BIN / "papermill", "--no-progress-bar", *words, cwd=cwd)


@pytest.fixture
def small_yaml(data, tmp_path):
    wish = {"overrides": SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu"}, "data_dir": str(data), "recipe": "digits"}
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(wish))
    return path


@pytest.mark.parametrize(
    ("ename", "code"),
    [("ValueError", 2), ("FileNotFoundError", 2), ("BadPicture", 3), ("DamagedFile", 3), ("DiskFull", 5), ("TypeError", 1)],
)
def test_a_page_ends_its_command_with_one_sentence_where_a_person_can_mend_it(ename, code, data, home, tmp_path, monkeypatch):
    data = shutil.copytree(data, tmp_path / "own")

    def execute(source, target, parameters):
        target.write_text(source.name)
        raise PapermillExecutionError(1, 1, "", ename, "what to do", ["a traceback"])

    monkeypatch.setattr(cli, "execute", execute)
    given = ["-p", "recipe", "digits", "-p", "data_dir", str(data)]
    for page, words in {
        "explore": ["explore", *given],
        "lr_find": ["lr-find", "--page", *given],
    }.items():
        result = CliRunner().invoke(cli.main, words)
        assert result.exit_code == code and ("\nError: what to do" in f"\n{result.output}") == (code > 1), result.output
        assert ("Error: TypeError: what to do (traceback: " in result.output) == (code == 1)  # the control: a programmer's
        assert (cache_dir(data) / f"{page}.ipynb").read_text() == f"{page}.ipynb"


@pytest.mark.parametrize(("loss", "words"), [(None, "loss not a number on 23 pictures"), (0.25, "loss 0.2500 on 23 pictures")])
def test_the_page_of_a_run_says_a_loss_that_is_no_number(loss, words, capsys):
    cells = {cell["id"]: cell["source"] for cell in nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells}
    row = {"epoch": 1, "val/acc": 0.5, "val/acc5": 1.0, "val/f1": 0.5, "val/loss": loss, "val/seen": 23}
    config = SimpleNamespace(recipe=SimpleNamespace(expected_acc=None))
    exec(cells["result"], {"read_status": lambda run_dir: {"best": row, "last": row}, "run_dir": None, "config": config})
    assert capsys.readouterr().out.count(words) == 2


def test_plain_papermill_works_from_another_folder(small_yaml, tmp_path, home):
    out = tmp_path / "out.ipynb"
    done = papermill(ROOT / "nbs" / "train.ipynb", out, "-p", "hw", "cpu2", "-r", "name", "plain", "-f", small_yaml, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any("image/png" in output.get("data", {}) for output in outputs(out)["plot-run"])
    assert read_status(home / "runs" / "plain")["attempts"][0]["world_size"] == 2


def test_plain_papermill_refuses_a_misspelt_parameter(small_yaml, tmp_path, home):
    done = papermill("nbs/train.ipynb", tmp_path / "out.ipynb", "-p", "hww", "cpu2", "-r", "name", "misspelt", "-f", small_yaml, cwd=ROOT)
    assert done.returncode != 0 and "unknown parameter 'hww'; did you mean 'hw'?" in done.stderr
    assert not (home / "runs" / "misspelt").exists()


@pytest.fixture
def empty_class(data, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
    return tmp_path / "data"


BAD = {
    "hww=g5": "unknown parameter 'hww'; did you mean 'hw'?",
    "hw=g6": "unknown hw 'g6'; did you mean 'g5'?",
    "hw=g5": "hw=g5 needs 4 CUDA devices, this machine has",
    "recipe=imagenete": "unknown recipe 'imagenete'; did you mean 'imagenet",
    "name=../x": "run name '../x' is not allowed",
    "seed=-1": "seed=-1: input should be greater than or equal to 0",
    "numerics=exakt": "numerics='exakt'",
    "epochs=2": "unknown parameter 'epochs'; epochs (passes over the training set), in overrides: {epochs: …}",
    "lr=0.1": "unknown parameter 'lr'; peak_lr (learning rate at its highest, for the global batch), in overrides: {peak_lr: …}",
    "batch_size=32": "in overrides: {microbatch_size: …}",
    "overrides={learning_rate: 1}": "unknown field 'learning_rate' in overrides; did you mean 'peak_lr'?",
    "overrides={epochs: 0}": "epochs=0: input should be greater than or equal to 1",
    "overrides={peak_lr: -1}": "peak_lr=-1: input should be greater than 0",
    "overrides={epoch: 3}": "unknown field 'epoch' in overrides; did you mean 'epochs'?",
    "overrides={devices: 3, accelerator: cpu}": "num_microbatches=8 cannot be shared evenly by 3 devices; use 1, 2, 4 or 8",
    "overrides={num_microbatches: 10000000001, devices: 2, accelerator: cpu}": "cannot be shared evenly by 2 devices; use 1, 101 or 3541 devices, here",
    "overrides={arch: resnet19}": "unknown arch 'resnet19'; did you mean 'resnet1",
    "overrides={arch: vit_b_16, image_sizes: [64]}": "arch 'vit_b_16' can't take pictures of 64 px",
    "overrides={num_microbatches: 1024}": "1437 training pictures leave fewer than 2 for each of 1024 microbatches",
    "data_dir=/no/such/folder": "data_dir '/no/such/folder' is not a folder",
    "data_dir=EMPTY": "has no pictures; add some or remove it",
}


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_one_sentence_before_anything_starts(given, home, empty_class):
    name, value = given.split("=", 1)
    words = ["-y", f"overrides: {value}"] if name == "overrides" else ["-p", name, value.replace("EMPTY", str(empty_class))]
    data = [] if name == "data_dir" else ["-p", "data_dir", str(home / "all digits")]
    before = set((home / "runs").glob("*")) if (home / "runs").exists() else set()
    recipe = (
        ["-p", "recipe", "digits"] if name not in ("recipe", "data_dir") else ["-p", "recipe", "imagenet"] if name == "data_dir" else []
    )
    done = resnet_nb("train", *recipe, *data, *words)
    assert done.returncode == 2
    assert BAD[given] in done.stderr
    assert "Traceback" not in done.stderr
    assert (set((home / "runs").glob("*")) if (home / "runs").exists() else set()) == before


def test_a_bad_picture_ends_the_command_with_one_sentence_and_the_traceback_is_in_the_log(data, tmp_path, home):

    broken = shutil.copytree(data, tmp_path / "broken")
    picture = sorted((broken / "val" / "1").iterdir())[0]
    picture.write_bytes(b"")
    wish = json.dumps(
        {"overrides": SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu"}, "data_dir": str(broken), "recipe": "digits"}
    )
    done = resnet_nb("train", "-p", "name", "cli-broken", "-y", wish)
    assert done.returncode == 3
    assert f"{str(picture)!r} can't be decoded as a picture" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in (home / "runs" / "cli-broken" / "logs" / "attempt-1-rank-0.log").read_text()


@pytest.mark.parametrize("command", ["train", "explore"])
def test_a_bad_picture_that_a_page_meets_first_ends_the_command_in_the_same_way(command, data, tmp_path, home):
    broken = shutil.copytree(data, tmp_path / "broken")
    for picture in (broken / "train").rglob("*.png"):
        picture.write_bytes(picture.read_bytes()[:50])
    overrides = SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu"}
    wish = json.dumps({"overrides": overrides, "data_dir": str(broken), "recipe": "digits", "name": "page-broken"})
    done = resnet_nb(command, "-y", wish)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"Error: '{broken}/train/" in done.stderr and "Traceback" not in done.stderr
    assert not (home / "runs" / "page-broken" / "logs" / "attempt-1.log").exists()


def test_a_torch_that_cannot_be_imported_is_one_sentence(tmp_path, home, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = resnet_nb("train", "-p", "recipe", "digits", "-y", "overrides: {arch: mobilenet_v2, accelerator: cpu}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Error: torch can't be asked here: ImportError: libcudart.so.12: no such file; see what" in done.stderr, done.stderr


def test_ctrl_c_saves_and_the_same_command_goes_on(data, home):
    import signal
    import time

    wish = json.dumps(
        {"overrides": SMALL | {"image_sizes": [32], "accelerator": "cpu", "epochs": 4}, "data_dir": str(data), "recipe": "digits"}
    )
    words = [str(BIN / "resnet-nb"), "train", "-p", "name", "ctrl-c", "-y", wish]
    command = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    run_dir, deadline = home / "runs" / "ctrl-c", time.monotonic() + 90
    while not any(row.get("note") == "epoch" and row["epoch"] for row in all_rows(run_dir)):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 75, said
    assert "stopped" in said and "resnet-nb train ctrl-c goes on" in said, said
    assert read_status(run_dir)["status"] == "stopped"
    done = resnet_nb("train", "ctrl-c")  # the name alone: recipe, data and overrides are those of the run
    assert done.returncode == 0 and "resumed at step" in done.stdout, done.stdout + done.stderr
    assert len(read_status(run_dir)["attempts"]) == 2
    assert read_status(run_dir)["status"] == "completed"


def test_runs_are_listed_and_a_name_of_none_has_the_nearest(from_elsewhere, home):
    listed = {run["name"]: run for run in json.loads(resnet_nb("runs", "--json").stdout)}
    assert listed["2024_01"].pop("age") < 3600 and listed["2024_01"] | {"best": 0, "last": 0} == {
        "name": "2024_01", "status": "completed", "epoch": 1, "epochs": 1, "step": 4, "best": 0, "last": 0, "recipe": "digits", "hw": "cpu2",
        "problem": "", "mirror": "",
    }  # fmt: skip
    assert len(resnet_nb("runs").stdout.splitlines()) == len(listed)
    done = resnet_nb("train", "2024_02")
    assert done.returncode == 2 and "there is no run '2024_02' to go on with; did you mean '2024_01'?" in done.stderr


def test_a_number_that_is_none_is_refused(tmp_path):
    for words in (["check", "data", str(tmp_path)], ["pack", str(tmp_path), str(tmp_path / "pack")]):
        refused = resnet_nb(*words, "--val-share", "nan")
        assert refused.returncode == 2 and "Invalid value for '--val-share': 'nan' is no number" in refused.stderr, refused.stderr


def test_help_says_every_parameter_and_field():
    said = resnet_nb("train", "--help").stdout
    for model in (Parameters, Recipe, Hardware):
        assert not [name for name in model.model_fields if f"  {name}: " not in said]
    assert "seed: whole number = 0 " in said and "class_weights: none | balanced" in said and "image_sizes: [whole number, …]" in said
    assert "photos" in said and "g5" in said and "Traceback" not in said


def test_runs_that_can_not_be_written_are_refused(data, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file where the folder should be")
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path))
    done = resnet_nb("train", "-p", "recipe", "digits", "-p", "data_dir", str(data), "-p", "name", "x")
    assert done.returncode == 2 and "can't be written" in done.stderr


IMAGENETTE = os.environ.get("IMAGENETTE_DIR", "")


@pytest.mark.skipif(not IMAGENETTE, reason="needs real photos: set IMAGENETTE_DIR to imagenette's class folders")
def test_real_photos_are_found_and_decoded():
    from resnet_nb.config import RECIPES
    from resnet_nb.data.splits import index_data
    from resnet_nb.data.transforms import load_train

    train, val = index_data(IMAGENETTE)
    assert (len(train), len(val), len(train.classes)) == (9469, 3925, 10)
    recipe = RECIPES["imagenette"]
    (picture, _), (again, _), (other, _) = load_train(train, 0, [(epoch, 0, 96) for epoch in (0, 0, 1)], recipe)
    assert (picture == again).all() and (picture != other).any()


def test_a_run_is_found_by_one_rule_by_commands_and_functions(make_config, tmp_path, monkeypatch):
    here = tmp_path / "here"
    monkeypatch.setenv("RESNET_NB_HOME", str(tmp_path / "home"))
    named = create_run(make_config("twice", "local"))
    for name in ("twice", "copied"):
        shutil.copytree(named, here / name)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    meant = {"twice": named, "./twice": here / "twice", "~/twice": here / "twice", "copied": here / "copied", str(named): named}
    assert {name: cli._find_run(name) for name in meant} == meant == {name: find_run(name) for name in meant}
    with pytest.raises(ValueError, match="there is no run 'twic'; did you mean 'twice'"):
        cli._find_run("twic")
    with pytest.raises(ValueError, match="no run in '.*here/none': it has no config.json"):
        cli._find_run("~/none")
