"""A compiled network: when it is compiled, and that it learns the same."""

import pytest
import torch
from conftest import run_here
from torch import nn

from resnet_nb.files import read_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import load_config, read_rows

# 96 pictures in 4 steps of 5 microbatches: some have 5, some 4; 23 validation pictures in batches of 5 and a last one of 3
UNEVEN = {"epochs": 3, "image_sizes": [16, 24, 24], "num_microbatches": 5, "microbatch_size": 5}


@pytest.fixture
def here(make_config, monkeypatch):
    """here(name, ...): folder of a run in this process, where torch captures graphs and leaves them as they are."""
    compile_in_place = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda network, **how: compile_in_place(network, backend="eager", **how))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)

    def train(name, **more):
        run_dir, outcome = run_here(make_config(name, "local", **(UNEVEN | more)))
        assert outcome == "completed"
        return run_dir

    return train


def test_a_network_is_compiled_once_for_each_size_length_and_mode(here):
    counted = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counted.clear()
    compiled = here("compiled", compile=True)
    assert counted["stats"]["unique_graphs"] == 2 * (2 + 2)  # sizes x (lengths in training + in validation)
    epochs = read_rows(compiled, "epoch")  # ahead of its first epoch of each size, and told apart from training
    assert [row.get("compile_seconds", 0) > 0 for row in epochs] == [True, True, False]
    said = [launch.epoch_line(load_config(compiled), train, val) for train, val in zip(epochs, read_rows(compiled, "val"))]
    assert ["s of compiling" in line for line in said] == [True, True, False]
    counted.clear()
    plain = here("not-compiled")
    assert counted["stats"]["unique_graphs"] == 0
    losses = [[row["train/step_loss"] for row in read_rows(run, "step")] for run in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != pytest.approx(losses[1][::-1], rel=1e-3)
    names = [read_json(checkpoints(run)[0] / "MANIFEST.json")["tensors"].keys() for run in (compiled, plain)]
    assert names[0] == names[1]
    counted.clear()
    torch._dynamo.reset()
    frozen = here("compiled-frozen", compile=True, weights=str(plain), freeze_epochs=1)  # compiled as it then learns, not for nothing
    assert counted["stats"]["unique_graphs"] == 2 * (2 + 2)
    assert [row.get("compile_seconds", 0) > 0 for row in read_rows(frozen, "epoch")] == [True, True, False]


def test_exact_numerics_refuse_it(make_config):
    with pytest.raises(ValueError, match="compiled kernels add in an order of their own"):
        make_config("compiled-exact", "local", numerics="exact", compile=True)
