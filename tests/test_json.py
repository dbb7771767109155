"""Every command that reports can print JSON, and nothing else, to standard output."""

import json

import click
import pytest
from click.testing import CliRunner
from conftest import SMALL

from resnet_nb.cli import main

ONE_EPOCH = json.dumps({"overrides": SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu"}})
OWN = ["-p", "recipe", "digits", "-p", "data_dir", "{data}", "-y", ONE_EPOCH]
# command: its words, and what its answer must hold
REPORTS = {
    "runs": ([], "one"),
    "recipes": ([], "imagenette-5"),
    "recipes show": (["finetune"], "freeze_epochs"),
    "hw": ([], "cpu2"),
    "hw show": (["g5"], "channels_last"),
    "explore": (OWN, "classes"),
    "lr-find": ([*OWN, "--steps", "10"], "suggestions"),
    "check data": (["{data}"], "problems"),
    "check hw": (["local", "--seconds", "0.1", *OWN], "pictures_per_second"),
    "seeds": ([*OWN, "-r", "name", "in-json", "--count", "1"], "accuracies"),
    "evaluate": (["{one}"], "balanced"),
    "predict": (["{one}", "{data}/val/1"], "probability_1"),
    "compare": (["{one}", "{two}"], "paired"),
    "export": (["{one}", "--format", "safetensors", "--out", "{out}"], "largest_difference"),
    "verify": (["{one}", "{two}"], "findings"),
    "reproduce": (["{one}", "--name", "one-in-json"], "verdict"),
}
SILENT = {"train", "follow", "stop", "plot", "pack"}  # they do something, and say how far they are


def commands(group: click.Group = main, before: str = "") -> dict[str, click.Command]:
    "All commands that do something, by the words that call them."
    found = {}
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or command.invoke_without_command:
            found[before + name] = command
        if isinstance(command, click.Group):
            found |= commands(command, f"{before}{name} ")
    return found


def test_every_command_that_reports_has_json():
    has = {name for name, command in commands().items() if any("--json" in option.opts for option in command.params)}
    assert has == REPORTS.keys() == commands().keys() - SILENT


@pytest.mark.parametrize("name", REPORTS)
def test_json_is_all_that_is_printed(name, one, two, data, tmp_path):
    words, holds = REPORTS[name]
    places = {"{one}": str(one), "{two}": str(two), "{out}": str(tmp_path / "out"), "{data}": str(data)}
    for place, path in places.items():
        words = [word.replace(place, path) for word in words]
    result = CliRunner().invoke(main, [*name.split(), *words, "--json"])
    assert result.exit_code in (0, 1, 2) and not isinstance(result.exception, Exception), result.output
    answer = json.loads(result.stdout)  # the whole of it
    assert f'"{holds}"' in json.dumps(answer)
