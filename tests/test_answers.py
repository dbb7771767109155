"""What a finished run is used for: evaluated, asked, exported, from the command line."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from conftest import NUM_VAL

from resnet_nb.cli import main
from resnet_nb.data.index import cache_dir
from resnet_nb.data.inspect import inspected
from resnet_nb.files import read_json
from resnet_nb.results import evaluate as results
from resnet_nb.results.answers import find_files, predict_files, write_table
from resnet_nb.results.evaluate import evaluate, load_network
from resnet_nb.results.export import WRITERS, export
from resnet_nb.run.checkpoints import STATE, best_checkpoint
from resnet_nb.run.folder import best_epoch


def typed(*words, fails=False):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert bool(result.exit_code) == fails, result.output
    return result.stdout if not fails else result.output


def test_a_run_of_two_processes_is_judged_as_it_judged_itself_each_picture_once(two, data):
    numbers = json.loads(typed("evaluate", two, "--json"))
    assert numbers["pictures"] == NUM_VAL
    assert round(numbers["top1"]["value"] * NUM_VAL) == round(best_epoch(two)["val/acc"] * NUM_VAL)
    assert numbers["top1"]["low"] < numbers["top1"]["value"] < numbers["top1"]["high"]
    assert read_json(two / "evaluation.json") == numbers
    paths = pq.read_table(two / "predictions.parquet")["path"].to_pylist()
    assert sorted(paths) == sorted(str(path.relative_to(data / "val")) for path in (data / "val").rglob("*.png"))
    other = json.loads(typed("evaluate", two, "--json", "--image-size", 40))
    assert (other["image_size"], other["loss"] != numbers["loss"]) == (40, True)


def test_the_page_of_an_evaluation_has_its_figures_and_lies_in_the_run(one):
    said = typed("evaluate", one)
    assert "top-1" in said and "page: " in said
    cells = {cell["id"]: cell for cell in nbformat.read(one / "evaluate.ipynb", 4).cells}
    for name in ("confusion", "calibration", "unsure", "sizes"):
        assert any("image/png" in output.get("data", {}) for output in cells[name]["outputs"]), name
    assert cells["export"]["outputs"] == []  # files are written where they are asked for


def test_what_can_not_be_judged_is_one_sentence(one, data, tmp_path):
    assert "has no folder for testing" in typed("evaluate", one, "--no-page", "--split", "test", fails=True)
    assert "has no folder for testing" in typed("evaluate", one, "--split", "test", fails=True)
    shutil.copytree(data, tmp_path / "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "3").rename(tmp_path / "renamed" / split / "three")
    said = typed("evaluate", one, "--no-page", "--data-dir", tmp_path / "renamed", fails=True)
    assert "the data has a class 'three', and the network has 0 of that name" in said


def test_a_test_folder_is_judged_though_no_run_reads_it(one, data, tmp_path):
    shutil.copytree(data, tmp_path / "tested")
    (tmp_path / "tested" / "val").rename(tmp_path / "tested" / "test")
    shutil.copytree(tmp_path / "tested" / "train", tmp_path / "tested" / "val")
    tested = evaluate(one, "test", data_dir=tmp_path / "tested").table
    assert tested.equals(evaluate(one, data_dir=data).table)
    assert not tested.equals(evaluate(one, data_dir=tmp_path / "tested").table)


def test_places_may_begin_with_the_home_folder(one, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(data, tmp_path / "own")
    (tmp_path / "tested").mkdir()
    (tmp_path / "tested" / "test").symlink_to(data / "val")
    network = load_network(one)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    said = json.loads(typed("evaluate", one, "--json", "--data-dir=~/own"))
    assert said["pictures"] == NUM_VAL and inspected("~/own")[0]["data_dir"] == str(tmp_path / "own")
    size = {"image_size": network.preprocess.size}
    answers = [evaluate(one, "test", data_dir="~/tested"), evaluate("~/w.pth", data_dir="~/own", arch="resnet18", **size)]
    assert [len(one.table) for one in answers] == [NUM_VAL] * 2 and results.test_index(one, "~/tested")
    write_table(predict_files(network, ["~/own/val/1"]), Path("~/answers.csv"))
    assert (tmp_path / "answers.csv").exists() and export(one, ("safetensors",), "~/out")[0].path.parent == tmp_path / "out"
    (tmp_path / "~nobody.png").write_bytes(next((data / "val" / "1").iterdir()).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert find_files(["~nobody.png"]) == [Path("~nobody.png")]  # the control: a name, and nobody's home


def test_pictures_are_answered_bad_ones_named_and_the_table_is_written(one, data, tmp_path):
    own = tmp_path / "my pictures"
    shutil.copytree(data / "val" / "2", own / "deep")
    (own / "a.png").write_bytes(b"<html>not found</html>")
    said = typed("predict", one, own, "--out", tmp_path / "answers.csv", "--json")
    rows = json.loads(said)
    assert len(rows) == 1 + len(list((data / "val" / "2").iterdir()))
    assert [row["path"] for row in rows if row["problem"]] == [str(own / "a.png")]
    with open(tmp_path / "answers.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["class_1"] for row in written] == [row["class_1"] or "" for row in rows]
    assert all(1 >= row["probability_1"] >= row["probability_2"] for row in rows if not row["problem"])
    assert "ends in neither .csv nor .parquet" in typed("predict", one, own, "--out", tmp_path / "answers.xls", fails=True)


@pytest.mark.parametrize("pixels_in", [False, True])
def test_an_exported_program_answers_without_this_project(one, data, tmp_path, pixels_in):
    typed("export", one, "--out", tmp_path / "out", "--format", "pt2", *["--pixels-in"] * pixels_in)
    about, picture = read_json(tmp_path / "out" / "preprocessing.json"), next((data / "val" / "1").iterdir())
    code = f"""
