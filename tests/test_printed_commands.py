"""Every command that the README or a page prints works, from the project's root and from another folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

from resnet_nb import cli
from resnet_nb.config import RECIPES, as_yaml
from resnet_nb.run.folder import read_status, run_path
from resnet_nb.run.plan import resolve

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "nbs").glob("[a-z]*.ipynb"), *(ROOT / "nbs" / "proofs").glob("*.ipynb")]
COMMAND = r"(?:[A-Z_]+=\S+ )?(?:resnet-nb|papermill|make) [^`\n]+"

ONE_EPOCH = json.dumps({"overrides": SMALL | {"epochs": 1, "image_sizes": [16], "accelerator": "cpu"}})
OWN = f" -r name {{new}} -p data_dir {{data}} -y '{ONE_EPOCH}'"
TRAINS = f" -p recipe digits{OWN}"
FEW_CUDA = "this machine has 0"
# command: what is added, so that it takes seconds and writes where a test may write; what it must say
RUN = {
    "resnet-nb train": (TRAINS, "done: "),
    "resnet-nb train -p hw local -p recipe imagenette -p data_dir ~/imagenette": (OWN, "done: "),
    "resnet-nb train -p hw cpu2": (TRAINS, "done: "),
    "resnet-nb train -p recipe photos -p data_dir ~/pets": (OWN, "done: "),
    "resnet-nb recipes show finetune > pets.yaml": ("; cat pets.yaml", "base: finetune"),
    "resnet-nb train -h": ("", "Hardware fields, for overrides"),
    "resnet-nb recipes": ("", "not measured"),
    "resnet-nb hw": ("", "data workers per rank"),
    "resnet-nb train -p hw g5": ("", FEW_CUDA),
    "resnet-nb train -p hw p3": ("", FEW_CUDA),
    "resnet-nb train -p hw cuda -p recipe imagenette -p data_dir ~/imagenette": (" -p data_dir {data}", FEW_CUDA),
    "resnet-nb train -p hw cuda -p recipe imagenet -r name night -y 'overrides: {mirror: s3://bucket/runs}'": (
        " -p data_dir {data}",
        FEW_CUDA,
    ),
    "resnet-nb train -y '{overrides: {epochs: 2, arch: resnet34, image_sizes: [64, 96]}}'": (
        " -r name {new} -p recipe digits -p data_dir {data}",
        "done: ",
    ),
    "papermill nbs/train.ipynb runs/out.ipynb -p hw cpu2": (TRAINS, ""),
    "papermill nbs/proofs/bench_data.ipynb runs/bench_data.ipynb -p photos /folder/of/full-size/photos": (
        " -p photos '' -p rounds 1 -p copies 5 -p files_per_class 1",
        "",
    ),
    "papermill nbs/proofs/imagenet.ipynb runs/imagenet.ipynb -y 'images_per_second: {g5: 700}'": ("", ""),
    "IMAGENETTE_DIR=/folder/of/imagenette papermill nbs/proofs/bench_step.ipynb runs/bench_step.ipynb": (" -p turns 1 -p size 32", ""),
    "IMAGENETTE_DIR=/folder/of/imagenette papermill nbs/proofs/finetune.ipynb runs/finetune.ipynb -p seeds 2": (
        " -p seeds 1 -p few 40 -p epochs 6 -p epochs_before 6 -y 'image_sizes: [16]'",
        "",
    ),
    "resnet-nb follow NAME": ("", "epoch   3/3"),
    "resnet-nb stop NAME": ("", "is not running"),
    "resnet-nb plot NAME": ("", "curves.png"),
    "resnet-nb verify A B": ("", "same"),
    "resnet-nb reproduce A": (" --name {new}", "same"),
    "resnet-nb explore -p recipe photos -p data_dir ~/pets": (OWN, "page: "),
    "resnet-nb lr-find -p recipe photos -p data_dir ~/pets": (f"{OWN} --steps 10", "figure: "),
    "resnet-nb seeds -p hw cpu2 --count 3 --variant '{flip: 0.5}' --variant '{flip: alternating}'": (
        f" --count 1 -p recipe digits -r name seeds -p data_dir {{data}} -y '{ONE_EPOCH}'",
        "flip: alternating  ",
    ),
    "resnet-nb runs": ("", "completed  epoch 3/3"),
    "resnet-nb train NAME": ("", "done: "),
    "resnet-nb evaluate NAME": (" --no-page", "weakest class"),
    "resnet-nb predict NAME PICTURES": (" --top 2", "%"),
    "resnet-nb export NAME": (" --format safetensors", "23 of 23 answers the same"),
    "resnet-nb compare A B": ("", "on the same 23 pictures both are right as often"),
    "resnet-nb check hw": (f" --seconds 0 -p recipe digits -p data_dir {{data}} -y '{ONE_EPOCH}'", "the whole schedule takes about"),
    "resnet-nb check hw local --parity": ("", ""),
    "resnet-nb check data DIR": (" --no-page", "healthy"),
    "resnet-nb pack DIR PACKED": ("", "96 training and 23 validation pictures"),
    "make train": (
        f" hw=cpu2 recipe=digits name={{new}} data_dir='{{data}}' overrides='{json.dumps(json.loads(ONE_EPOCH)['overrides'])}'",
        "done: ",
    ),
    "make train hw=cpu2 numerics=exact name=digits-exact": (
        f" recipe=digits name={{new}} data_dir='{{data}}' overrides='{json.dumps(json.loads(ONE_EPOCH)['overrides'])}'",
        "done: ",
    ),
}
# command that is not typed: the one above that asks for the same run, and one that asks for another
SAME = {
    "resnet-nb train -p hw local": ("resnet-nb train", "resnet-nb train -p hw cpu2"),
    "resnet-nb train -p recipe pets.yaml -p data_dir ~/pets": (
        "resnet-nb train -p recipe photos -p data_dir ~/pets",
        "resnet-nb train -p recipe finetune -p data_dir ~/pets",
    ),
}
NOT_RUN = {
    "resnet-nb train -p hw g5 -p nodes 2 -p rdzv HOST:PORT": "takes two machines; tests/test_nodes.py gives it on two hosts",
    "resnet-nb train -p recipe imagenet -p hw g5 -p data_dir /data/imagenet -r name r50 -p nodes 2 -p rdzv 10.0.0.5:29400": "the same",
    "papermill nbs/proofs/exactness.ipynb runs/exactness.ipynb -p epochs 2": "takes minutes; `make proofs` does it, and tests/test_proofs.py wants it once its code changes",
    "make test": "runs this test",
    "make faults": "does to some runs all that may happen to them, for the better part of an hour",
    "make lab": "a server that does not end",
    "make gpu": "takes minutes where there is an NVIDIA GPU",
    "make gpu IMAGENETTE_DIR=... TIMM_TRAIN=...": "takes minutes where there is an NVIDIA GPU",
    "make tensorboard": "a server that does not end",
    "make setup TORCH='torch==2.10.0 torchvision==0.25.0'": "gets another build of torch, several GB",
}


# kinds whose first one is typed elsewhere in tests/test_commands.py
ELSEWHERE = {"papermill", "resnet-nb train"}


def places_of(command: str) -> list[str]:
    "Where a command is typed: make in the root; the first one of its kind in both places, as what it finds depends on the place; others elsewhere, the longer way."
    kind = re.match(r"papermill|resnet-nb \S+", re.sub(r"^[A-Z_]+=\S+ ", "", command))
    first = kind and next(other for other in RUN if kind[0] in other)
    if not kind or command == first and kind[0] in ELSEWHERE:
        return ["root"]
    return ["root", "elsewhere"] if command == first else ["elsewhere"]


# plain papermill gives its kernel ports that are free just then, and a kernel that begins beside it may be given the same
OTHER_KERNELS = re.compile(
    r"ERROR:tornado\.general:Uncaught exception in ZMQStream callback\nTraceback.*?ValueError: DELIM not in msg_list\n", re.S
)
FAILS = {command for command, (_, says) in RUN.items() if says == FEW_CUDA}


def printed(text: str) -> set[str]:
    "Commands in backticks, and those on indented lines of their own."
    found = re.findall(rf"`({COMMAND})`", text) + re.findall(rf"^    ({COMMAND})$", text, re.MULTILINE)
    return {re.sub(r"\s+#.*", "", command).strip() for command in found} - {"resnet-nb …"}


def markdown(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def test_every_printed_command_is_in_the_table():
    known = RUN.keys() | SAME.keys() | NOT_RUN.keys()
    assert {path.name: printed(markdown(path)) - known for path in PAGES if printed(markdown(path)) - known} == {}
    assert known <= set().union(*(printed(markdown(path)) for path in PAGES))  # none that nobody prints any more
    assert printed("see `make tea`, and\n\n    papermill a.ipynb b.ipynb  # slow\n") == {"make tea", "papermill a.ipynb b.ipynb"}


@pytest.fixture(scope="module")
def places(home, data, one, two, tmp_path_factory):
    """What stands for the names in a command, and the folders to type it in."""
    person = tmp_path_factory.mktemp("person")
    for name in ("imagenette", "pets"):
        (person / name).symlink_to(data)
    names = {"NAME": one.name, "A": two.name, "B": two.name, "DIR": f"'{data}'", "PICTURES": f"'{data}/val'"}
    return person, names, {"root": ROOT, "elsewhere": tmp_path_factory.mktemp("some where")}


@pytest.mark.parametrize("command, place", [(c, p) for c in RUN for p in places_of(c)])
def test_printed_commands_work(command, place, places, data, tmp_path):
    person, names, folders = places
    more, says = RUN[command]
    words = re.sub(r"\b(NAME|A|B|DIR|PICTURES)\b", lambda name: names[name[0]], command).replace("PACKED", f"'{tmp_path / 'packed'}'")
    words = words.replace("/folder/of/imagenette", "").replace("runs/", f"{tmp_path}/")
    if place == "elsewhere":
        words = words.replace("nbs/", f"{ROOT}/nbs/")
    new = re.sub(r"\W+", "-", f"{command} {place}")[:60].strip("-")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(person)}
    words += more.replace("{new}", new).replace("{data}", str(data) if "make" in command else f"'{data}'")
    words = words.replace("pets.yaml", f"{tmp_path}/pets.yaml")
    done = subprocess.run(
        ["bash", "-c", words], cwd=folders[place], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert bool(done.returncode) == (command in FAILS), done.stdout[-3000:] + done.stderr[-3000:]
    assert says in done.stdout + done.stderr
    said = OTHER_KERNELS.sub("", done.stderr)
    assert "Traceback" not in said and "unknown parameter" not in done.stderr
    if " train " in command and says == "done: ":
        assert read_status(run_path(names["NAME"] if "NAME" in command else new))["status"] == "completed"


@pytest.mark.parametrize("command", SAME)
def test_a_command_that_is_not_typed_asks_for_the_run_of_another(command, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pets.yaml").write_text(as_yaml(RECIPES["photos"], base="photos"))

    def asked(command: str) -> dict:
        words = [os.path.expanduser(word) for word in shlex.split(command)]
        given = cli.main.commands["train"].make_context("train", [*words[2:], "-r", "name", "asked"]).params
        config = resolve(cli.read_options(*(given[option] for option in "pryf")))
        return config.model_dump(exclude={"recipe_name": True, "recipe_sha256": True, "parameters": {"recipe"}})

    same, other = SAME[command]
    assert asked(command) == asked(same) != asked(other)
