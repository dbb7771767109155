"""The package as others get it: a wheel, installed elsewhere, without the checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_nb

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "resnet_nb").rglob("[!_]*.py"))
PAGES = sorted(set(re.findall(r'"(\w+\.ipynb)"', (ROOT / "resnet_nb" / "cli.py").read_text(encoding="utf-8"))))
LOOK = f"""
import importlib, json
from resnet_nb.cli import notebook
def page(name):
    try:
        return str(notebook(name))
    except ValueError:
        return ""
files = {{name: importlib.import_module(name).__file__ for name in {MODULES!r}}}
print(json.dumps([files, {{name: page(name) for name in {[*PAGES, "index.ipynb"]!r}}}]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The folder of a wheel that was built from a source archive, and a function that runs Python in another folder, with that one on its path."
    source, wheels, target, elsewhere = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target", "elsewhere"))
    for folder in ("nbs", "resnet_nb"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    def python(*words: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(target), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.check_output([sys.executable, *map(str, words)], cwd=elsewhere, env=environment, text=True, timeout=120)

    sdist = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", wheels]
    subprocess.run(sdist, cwd=source, check=True, capture_output=True)
    (archive,) = wheels.glob("*.tar.gz")
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, archive)
    (wheel,) = wheels.glob("*.whl")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", target, wheel)
    return target, python


@pytest.fixture(scope="module")
def found(installed):
    "Where each module and each page was found."
    return json.loads(installed[1]("-c", LOOK).splitlines()[-1])


def outside(files: dict, folder: Path) -> list[str]:
    return [name for name, path in files.items() if not Path(path).is_relative_to(folder)]


def test_every_module_is_in_the_wheel(installed, found):
    assert found[0].keys() == set(MODULES) and outside(found[0], installed[0]) == []
    assert outside({"pathlib": shutil.__file__}, installed[0]) == ["pathlib"]


def test_the_notebooks_that_commands_execute_are_in_the_wheel(installed, found):
    inside = installed[0] / "resnet_nb" / "nbs"
    assert {"train.ipynb", "check.ipynb", "evaluate.ipynb", "explore.ipynb", "lr_find.ipynb"} <= set(PAGES)
    assert found[1] == {name: str(inside / name) for name in PAGES} | {"index.ipynb": ""}
    assert all((inside / name).read_bytes() == (ROOT / "nbs" / name).read_bytes() for name in PAGES)
    assert not (ROOT / "resnet_nb" / "nbs").exists()  # an editable install takes those of the checkout


def test_the_command_works_elsewhere(installed):
    target, python = installed
    assert "Usage: resnet-nb [OPTIONS] COMMAND" in python(target / "bin" / "resnet-nb", "--help")
    assert python(target / "bin" / "resnet-nb", "--version").split()[-1] == resnet_nb.__version__ != ""
