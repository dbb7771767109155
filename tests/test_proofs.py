"""What is proved in nbs/proofs was proved by the code that is there now, or says by which."""

import ast
import json
import re
from pathlib import Path

import pytest

from resnet_nb.run.folder import code_sha256
from resnet_nb.seed import STREAM_VERSION

PROOFS = Path(__file__).resolve().parent.parent / "nbs" / "proofs"


def code_cells(name: str) -> list[dict]:
    cells = json.loads((PROOFS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def said(cells: list[dict]) -> str:
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])


def stale(text: str, modules: list[str], stream: int = STREAM_VERSION) -> list[str]:
    "What the outputs of a proof say otherwise than the code that is there."
    wanted = {"code": code_sha256(*modules), "stream": str(stream)}
    return [name for name, value in wanted.items() if re.findall(rf"^{name} (\S+)$", text, re.MULTILINE) != [value]]


def test_the_proof_of_exactness_is_of_this_code():
    cells = code_cells("exactness")
    (modules,) = re.findall(r"^decided_by = (\[.*\])$", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    modules, text = ast.literal_eval(modules), said(cells)
    assert set(modules) >= {"seed", "data.sampler", "data.transforms", "learn.numerics", "learn.network", "learn.module"}
    assert stale(text, modules) == [], "the code that decides this proof has changed since: run `make proofs`"
    assert stale(text, modules[1:]) == ["code"] and stale(text, modules, STREAM_VERSION + 1) == ["stream"]


@pytest.mark.parametrize("name", ["bench_data", "bench_step"])
def test_measurements_say_at_which_commit(name):
    assert re.search(r"^measured at [0-9a-f]{7}$", said(code_cells(name)), re.MULTILINE)
    assert not re.search(r"^measured at [0-9a-f]{7}$", said(code_cells("exactness")), re.MULTILINE)
