"""The repository holds together: versions, imports between rooms, notebooks, links, and the generated package."""

import ast
import configparser
import graphlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from execnb.nbio import nb2str
from nbdev.clean import clean_nb

from resnet_nb.config import Parameters

ROOT = Path(__file__).resolve().parent.parent
PLACES = "nbs/**/*.ipynb resnet_nb/**/*.py tests/**/*.py runs/*.md *.md *.py *.ini *.toml *.yml Makefile .ci/run .github/**/*.yml"
PATHS = [path for place in PLACES.split() for path in sorted(ROOT.glob(place)) if ".ipynb_checkpoints" not in path.parts]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
NOTEBOOKS = {name: json.loads(text) for name, text in TEXTS.items() if name.endswith(".ipynb")}
# module: its notebook; nbs/data/00_index.ipynb is data.index
EXPORTING = {re.sub(r"\d\d_", "", name[4:-6]).replace("/", "."): name for name in NOTEBOOKS if re.search(r"/\d\d_", name)}
MODULES = {name[10:-3].replace("/", "."): text for name, text in TEXTS.items() if re.match(r"resnet_nb/(\w+/)?[^_]\w+\.py", name)}
PARSER = configparser.ConfigParser(delimiters=["="])
PARSER.read_string(TEXTS["settings.ini"])
SETTINGS = dict(PARSER["DEFAULT"])


def finds_nothing_in(things: dict, broken: list, fine: list = ()):
    "Makes a function that lists the faults of a thing a test: there are none in `things`; and, its control, some in each of `broken`."

    def decorate(faults):
        def test():
            assert {name: found for name, thing in things.items() if (found := faults(thing))} == {}
            assert [bool(faults(thing)) for thing in (*broken, *fine)] == [True] * len(broken) + [False] * len(fine)

        return test

    return decorate


def texts(notebook: dict, directive: str = "", kind: str = "code") -> dict[str, str]:
    "Ids and sources of the cells of a kind, or of those with `#| directive`."
    found = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind}
    return {name: text for name, text in found.items() if not directive or re.search(rf"^#\| *{directive}\b", text, re.M)}


# --- versions and settings -------------------------------------------------------------------------------------------


def conda_differs(settings: dict) -> list[str]:
    "Where environment.yml says something else than settings.ini."
    *conda, pip = yaml.safe_load(TEXTS["environment.yml"])["dependencies"]
    wanted = {*f"{settings['requirements']} {settings['imagenet_requirements']} {settings['dev_requirements']}".split(), "-e ."}
    return sorted({*pip["pip"]} ^ wanted | {*conda} ^ {f"python>={settings['min_python']},<3.14", "pip", "make"})


def test_conda_and_pip_install_the_same_versions():
    assert conda_differs(SETTINGS) == []
    for old, new in (("tqdm>=4.66", "tqdm>=4.65"), ("scipy>=1.13", "scipy>=1.12"), ("ruff>=0.9", "ruff")):
        assert conda_differs({key: text.replace(old, new) for key, text in SETTINGS.items()}) == sorted([old, new])
    assert conda_differs(SETTINGS | {"min_python": "3.12"}) == ["python>=3.11,<3.14", "python>=3.12,<3.14"]
    assert set(SETTINGS["imagenet_requirements"].split()) < set(SETTINGS["dev_requirements"].split())  # [dev] runs all tests


def test_settings_keep_tags_and_clean_the_rest():
    names = "allowed_cell_metadata_keys allowed_metadata_keys clean_ids black_formatting tst_flags jupyter_hooks recursive"
    assert [SETTINGS[name] for name in names.split()] == ["tags", "papermill", "True", "False", "notest", "True", "True"]


# --- imports ---------------------------------------------------------------------------------------------------------

