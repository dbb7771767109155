"""The repository holds together: versions, settings, imports, notebooks, and the generated package."""

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from execnb.nbio import nb2str
from nbdev.clean import clean_nb

from resnet_nb.config import Parameters

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resnet_nb"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
NUMBERED = [path for path in NOTEBOOKS if re.match(r"\d\d_", path.name)]
MODULES = sorted(path for path in PACKAGE.glob("*.py") if not path.name.startswith("_"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def settings() -> dict[str, str]:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_cell(text: str, **fields) -> dict:
    "A cell for negative controls."
    return {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": text} | fields


# --- versions and settings -------------------------------------------------------------------------------------------


def conda_differs(environment: dict, settings: dict) -> list[str]:
    "Where environment.yml says something else than settings.ini."
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    conda = {re.split(r"[<>=]", entry)[0]: entry for entry in environment["dependencies"] if isinstance(entry, str)}
    wanted = [*settings["requirements"].split(), *settings["dev_requirements"].split(), "-e ."]
    differs = sorted(set(pip) ^ set(wanted))
    if not conda["python"].startswith(f"python>={settings['min_python']},"):
        differs.append(conda["python"])
    return differs


def test_conda_and_pip_install_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda_differs(environment, settings()) == []
    other = settings()
    other["requirements"] = other["requirements"].replace("papermill>=2.7,", "papermill>=2.6,")
    assert conda_differs(environment, other) == ["papermill>=2.6,<2.8", "papermill>=2.7,<2.8"]
    assert conda_differs(environment, settings() | {"min_python": "3.12"}) == ["python>=3.11,<3.14"]


def test_conda_brings_only_python_pip_and_make():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [re.split(r"[<>=]", entry)[0] for entry in environment["dependencies"] if isinstance(entry, str)]
    assert environment["channels"] == ["conda-forge"]
    assert conda == ["python", "pip", "make"]


def test_settings_keep_tags_and_clean_the_rest():
    wanted = {
        "allowed_cell_metadata_keys": "tags",
        "allowed_metadata_keys": "papermill",
        "clean_ids": "True",
        "black_formatting": "False",
        "tst_flags": "notest",
        "jupyter_hooks": "True",
    }
    assert {key: settings().get(key) for key in wanted} == wanted


# --- import arrows ---------------------------------------------------------------------------------------------------

# module: what it imports of the package, anywhere in its file. Change it in the commit that changes an import.
ARROWS = {
    "config": set(),
    "seed": set(),
    "schedule": {"config"},
    "sampler": {"seed"},
    "index": {"config"},
    "sources": {"index", "seed"},
    "transforms": {"config", "index", "seed"},
    "check": {"index", "sources", "transforms"},
    "pack": {"check", "index", "sources", "transforms"},
    "datamodule": {"check", "config", "index", "sampler", "schedule", "seed", "sources", "transforms"},
    "numerics": set(),
    "model": {"config", "numerics"},
    "module": {"config", "model", "numerics", "schedule", "seed"},
    "runs": {"config"},
    "checkpoints": {"runs"},
    "compare": {"checkpoints", "runs"},
    "callbacks": {"checkpoints", "config", "runs", "schedule"},
    "worker": {"callbacks", "checkpoints", "config", "datamodule", "module", "numerics", "runs", "index", "transforms"},
    "launch": {"check", "config", "index", "runs", "sampler", "schedule", "sources"},
    "plots": {"config", "index", "runs", "sampler", "schedule", "transforms"},
    "cli": {"check", "compare", "config", "index", "launch", "pack", "plots", "runs"},
}
# what a notebook's kernel may import: no torch, no lightning
KERNEL_SIDE = {
    "config", "seed", "schedule", "sampler", "index", "sources", "transforms", "check", "pack", "launch", "runs", "checkpoints", "compare", "plots", "cli",
}  # fmt: skip


def imported(text: str) -> set[str]:
    "All modules that Python source imports, in functions too; those of the package as `resnet_nb.NAME`."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in ("resnet_nb" * (node.level > 0), node.module) if part)
            found |= {f"resnet_nb.{alias.name}" for alias in node.names} if module == "resnet_nb" else {module}
    return found


def arrows(text: str) -> set[str]:
    "The modules of the package that a module imports."
    return {name.split(".")[1] for name in imported(text) if name.startswith("resnet_nb.")}


def cycle(table: dict[str, set[str]]) -> set[str]:
    "Modules that can't be ordered so that each imports only earlier ones."
    left = dict(table)
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    return set(left)


def test_modules_import_what_the_table_says():
    assert {path.stem: arrows(path.read_text(encoding="utf-8")) for path in MODULES} == ARROWS
    lines = ("from resnet_nb.run.worker import main", "from . import cli", "from .plots import save_plot", "import resnet_nb.run.folder")
    assert arrows("def f():\n    " + "\n    ".join(lines)) == {"worker", "cli", "plots", "runs"}
    assert arrows("import torch\nfrom math import pi\n") == set()


def test_imports_have_no_cycle():
    assert cycle(ARROWS) == set()
    assert cycle(ARROWS | {"config": {"runs"}}) >= {"config", "runs"}


def test_launch_reaches_the_worker_only_by_command_line():
    text = (PACKAGE / "launch.py").read_text(encoding="utf-8")
    assert "resnet_nb.run.worker" in text
    assert "worker" not in arrows(text)
    assert "worker" in arrows(text + "\nfrom .worker import main\n")
    assert all(ARROWS[name] <= KERNEL_SIDE for name in KERNEL_SIDE)


HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", "tensorboard", "papermill"}


def heavy_after_importing(names: list[str], *paths: Path) -> list[str]:
    "Which heavy packages a fresh Python has loaded after importing `names`."
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({{name.split('.')[0] for name in sys.modules}} & {HEAVY!r}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_importing_the_kernel_side_loads_neither_torch_nor_lightning(tmp_path):
    assert heavy_after_importing([f"resnet_nb.{name}" for name in sorted(KERNEL_SIDE)]) == []
    assert {"torch", "lightning"} <= imported((PACKAGE / "worker.py").read_text(encoding="utf-8"))
    (tmp_path / "torch.py").write_text("", encoding="utf-8")  # a stand-in: the real one takes seconds
    (tmp_path / "uses_torch.py").write_text("import torch\n", encoding="utf-8")
    assert heavy_after_importing(["uses_torch"], tmp_path) == ["torch"]


def test_the_training_notebook_imports_only_the_kernel_side():
    found = set().union(*(imported(source(cell)) for cell in code_cells(load(ROOT / "nbs" / "train.ipynb"))))
    assert {name.split(".")[1] for name in found if name.startswith("resnet_nb.")} <= KERNEL_SIDE
    assert not {name.split(".")[0] for name in found} & HEAVY
    assert {name.split(".")[0] for name in imported("import lightning.pytorch as pl")} & HEAVY


# --- parameters ------------------------------------------------------------------------------------------------------


def parameters_cells(notebook: dict) -> list[dict]:
    "Cells that papermill takes for the parameters."
    return [cell for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]


def assigned(text: str) -> dict:
    "Names and values of a parameters cell; SyntaxError or ValueError where it does more than assign plain values."
    found = {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.AnnAssign) or node.value is None:
            raise ValueError(f"not `name: type = value`: {ast.unparse(node)}")
        found[node.target.id] = ast.literal_eval(node.value)
    return found


PARAMETRIZED = [
    path
    for path in NOTEBOOKS
    if path not in NUMBERED and (parameters_cells(load(path)) or any(cell["id"] == "parameters" for cell in load(path)["cells"]))
]
each_parametrized = pytest.mark.parametrize("path", PARAMETRIZED, ids=lambda path: path.name)


def test_the_training_notebook_is_parametrized():
    assert ROOT / "nbs" / "train.ipynb" in PARAMETRIZED


@each_parametrized
def test_exactly_one_cell_is_tagged_parameters(path):
    notebook = load(path)
    assert len(parameters_cells(notebook)) == 1
    parameters_cells(notebook)[0]["metadata"].clear()
    assert parameters_cells(notebook) == []


def test_the_parameters_cell_holds_all_parameters_and_their_defaults():
    text = source(parameters_cells(load(ROOT / "nbs" / "train.ipynb"))[0])
    assert assigned(text) == Parameters().model_dump()
    assert assigned(text.replace("hw:", "hww:", 1)) != Parameters().model_dump()


@each_parametrized
def test_cleaning_keeps_the_parameters_tag(path):
    keys, notebook = settings(), load(path)
    clean_nb(notebook, allowed_cell_metadata_keys=keys["allowed_cell_metadata_keys"].split())
    assert len(parameters_cells(notebook)) == 1
    clean_nb(notebook, allowed_cell_metadata_keys=[])
    assert parameters_cells(notebook) == []


# --- cells -----------------------------------------------------------------------------------------------------------


def directives(cell: dict, name: str) -> list[str]:
    "What follows each `#| name` of a cell."
    return re.findall(rf"^\s*#\s*\|\s*{name}\b *(.*)$", source(cell), re.MULTILINE)


def is_readable(cell_id: str) -> bool:
    "Whether a person chose this id: editors make 8 hexadecimal digits, or a UUID."
    made = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8}", cell_id)
    return bool(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", cell_id)) and not made


@each_notebook
def test_exported_cells_have_readable_ids(path):
    exported = [cell["id"] for cell in code_cells(load(path)) if directives(cell, "export")]
    assert [name for name in exported if not is_readable(name)] == []
    assert bool(exported) == (path in NUMBERED)
    assert exported.count("imports") == (path in NUMBERED)


def test_made_up_ids_are_told_from_readable_ones():
    made = ["a3f0c1d2", "07637414", "a3f0c1d2-19f4-4d7e-9a51-0f3b2c4d5e6f", ""]
    assert [is_readable(name) for name in ("imports", "epoch_order", "MicrobatchSampler", "train-command", *made)] == [True] * 4 + [
        False
    ] * 4
    assert directives(code_cell("#| export\nx = 1"), "export") and not directives(code_cell("x = 1  # export"), "export")


def repeated(names: list[str]) -> set[str]:
    return {name for name in names if names.count(name) > 1}


@each_notebook
def test_cell_ids_are_unique(path):
    ids = [cell["id"] for cell in load(path)["cells"]]
    assert repeated(ids) == set()
    assert repeated([*ids, ids[0]]) == {ids[0]}


def exports_to(notebook: dict) -> list[str]:
    return [module for cell in code_cells(notebook) for module in directives(cell, "default_exp")]


def test_each_numbered_notebook_exports_the_module_of_its_name():
    assert [exports_to(load(path)) for path in NUMBERED] == [[path.stem[3:]] for path in NUMBERED]
    assert sorted(path.stem[3:] for path in NUMBERED) == [path.stem for path in MODULES]
    assert exports_to({"cells": [code_cell("#| default_exp a"), code_cell("#| default_exp b")]}) == ["a", "b"]


def unfinished(text: str) -> list[str]:
    return re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME)\b", text)


def test_sources_have_no_unfinished_notes():
    sources = {path: "\n".join(source(cell) for cell in load(path)["cells"]) for path in NOTEBOOKS}
    for pattern in ("resnet_nb/*.py", "tests/*.py", "Makefile", "*.py", "*.md", "*.toml", "*.yml", "settings.ini", "runs/README.md"):
        sources |= {path: path.read_text(encoding="utf-8") for path in ROOT.glob(pattern)}
    assert [path.name for path, text in sources.items() if unfinished(text)] == []
    assert unfinished("x = 1  # TO" + "DO") and unfinished("# FIX" + "ME: y")


# --- outputs ---------------------------------------------------------------------------------------------------------


def texts(cell: dict) -> list[str]:
    "All output text of a cell; pictures are left out, their encoding may contain anything."
    found = []
    for output in cell.get("outputs", []):
        data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/") or "svg" in kind}
        for value in (output.get("text", ""), *output.get("traceback", []), *data.values()):
            found.append(value if isinstance(value, str) else "".join(value) if isinstance(value, list) else json.dumps(value))
    return found


PASSING = r"/(?:home|Users|root|work|tmp|private|var/folders)/|Warning|\b0x[0-9a-fA-F]{4,}\b(?!\.)"


def passing(notebook: dict) -> list[str]:
    "Output that another machine, or another day, would print differently, or that nobody should see."
    cells = code_cells(notebook)
    found = [f"{cell['id']}: {what}" for cell in cells for text in texts(cell) for what in re.findall(PASSING, text)]
    return found + [f"{cell['id']}: stderr" for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]


@each_notebook
def test_outputs_are_free_of_paths_warnings_and_addresses(path):
    assert passing(load(path)) == []


@pytest.mark.parametrize("text", ["/home/me/x", "['/Users/me']", "/tmp/run", "UserWarning: no", "<f at 0x7f3a>"])
def test_paths_warnings_and_addresses_are_noticed(text):
    stream = {"output_type": "stream", "name": "stdout", "text": ["fine\n", text]}
    result = {"output_type": "execute_result", "metadata": {}, "data": {"text/plain": [text]}}
    picture = {"output_type": "display_data", "metadata": {}, "data": {"image/png": text}}
    assert passing({"cells": [code_cell("x", outputs=[stream])]})
    assert passing({"cells": [code_cell("x", outputs=[result])]})
    assert passing({"cells": [code_cell("x", outputs=[stream | {"name": "stderr", "text": "10%"}])]}) == ["a: stderr"]
    assert passing({"cells": [code_cell("x", outputs=[picture, stream | {"text": "runs/a, 10x, 2/3"}])]}) == []


@each_notebook
def test_notebooks_stay_small(path):
    assert path.stat().st_size < 200_000


@each_notebook
def test_notebooks_are_clean(path):
    "What nbdev_clean would change; it is run by `make sync`, by pre-commit, and by JupyterLab with nbdev's hooks."

    def cleaned(notebook: dict) -> str:
        keys = settings()
        clean_nb(notebook, False, keys["allowed_metadata_keys"].split(), keys["allowed_cell_metadata_keys"].split(), True)
        return nb2str(notebook)

    text = path.read_text(encoding="utf-8")
    assert cleaned(json.loads(text)) == text, f"{path.name} is not clean: run nbdev_clean"
    dirty = json.loads(text)
    dirty["cells"][-1]["metadata"]["scrolled"] = True
    assert nb2str(dirty) != text and cleaned(dirty) == text


def is_template(notebook: dict) -> bool:
    "Whether nbdev_test leaves the notebook out."
    return any(re.search(r"^skip_exec:\s*true\s*$", source(cell), re.MULTILINE) for cell in notebook["cells"] if cell["cell_type"] == "raw")


def test_templates_carry_no_outputs():
    templates = [path for path in NOTEBOOKS if is_template(load(path))]
    assert ROOT / "nbs" / "train.ipynb" in templates
    assert not set(templates) & set(NUMBERED)
    assert [(path.name, cell["id"]) for path in templates for cell in code_cells(load(path)) if cell["outputs"]] == []
    assert not is_template({"cells": [{"cell_type": "raw", "source": "---\nskip_exec: false\n---"}, code_cell("skip_exec: true")]})


# --- make, CI and the generated package ------------------------------------------------------------------------------


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", makefile, re.MULTILINE))


def promised(text: str) -> set[str]:
    "Targets that a text tells people to make: in backticks, or on a line of commands."
    found = re.findall(r"`make ([a-z]+)\b|^ *(?:- run: )?make ([a-z]+)(?=$| +#| +\w+=)", text, re.MULTILINE)
    return {quoted or command for quoted, command in found}


def test_make_has_the_targets_that_are_promised():
    has = targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"setup", "train", "test", "lab", "tensorboard"} <= has
    places = ("README.md", "CONTRIBUTING.md", "runs/README.md", ".ci/run", ".github/workflows/test.yml")
    for path in (ROOT / place for place in places):
        if path.exists():
            assert promised(path.read_text(encoding="utf-8")) <= has, path.name
    assert promised("`make tea`, make coffee\nmake sure that\n\n    make cake x=1\n      - run: make tarts") == {"tea", "cake", "tarts"}
    assert targets("tea: cup\nBIN := x\n.PHONY: cake\n") == {"tea"}


def test_ci_runs_only_make():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    script = ROOT / ".ci" / "run"
    lines = [line for line in script.read_text(encoding="utf-8").splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert steps == ["make test", "make sync"]
    assert lines == ["make setup", "make sync", "make test"]  # pytest's summary comes last
    assert os.access(script, os.X_OK)


def modules_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}


def test_the_package_is_what_the_notebooks_export(tmp_path):
    "Into an empty folder, so that a module whose notebook is gone is noticed too."
    (tmp_path / "nbs").mkdir()
    for path in (ROOT / "settings.ini", *NOTEBOOKS):
        (tmp_path / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    # without IN_TEST, which makes nbdev_export do nothing
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}

    def export() -> dict[str, str]:
        command = [Path(sys.executable).parent / "nbdev_export"]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr
        return modules_of(tmp_path / "resnet_nb")

    exported, package = export(), modules_of(PACKAGE)
    assert [name for name in sorted(exported | package) if exported.get(name) != package.get(name)] == [], "run `make export`"
    notebook = load(tmp_path / "nbs" / "01_seed.ipynb")
    cell = next(cell for cell in code_cells(notebook) if directives(cell, "export"))
    cell["source"] = [*cell["source"], "\nCHANGED = True"]
    (tmp_path / "nbs" / "01_seed.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    changed = export()
    assert [name for name in changed if changed[name] != exported[name]] == ["seed.py"]
