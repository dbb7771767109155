"""Recipes of one's own: files that start from another recipe, and learning rates that fall with a stage's distance from the head."""

import hashlib

import pytest
import yaml
from click.testing import CliRunner
from conftest import SMALL, STEPS, tensors, trained_here

from resnet_nb import cli
from resnet_nb.config import Parameters, Recipe
from resnet_nb.run import launch
from resnet_nb.run.folder import create_run, load_config, read_rows, run_path
from resnet_nb.run.plan import resolve
from resnet_nb.schedule import lr_at


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A recipe file with a space in its name, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my pets.yaml"
    fields = {key: value for key, value in SMALL.items() if key in Recipe.model_fields}
    path.write_text(yaml.safe_dump({"base": "digits", "layer_lr_decay": 0.5} | fields | {"epochs": 1, "image_sizes": [16]}))
    return path


def test_a_run_of_a_recipe_file_keeps_the_recipe_in_full_and_its_sha256(mine, data):
    words = ["-p", "recipe", "my pets.yaml", "-p", "name", "of-a-file", "-p", "data_dir", str(data)]
    hardware = "{overrides: {accelerator: cpu, num_workers: 0, num_threads: 1}}"
    result = CliRunner().invoke(cli.main, ["train", *words, "-y", hardware])
    assert result.exit_code == 0, result.output
    config = load_config(run_path("of-a-file"))
    assert config.recipe_name == "my-pets" and config.recipe.layer_lr_decay == 0.5 and config.recipe.arch == "resnet18"
    assert config.recipe_sha256 == hashlib.sha256(mine.read_bytes()).hexdigest()
    rates = [row["train/learning_rate"] for row in read_rows(run_path("of-a-file"), "step")]
    assert rates == pytest.approx([lr_at(config.recipe, step, STEPS) for step in range(STEPS)])  # the head's
    mine.write_text(mine.read_text() + "# a remark\n")  # the same fields under another sha256 are the same run
    create_run(resolve(Parameters(recipe="my pets.yaml", name="of-a-file", data_dir=str(data))))
    mine.write_text(mine.read_text() + "flip: 0.25\n")
    result = CliRunner().invoke(cli.main, ["train", *words, "-y", hardware])
    assert result.exit_code == 2 and "was trained with flip=0.0, asked for is 0.25" in " ".join(result.output.split())


def test_a_run_is_named_after_the_file_and_names_of_recipes_go_first(mine):
    assert resolve(Parameters(recipe=str(mine))).name.startswith("my-pets-local-")
    assert resolve(Parameters(recipe="my pets.yaml")).recipe.epochs == 1
    with pytest.raises(ValueError, match=r"recipe file 'none.yaml' is not there; the current folder is "):
        resolve(Parameters(recipe="none.yaml"))
    with pytest.raises(ValueError, match=r"set one of them"):
        resolve(Parameters(recipe="digits", overrides={"layer_lr_decay": 0.5, "backbone_lr_share": 0.5}))


def test_stages_that_learn_at_other_rates_have_the_same_bits_on_two_processes(make_config):
    wish = {"epochs": 1, "image_sizes": [16], "numerics": "exact"}

    def bits(name, devices, **more):
        return tensors((trained_here if devices == 1 else launch.train)(make_config(name, devices=devices, **wish | more)))

    one = bits("stages-1", 1, layer_lr_decay=0.5)
    assert bits("stages-2", 2, layer_lr_decay=0.5) == one
    assert bits("stages-none", 1)["network.conv1.weight"] != one["network.conv1.weight"]