ROOMS = [{"cli"}, {"results"}, {"run"}, {"learn", "data"}, {"config", "seed", "schedule", "files"}]  # each imports only lower ones
LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names}
KERNEL_SIDE = {name for name in MODULES if name.startswith("data.") and name != "data.datamodule"} | ROOMS[0] | ROOMS[-1]
KERNEL_SIDE |= {"run.folder", "run.checkpoints", "run.plan", "run.launch", "results.plots", "results.compare"}
HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", "tensorboard", "papermill"}


def imported(text: str, module: str = "") -> set[str]:
    "All that the source of `module` imports, in functions too, by full names: of `from a import b` both a and a.b."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            above = ["resnet_nb", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
    return found


def arrows(text: str, module: str = "") -> set[str]:
    "The modules of the package that a module imports."
    return {name[10:] for name in imported(text, module) if name.startswith("resnet_nb.")} & MODULES.keys()


def leads_down(module: str, other: str) -> bool:
    room, below = module.split(".")[0], other.split(".")[0]
    ordered = EXPORTING[module] > EXPORTING[other] if room == below else LEVELS[room] < LEVELS[below]
    return ordered or (module, other) == ("schedule", "config")


def test_rooms_import_only_what_lies_below_them():
    found = {module: arrows(text, module) for module, text in MODULES.items()}
    pairs = {(module, other) for module in found for other in found[module]}
    for room in LEVELS:
        print(f"{room:<8} →", *sorted({other.split(".")[0] for module, other in pairs if module.split(".")[0] == room} - {room}))
    assert sorted(pair for pair in pairs if not leads_down(*pair)) == []
    upwards = ("run.plan", "results.plots"), ("learn.module", "data.index"), ("data.index", "data.formats"), ("seed", "config")
    assert not any(leads_down(*pair) for pair in upwards) and leads_down("cli", "run.plan")
    graphlib.TopologicalSorter(found).prepare()
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(found | {"config": {"cli"}}).prepare()
    text = (
        "def f():\n    from ..data import index\n    from .folder import x\n    import resnet_nb.cli\n    from resnet_nb.run import plan\n"
    )
    assert arrows(text, "run.launch") == {"data.index", "run.folder", "cli", "run.plan"} and arrows("import torch, cli") == set()


def heavy_after_importing(names: list[str], folder: Path = ROOT) -> list[str]:
    "Which heavy packages a fresh Python has loaded after importing `names`."
    code = f"import sys, {', '.join(names)}; print(*{{name.split('.')[0] for name in sys.modules}} & {HEAVY!r})"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def test_the_kernel_side_loads_neither_torch_nor_lightning(tmp_path):
    assert heavy_after_importing([f"resnet_nb.{name}" for name in sorted(KERNEL_SIDE)]) == []
    (tmp_path / "torch.py").touch()  # a stand-in: the real one takes seconds
    assert heavy_after_importing(["torch"], tmp_path) == ["torch"]
    page = "\n".join(texts(NOTEBOOKS["nbs/train.ipynb"]).values())
    assert "run.plan" in arrows(page) and arrows(page) <= KERNEL_SIDE and not {name.split(".")[0] for name in imported(page)} & HEAVY
    # the worker is reached only by command line
    assert "resnet_nb.run.worker" in MODULES["run.launch"] and "run.worker" not in arrows(MODULES["run.launch"], "run.launch")


@finds_nothing_in(MODULES, ["seed.torch_seed(0, 'mixup', step)", "seed_key(seed, f'{a}')"], ["seed_key(seed, ORDER, 1)", "print('x')"])
def test_words_of_keys_stand_in_one_table_in_seed(text):
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [call for call in calls if re.match(r"""([\w.]+\.)?(seed_key|torch_seed)\(.*["']""", call)]


CALLBACKS = {name: MODULES[name] for name in ("run.recording", "run.stopping")}


@finds_nothing_in(CALLBACKS, ["a.trainer.callbacks[0]", "trainer.checkpoint_callback.x"], ["trainer.callback_metrics"])
def test_callbacks_never_reach_for_another_callback(text):
    return re.findall(r"trainer\.(?:\w*callbacks?|_callback_connector)\b", text)


# --- notebooks -------------------------------------------------------------------------------------------------------

LONG = {  # exported cells of more than 45 lines, and why they stay whole
    "data.index Index": "how one picture is found, read and named",
    "data.datamodule ImageNetDataModule": "Lightning's hooks for data",
    "learn.numerics GradientSum": "the hook and the sum that it fills",
    "learn.module ResNetModule": "Lightning's hooks for a step",
    "run.recording TextLoggingCallback": "the hooks of one callback",
    "run.recording MetricsCallback": "the hooks of one callback",
}


def test_exported_cells_fit_on_a_screen():
    exported = {module: texts(NOTEBOOKS[path], "export").items() for module, path in EXPORTING.items()}
    long = {f"{module} {name}": n for module in exported for name, text in exported[module] if (n := len(text.splitlines())) > 45}
    print("\n".join(f"{count} lines: {name}" for name, count in long.items()))
    assert {name: long.get(name, "is short now: remove it from LONG") for name in long.keys() ^ LONG.keys()} == {}


def test_each_numbered_notebook_exports_the_module_of_its_name():
    to = {name: [text.split()[2] for text in texts(notebook, "default_exp").values()] for name, notebook in NOTEBOOKS.items()}
    assert {name: modules for name, modules in to.items() if modules} == {name: [module] for module, name in EXPORTING.items()}
    imports = {name: "imports" in exported for name, notebook in NOTEBOOKS.items() if (exported := texts(notebook, "export"))}
    assert imports == dict.fromkeys(EXPORTING.values(), True) and EXPORTING.keys() == MODULES.keys()


PASSING = r'/(?:home|Users|root|work|tmp|private|var/folders)/|Warning|0x[0-9a-fA-F]{4,}\b(?!\.)|"stderr"'
MADE = r"[0-9a-f]{8}(-[0-9a-f-]{27})?|(?![A-Za-z_][\w-]*$).*"  # ids by an editor: 8 hexadecimal digits, or a UUID


def cleaned(notebook: dict, keep: str = SETTINGS["allowed_cell_metadata_keys"]) -> dict:
    "What nbdev_clean makes of it; it is run by `make sync`, by pre-commit, and by JupyterLab with nbdev's hooks."
    clean_nb(notebook := json.loads(json.dumps(notebook)), False, SETTINGS["allowed_metadata_keys"].split(), keep.split(), True)
    return notebook


def faults(text: str) -> dict[str, list]:
    "What a notebook should not have, given its file's text."
    cells, exported = json.loads(text)["cells"], texts(json.loads(text), "export")
    ids, shown = [cell["id"] for cell in cells], {cell["id"]: json.dumps(cell["outputs"]) for cell in cells if cell.get("outputs")}
    template = any(re.search(r"^skip_exec: *true$", raw, re.M) for raw in texts(json.loads(text), kind="raw").values())
    no_pictures = re.sub(r'"image/(?!svg)[^"]*": ("[^"]*"|\[[^\]]*\])', "", " ".join(shown.values()))  # their encoding may contain anything
    tagged = [cell["id"] for cell in cleaned(json.loads(text))["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    found = {
        "ids there twice": [name for name in ids if ids.count(name) > 1],
        "ids nobody chose": [name for name in exported if re.fullmatch(MADE, name)],
        "paths, warnings, addresses": re.findall(PASSING, no_pictures),
        "outputs of a template": list(shown) if template else [],
        "untagged parameters": ["parameters"] if ("parameters" in ids) != (tagged == ["parameters"]) else [],
        "what nbdev_clean removes": ["metadata"] if nb2str(cleaned(json.loads(text))) != text else [],
        "200 kB": [len(text)] if len(text.encode()) >= 200_000 else [],
    }
    return {name: what for name, what in found.items() if what}
