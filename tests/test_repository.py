"""The repository holds together: versions, imports between rooms, notebooks, links, and the generated package."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SLOW
from execnb.nbio import nb2str
from nbdev.clean import clean_nb

from resnet_nb.config import RECIPES, Parameters, recipe_lines


def sources(notebook: dict, directive: str = "", kind: str = "code") -> dict[str, str]:
    "Ids and sources of the cells of a kind, or of those with `#| directive`."
    found = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind}
    return {name: text for name, text in found.items() if not directive or re.search(rf"^#\| *{directive}\b", text, re.M)}


ROOT = Path(__file__).resolve().parent.parent
PLACES = "nbs/**/*.ipynb resnet_nb/**/*.py tests/**/*.py runs/*.md *.md *.py *.ini *.toml *.yml Makefile .ci/run .github/**/*.yml"
PATHS = [path for place in PLACES.split() for path in sorted(ROOT.glob(place)) if ".ipynb_checkpoints" not in path.parts]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
SETTINGS = dict(re.findall(r"^(\w+) = (.*)$", TEXTS["settings.ini"], re.M))
NOTEBOOKS = {name: json.loads(text) for name, text in TEXTS.items() if name.endswith(".ipynb")}
# module: its notebook, nbs/data/00_index.ipynb for data.index; and all that this exports
EXPORTING = {re.sub(r"\d\d_", "", name[4:-6]).replace("/", "."): name for name in NOTEBOOKS if re.search(r"/\d\d_", name)}
MODULES = {module: "\n".join(sources(NOTEBOOKS[name], "export").values()) for module, name in EXPORTING.items()}


def test_conda_and_pip_install_the_same_versions():
    def differs(settings: dict) -> list[str]:
        *conda, pip = yaml.safe_load(TEXTS["environment.yml"])["dependencies"]
        wanted = {
            *f"{settings['requirements']} {settings['timm_requirements']} {settings['export_requirements']} {settings['dev_requirements']}".split(),
            "-e .",
        }
        return sorted({*pip["pip"]} ^ wanted | {*conda} ^ {f"python>={settings['min_python']},<3.14", "pip", "make"})

    assert differs(SETTINGS) == []
    for old, new in (("tqdm>=4.66", "tqdm>=4.65"), ("scipy>=1.13", "scipy>=1.12"), ("ruff>=0.9", "ruff")):
        assert differs({key: text.replace(old, new) for key, text in SETTINGS.items()}) == sorted([old, new])
    assert differs(SETTINGS | {"min_python": "3.12"}) == ["python>=3.11,<3.14", "python>=3.12,<3.14"]
    extras = {*SETTINGS["timm_requirements"].split(), *SETTINGS["export_requirements"].split()}
    assert extras < {*SETTINGS["dev_requirements"].split()}  # [dev] runs all tests


def test_settings_keep_tags_and_clean_the_rest():
    names = "allowed_cell_metadata_keys allowed_metadata_keys clean_ids black_formatting tst_flags jupyter_hooks recursive"
    assert [SETTINGS[name] for name in names.split()] == ["tags", "papermill", "True", "False", "notest", "True", "True"]


def test_slow_files_of_tests_go_by_names_that_are_there():
    files = {Path(name).stem.removeprefix("test_") for name in TEXTS if re.match("tests/.*test_", name)}
    assert {*SLOW} <= files and not {"gone", *SLOW} <= files


ROOMS = [
    {"entry"},
    {"cli"},
    {"results"},
    {"run"},
    {"learn", "data"},
    {"config", "seed", "schedule", "files", "bars", "watch", "names"},
]  # each imports only later ones
LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names}
KERNEL_SIDE = {name for name in MODULES if name.startswith("data.") and name != "data.datamodule"} | ROOMS[0] | ROOMS[1] | ROOMS[-1]
KERNEL_SIDE |= {
    "run.folder",
    "run.hardware",
    "run.nodes",
    "run.checkpoints",
    "run.mirror",
    "run.place",
    "run.spot",
    "run.plan",
    "run.launch",
    "run.forecast",
    "results.plots",
    "results.compare",
    "results.executed",
    "results.live",
}
HEAVY = {"torch", "torchvision", "torchmetrics", "lightning", "lightning_fabric", "pytorch_lightning", "tensorboard", "papermill"}


def arrows(text: str) -> set[str]:
    "The modules of the package that a notebook's code imports, in functions too."
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {f"{getattr(node, 'module', '')}.{alias.name}".strip(".") for node in nodes for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module for module in MODULES if f"resnet_nb.{module}" in names}


def test_rooms_import_only_what_lies_below_them_so_there_is_no_cycle():
    def leads_down(module: str, other: str) -> bool:
        room, below = module.split(".")[0], other.split(".")[0]
        ordered = EXPORTING[module] > EXPORTING[other] if room == below else LEVELS[room] < LEVELS[below]
        return ordered or (module, other) in {(name, "config") for name in ("schedule", "names", "files")}

    found = [(module, other) for module, text in MODULES.items() for other in arrows(text)]
    for room in LEVELS:
        into = {other.split(".")[0] for module, other in found if module.split(".")[0] == room} - {room}
        print(f"{room:<8} → {', '.join(name for name in LEVELS if name in into)}")
    assert sorted(arrow for arrow in found if not leads_down(*arrow)) == []
    upwards = "run.plan results.plots", "learn.module data.index", "data.index data.formats", "seed config", "config schedule"
    assert not any(leads_down(*pair.split()) for pair in upwards) and leads_down("cli", "run.plan")
    text = "def f():\n    from resnet_nb.data.index import Index\n    import resnet_nb.cli\nfrom resnet_nb.run import plan, launch\nimport torch"
    assert arrows(text) == {"data.index", "cli", "run.plan", "run.launch"}


def test_the_kernel_side_loads_neither_torch_nor_lightning(tmp_path):
    after = f"\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}} & {HEAVY!r})"
    heavy = lambda code, cwd: subprocess.check_output([sys.executable, "-c", code + after], cwd=cwd, text=True, timeout=60).split()
    assert heavy("\n".join(f"import resnet_nb.{module}" for module in sorted(KERNEL_SIDE)), ROOT) == []
    (tmp_path / "torch.py").touch()  # a stand-in: the real one takes seconds
    assert heavy("import torch", tmp_path) == ["torch"]
    assert "resnet_nb.run.worker" in MODULES["run.launch"] and "run.worker" not in arrows(MODULES["run.launch"])  # by command line only


def test_the_training_notebook_holds_all_parameters_and_imports_only_the_kernel_side():
    cells = sources(NOTEBOOKS["nbs/train.ipynb"])
    page = "\n".join(cells.values())
    assert "run.plan" in arrows(page) and arrows(page) <= KERNEL_SIDE and not re.search(rf"import ({'|'.join(HEAVY)})\b", page)
    lines = ast.parse(cells["parameters"]).body  # `name: type = value`, nothing else
    assigned = {line.target.id: ast.literal_eval(line.value) for line in lines}
    assert assigned == Parameters().model_dump() != assigned | {"seed": 1}


def test_every_notebook_with_parameters_checks_their_names():
    def checked(text: str) -> set[str]:
        calls = {node.func.id: node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        if call := calls.get("check_names"):
            return {*eval(ast.unparse(call.args[1]))}
        also = [word.value for word in calls["read_parameters"].keywords]
        return {*Parameters.model_fields, *(ast.literal_eval(also[0]) if also else ())}

    asked = {name: cells for name, book in NOTEBOOKS.items() if "parameters" in (cells := sources(book)) and name.count("/") == 1}
    assert len(asked) == 7
    for name, cells in asked.items():
        given = {line.target.id for line in ast.parse(cells["parameters"]).body}
        page = "\n".join(text for text in cells.values() if not text.startswith(("%", "!")))
        assert given <= checked(page) <= given | {*Parameters.model_fields}, name
        assert not given <= checked("check_names(globals(), ['other'])")  # the control


def test_code_of_pages_is_as_wide_as_a_window():
    """JupyterLab breaks no line of code, and at 1,400 px beside its list of files shows 120 characters."""

    def wide(page: str) -> list[str]:
        cells = sources(NOTEBOOKS[page]).items()
        shown = [text for name, text in cells if name == "parameters" or ("/proofs/" not in page and "hide-input" not in tags(page, name))]
        return [line for text in shown for line in text.splitlines() if len(line) > 120]

    def tags(page: str, name: str) -> list[str]:
        return next(cell["metadata"].get("tags", []) for cell in NOTEBOOKS[page]["cells"] if cell["id"] == name)

    pages = [name for name in NOTEBOOKS if re.match(r"nbs/(proofs/)?[a-z_]+\.ipynb", name)]
    assert {page: found for page in pages if (found := wide(page))} == {} and len(pages) > 8
    assert wide(EXPORTING["run.launch"])  # the control: nobody's page


def imported(text: str) -> dict[str, tuple[str, str]]:
    "What code imports from modules of the package: (module, name there), by the name that it has here."
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if (node.module or "").startswith("resnet_nb.")]
    return {alias.asname or alias.name: (node.module[10:], alias.name) for node in ours for alias in node.names}


def with_traceback(modules: dict[str, str]) -> set[tuple[str, str]]:
    "The functions that raise, by themselves or by what they call, an error that a notebook shows with the way it took through the code."
    uses = {}
    for module, text in modules.items():
        known = imported(text)
        for function in (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)):
            inside = [node for line in function.body for node in ast.walk(line)]
            names = [known.get(node.id, (module, node.id)) for node in inside if isinstance(node, ast.Name)]
            called = [(known.get(ast.unparse(node.value), ("",)), node.attr) for node in inside if isinstance(node, ast.Attribute)]
            raises = any(isinstance(node, ast.Raise) for node in inside)
            if "one_sentence" not in map(ast.unparse, function.decorator_list):
                uses[module, function.name] = {*names, *((".".join(of), name) for of, name in called), *["raise"] * raises}
    found = {"raise"}
    while more := {function for function, used in uses.items() if function not in found and used & found}:
        found |= more
    return found - {"raise"}


def test_what_pages_call_says_errors_in_one_sentence():
    passed = {"describe", "resolve", "steps_per_epoch", "slurm_step"}  # asked about what `open_run` let pass, or what stands on the page

    def shows(text: str, modules: dict[str, str]) -> set[str]:
        called = {node.func.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        known, raising = imported(text), with_traceback(modules)
        return {name for name in called & known.keys() if known[name] in raising}

    pages = {name: "\n".join(sources(book).values()) for name, book in NOTEBOOKS.items() if re.fullmatch(r"nbs/[a-z_]+\.ipynb", name)}
    assert {name: found for name, text in pages.items() if (found := shows(text, MODULES) - passed)} == {} and len(pages) > 8
    assert [name for name, text in pages.items() if re.search(r"^ *raise\b", text, re.M)] == []
    modules = {"a": "def f():\n    raise ValueError", "b": "from resnet_nb.a import f\n@one_sentence\ndef g():\n    f()\ndef h():\n    f()"}
    modules["c"] = "from resnet_nb import a\nfrom resnet_nb.b import g\ndef i():\n    a.f()\ndef j():\n    g()"
    assert with_traceback(modules) == {("a", "f"), ("b", "h")}
    assert shows("from resnet_nb.a import f as e\nfrom resnet_nb.b import g, h\ne(g(h))", modules) == {"e"}


def test_words_of_keys_stand_in_one_table_in_seed():
    def literal(text: str) -> list[str]:
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        return [call for call in calls if re.match(r"([\w.]+\.)?(seed_key|torch_seed)\(.*[\"']", call)]

    assert {module: found for module, text in MODULES.items() if (found := literal(text))} == {}
    assert literal("seed_key(0, ORDER, 1)\nseed.torch_seed(0, 'mixup')\nprint('x')") == ["seed.torch_seed(0, 'mixup')"]


def test_callbacks_never_reach_for_another_callback():
    other = r"trainer\.(?:\w*callbacks?|_callback_connector)\b"
    assert re.findall(other, MODULES["run.recording"] + MODULES["run.stopping"]) == []
    assert len(re.findall(other, "trainer.callbacks[0], module.trainer.checkpoint_callback.x, trainer.callback_metrics")) == 2


LONG = {  # exported cells of more than 45 lines, and why they stay whole
    "learn.network RunningStats": "a network's statistics, their sum and its way back",
    "run.recording MetricsCallback": "the hooks of one callback",
    "run.stopping CheckpointCallback": "the hooks of one callback",
}


def test_exported_cells_fit_on_a_screen():
    exported = {module: sources(NOTEBOOKS[path], "export").items() for module, path in EXPORTING.items()}
    long = {f"{module} {name}": n for module in exported for name, text in exported[module] if (n := len(text.splitlines())) > 45}
    print("\n".join(f"{count} lines: {name}" for name, count in long.items()))
    assert {name: long.get(name, "is short now: remove it from LONG") for name in long.keys() ^ LONG.keys()} == {}


def test_numbered_notebooks_and_no_others_export_the_module_of_their_name():
    to = {name: re.findall(r"^#\| default_exp (.*)$", "\n".join(sources(book).values()), re.M) for name, book in NOTEBOOKS.items()}
    assert to == {name: [] for name in NOTEBOOKS} | {name: [module] for module, name in EXPORTING.items()}
    assert {name for name, book in NOTEBOOKS.items() if "imports" in sources(book, "export")} == {*EXPORTING.values()}


def faults(notebook: dict) -> dict:
    "What a notebook that is committed should not have."
    ids, exported, copy = [cell["id"] for cell in notebook["cells"]], sources(notebook, "export"), json.loads(json.dumps(notebook))
    text = nb2str(copy)
    clean_nb(copy, False, SETTINGS["allowed_metadata_keys"].split(), SETTINGS["allowed_cell_metadata_keys"].split(), True)
    tagged = {cell["id"] for cell in copy["cells"] if "parameters" in cell["metadata"].get("tags", [])}
    template = any(re.search(r"^skip_exec: *true$", text, re.M) for text in sources(notebook, kind="raw").values())
    outputs = json.dumps([cell["outputs"] for cell in notebook["cells"] if cell.get("outputs")])
    printed = re.sub(r'"image/(?!svg)[^"]*": ("[^"]*"|\[[^\]]*\])', "", outputs)  # the encoding of a picture may hold anything
    found = {
        "ids there twice": [name for name in ids if ids.count(name) > 1],
        "ids of an editor": [name for name in exported if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]{27})?|(?![A-Za-z_][\w-]*$).*", name)],
        "passing output": re.findall(r'/(?:home|Users|root|work|tmp|private|var/folders)/|Warning|0x[\da-f]{4,}\b(?!\.)|"stderr"', printed),
        "outputs of a template": template and outputs != "[]",
        "parameters without their tag": {"parameters"} & {*ids} ^ tagged,
        "what nbdev_clean changes": nb2str(copy) != text,
        "200 kB": len(text.encode()) >= 200_000,
    }
    return {name: what for name, what in found.items() if what}


def book(*cells: dict, **output) -> dict:
    "A notebook for a control; its cells say what is not as usual."
    usual = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "source": "#| export"}
    cells = [usual | {"outputs": [output] * bool(output)} | cell for cell in cells or [{}]]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_notebooks_have_no_faults():
    assert {name: found for name, notebook in NOTEBOOKS.items() if (found := faults(notebook))} == {}
    tagged, template = {"metadata": {"tags": ["parameters"]}}, {"cell_type": "raw", "source": "---\nskip_exec: true\n---"}
    passing = ("/home/me/x", "['/Users/me']", "/tmp/run", "UserWarning: no", "<f at 0x7f3a>")
    broken = {
        "ids there twice": [book({}, {})],
        "ids of an editor": [book({"id": name}) for name in ("a3f0c1d2", "07637414", "a3f0c1d2-19f4-4d7e-9a51-0f3b2c4d5e6f", "")],
        "passing output": [book(text=["a\n", text]) for text in passing] + [book(name="stderr"), book(data={"text/html": passing[0]})],
        "outputs of a template": [book(template, {"id": "b", "outputs": [{}]})],
        "parameters without their tag": [book({"id": "parameters"}), book(tagged)],
        "what nbdev_clean changes": [book({"metadata": {"scrolled": True}}), book({"execution_count": 3})],
        "200 kB": [book({"source": "x" * 200_000})],
    }
    assert [name for name, books in broken.items() for notebook in books if name not in faults(notebook)] == []
    assert faults(book(tagged | {"id": "parameters"}, data={"image/png": "/tmp/0x7f3a", "text/plain": "runs/a, 10x, 2/3"})) == {}


def headings(text: str) -> set[str]:
    "What may stand behind '#' in a link to a page of this text: the names of headings that are the same on GitHub and in JupyterLab."
    found = re.findall(r"^#+ +(.*?) *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in found} & {name.replace(" ", "-") for name in found}


def dead_links(name: str, pages: dict[str, str]) -> list[str]:
    "Relative links and pictures of a page that lead nowhere on GitHub or in JupyterLab, which opens no folders and has the project as its root."

    def leads(link: str) -> bool:
        path, _, heading = link.partition("#")
        place = Path(os.path.normpath((ROOT / name).parent / path)) if path else ROOT / name
        there = place.is_file() or (place.exists() and name.endswith(".md"))
        return (
            there and place.is_relative_to(ROOT) and (not heading or heading in headings(pages.get(place.relative_to(ROOT).as_posix(), "")))
        )

    links = map("".join, re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=[\"']([^\"']+)", pages[name]))
    return [link for link in links if not re.match(r"\w+:", link) and not leads(link)]


def test_every_list_of_recipes_is_that_of_today():
    listed = re.compile(rf"^ *(?:{'|'.join(RECIPES)}) .* epochs? .*batch.*", re.M)
    texts = lambda notebook: ["".join(output.get("text", [])) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    shown = {name: {line.strip() for text in texts(notebook) for line in listed.findall(text)} for name, notebook in NOTEBOOKS.items()}
    assert sum(map(bool, shown.values())) == 4
    assert not {line: name for name, lines in shown.items() for line in lines - set(recipe_lines())}


def test_links_and_pictures_lead_somewhere_on_github_and_in_jupyterlab():
    pages = {name: text for name, text in TEXTS.items() if name.endswith(".md")}
    pages |= {name: "\n".join(sources(notebook, kind="markdown").values()) for name, notebook in NOTEBOOKS.items()}
    assert {name: found for name in pages if (found := dead_links(name, pages))} == {}
    assert sum(len(re.findall(r"\]\((?!\w+:)", text)) for text in pages.values()) > 30
    text = '![a](b.md) <img src="c.png"> [d](nbs/index.ipynb#e) [f](https://g.h/i) [j](#k) [l](#m) [n](nbs)\n# k\n# Not only small'
    pages = {"README.md": text, "nbs/a.ipynb": "[a](nbs/index.ipynb) [b](index.ipynb) [c](run) [d](../../lab) [e](../README.md#k)"}
    assert dead_links("README.md", pages) == ["b.md", "c.png", "nbs/index.ipynb#e", "#m"]
    assert dead_links("nbs/a.ipynb", pages) == ["nbs/index.ipynb", "run", "../../lab"]
    assert headings("# k\n## Not only small\n### one two") == {"k", "one-two"}


def test_sources_have_no_unfinished_notes():
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b")
    assert [name for name, text in TEXTS.items() if unfinished.search(text)] == []
    assert unfinished.search("x = 1  # TO" + "DO") and unfinished.search("FIX" + "ME: y")


def test_make_has_the_targets_that_are_promised():
    has = {*re.findall(r"^([a-z-]+):(?!=)", TEXTS["Makefile"], re.M)}
    promised = re.compile(r"`make ([a-z-]+)\b|^ *(?:- run: )?make ([a-z-]+)(?=$| +#| +\w+=)", re.M)
    wanted = {
        name: {*map("".join, promised.findall(text))} for name, text in TEXTS.items() if name.endswith((".md", "test.yml", ".ci/run"))
    }
    assert {name: targets - has for name, targets in wanted.items() if targets - has} == {}
    assert ["".join(found) for found in promised.findall("`make tea`, make coffee\nmake sure that\n    make cake x=1")] == ["tea", "cake"]


def make_n(*given: str) -> subprocess.CompletedProcess:
    "What make would do, without what the make of `make test` tells its children, in whose name it would speak of its folder."
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "TORCH"))}
    return subprocess.run(["make", "-n", *given], cwd=ROOT, env=alone, capture_output=True, text=True)


def test_make_train_refuses_what_it_does_not_know():
    wrong = make_n("train", "recipie=imagenette", "seed=1")
    assert wrong.returncode == 2 and "make train does not know recipie=; it takes hw= recipe= name=" in wrong.stderr
    right = make_n("train", "recipe=imagenette", "data_dir=/my  pictures", "seed=1", "overrides={epochs: 2}")  # the control
    assert right.returncode == 0
    assert right.stdout.endswith("train -r recipe 'imagenette' -r data_dir '/my  pictures' -p seed '1' -p overrides '{epochs: 2}'\n")


def test_another_build_of_torch_is_installed_where_one_is_there():
    if not (ROOT / ".venv" / "done").exists():
        pytest.skip("needs what `make setup` leaves")
    settled = [word for file in ("settings.ini", "setup.py", "pyproject.toml") for word in ("-o", file)]  # since it was made
    assert (
        "pip install --quiet torch==2.10.0 torchvision==0.25.0 "
        in make_n(*settled, "setup", "TORCH=torch==2.10.0 torchvision==0.25.0").stdout
    )
    assert "pip install" not in make_n(*settled, "setup").stdout  # the control


def test_ci_runs_only_make():
    steps = yaml.safe_load(TEXTS[".github/workflows/test.yml"])["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["make test", "make sync"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert all(yaml.safe_load(text) for name, text in TEXTS.items() if name.endswith(".yml"))
    assert re.findall(r"^(?!#|set |cd |command |$).*", TEXTS[".ci/run"], re.M) == [
        "make setup",
        "make sync",
        "make test",
    ]  # pytest's summary is last


def test_the_package_is_what_the_notebooks_export(tmp_path):
    changed = TEXTS["nbs/01_seed.ipynb"].replace("import numpy as np", "import numpy as np  # changed", 1)  # the control
    for name, text in (TEXTS | {"nbs/01_seed.ipynb": changed}).items():
        if name in NOTEBOOKS or name == "settings.ini":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
    nbdev_export = Path(sys.executable).with_name("nbdev_export")
    subprocess.run([nbdev_export], cwd=tmp_path, env=os.environ | {"IN_TEST": ""}, timeout=60, check=True)
    exported = {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.glob("resnet_nb/**/*.py")}
    package = {name: text for name, text in TEXTS.items() if name.startswith("resnet_nb/")}
    assert [name for name in sorted(exported | package) if exported.get(name) != package.get(name)] == ["resnet_nb/seed.py"]
    assert exported["resnet_nb/seed.py"].replace("  # changed", "", 1) == package["resnet_nb/seed.py"], "run `make export`"