import json, sys, torch, torchvision.transforms.functional as F
from PIL import Image
about = json.load(open({str(tmp_path / "out" / "preprocessing.json")!r}))
image = F.center_crop(F.resize(Image.open({str(picture)!r}).convert("RGB"), about["short_side"]), about["size"])
x = F.pil_to_tensor(image)[None]
if about["input"]["type"] == "float32":
    x = F.normalize(x / 255, about["mean"], about["std"])
logits = torch.export.load({str(tmp_path / "out" / "model.pt2")!r}).module()(x)
assert not any(name.startswith("resnet_nb") for name in sys.modules)
print(about["classes"][logits.argmax()], logits.softmax(1).max().item())
"""
    answer, chance = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path).split()
    (row,) = predict_files(load_network(one), [picture], top=1).to_pylist()
    assert (answer, pytest.approx(float(chance), abs=1e-4)) == (row["class_1"], row["probability_1"])
    (other,) = predict_files(load_network(one), [next((data / "val" / "0").iterdir())], top=1).to_pylist()
    assert float(chance) != pytest.approx(other["probability_1"], abs=1e-4)  # the control: another picture
    assert about["input"]["type"] == ("uint8" if pixels_in else "float32")


def test_the_model_card_says_what_the_run_was(one, tmp_path):
    typed("evaluate", one, "--no-page")
    typed("export", one, "--out", tmp_path, "--format", "safetensors")
    card = (tmp_path / "README.md").read_text()
    for words in ("# one", "96 training and 23 validation pictures", "peak_lr: 0.01", "| top-1 |", "started from random weights", "Seed 0"):
        assert words in card, words
    assert str(tmp_path) not in card
    typed("evaluate", one, "--no-page", "--split", "train")
    typed("export", one, "--out", tmp_path, "--format", "safetensors")
    assert "| top-1 |" not in (tmp_path / "README.md").read_text()  # numbers on the training pictures are none


def interrupted(*given):
    raise KeyboardInterrupt


def test_an_export_replaces_no_file_of_somebody_else_and_says_which_of_its_own_go(one, two, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    said = typed("export", one, "--out", tmp_path, "--format", "safetensors", fails=True)
    assert "holds a README.md that is of no export; give another folder" in said and (tmp_path / "README.md").read_text() == "mine"
    typed("export", one, "--out", tmp_path / "new", "--format", "safetensors")
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patched:
        patched.setitem(WRITERS, "pt2", interrupted)
        export(two, ("safetensors", "pt2"), tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before  # nothing is half written
    said = CliRunner().invoke(main, ["export", str(two), "--out", str(tmp_path / "new"), "--format", "pt2"]).stderr
    assert "model.safetensors is removed: it was of another checkpoint, or takes another input" in said
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "model.pt2", "preprocessing.json"]


def test_pictures_of_which_none_can_be_read_end_with_1(one, data, tmp_path):
    (tmp_path / "no.jpg").write_text("no picture")
    whole = next((data / "val" / "0").iterdir())
    for pictures, code in (([tmp_path / "no.jpg"], 1), ([tmp_path / "no.jpg", whole], 0)):
        result = CliRunner().invoke(main, ["predict", *map(str, [one, *pictures])])
        assert result.exit_code == code and f"1 of {len(pictures)} pictures can't be read" in result.output, result.output


def test_two_runs_are_compared_on_the_same_pictures(one, two):
    found = json.loads(typed("compare", one, two, "--json"))
    assert [name for name, *_ in found["differs"] if name == "run: hw"] and not [n for n, *_ in found["differs"] if n == "recipe: epochs"]
    (other,) = found["others"]
    assert other["paired"]["pictures"] == NUM_VAL and other["paired"]["p"] == 1.0  # the same weights up to rounding
    assert "digest is the same in all 12 steps" in other["parts"][0] and "first differs" in " ".join(other["parts"])
    assert not (figure := one / "figures" / "curves with two.png").exists()
    said = typed("compare", one, two)
    assert f"on the same {NUM_VAL} pictures both are right as often" in said and f"figure: {figure}" in said and figure.exists()


def test_three_runs_are_compared_with_the_first(one, two):
    assert len(json.loads(typed("compare", one, two, one, "--json"))["others"]) == 2
    said = typed("compare", one, two, one)
    assert said.count(f"on the same {NUM_VAL} pictures") == 2
    assert f"on the same {NUM_VAL} pictures both are right as often: 0 only one got right, 0 only one;" in said
    assert "to compare takes two runs or more" in typed("compare", one, fails=True)


def test_a_file_of_weights_is_judged_as_the_run_that_it_comes_from(one, data, tmp_path):
    network = load_network(one)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    words = ["--data-dir", data, "--image-size", network.preprocess.size, "--no-page"]
    assert "say where they are, with data_dir" in typed("evaluate", tmp_path / "w.pth", "--arch", "resnet18", "--no-page", fails=True)
    assert "23 pictures, each asked once" in typed("evaluate", tmp_path / "w.pth", "--arch", "resnet18", *words)
    assert read_json(cache_dir(data) / "evaluation of w.pth" / "evaluation.json")["weights"] == "w.pth"
    export(one, ("safetensors",), out=tmp_path)
    for file in (tmp_path / "model.safetensors", best_checkpoint(one) / STATE):  # which say themselves how large, and which classes
        loaded = load_network(file, arch="resnet18")
        assert (loaded.preprocess, loaded.classes, loaded.source["classes"]) == (network.preprocess, network.classes, "by name")
    judged = [typed("evaluate", run, *words, "--no-page", "--json") for run, words in ((one, ()), (tmp_path / "model.safetensors", ("--arch", "resnet18", "--data-dir", data)))]  # fmt: skip
    assert json.loads(judged[0])["loss"] == json.loads(judged[1])["loss"]
