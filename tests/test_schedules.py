"""Every schedule is there for every legal recipe: from one step to a million epochs."""

import math
import tracemalloc

import pytest
from conftest import run_here
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_nb.config import RECIPES, Recipe
from resnet_nb.results.plots import plot_plan
from resnet_nb.run.folder import make_run_dir, read_rows
from resnet_nb.schedule import eval_size_at, is_frozen, lr_at, size_at, size_plan

share = st.floats(0, 1)
below_one = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, 1e30, exclude_min=True)
recipes = st.fixed_dictionaries(
    {
        "epochs": st.integers(1, 10) | st.integers(1, 10**9), "image_sizes": st.lists(st.integers(8, 1024), min_size=1, max_size=12),
        "schedule": st.sampled_from(["cosine", "flat_cosine", "onecycle", "linear", "step"]), "peak_lr": positive,
        "warmup_ratio": below_one | st.just(0.97), "flat_ratio": below_one, "final_lr_share": share, "step_epochs": positive,
        "step_gamma": positive, "test_size": st.none() | st.integers(8, 1024),
    }
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(recipes, st.integers(1, 10**6), st.lists(share, max_size=5))
def test_rates_and_sizes_exist_at_every_step_of_every_legal_recipe(fields, steps_per_epoch, places):
    recipe = Recipe(**RECIPES["digits"].model_dump() | fields)
    total = recipe.epochs * steps_per_epoch
    for step in {0, 1, total - 1, total, total + 1, *(int(place * total) for place in places)}:
        rate, epoch = lr_at(recipe, step, steps_per_epoch), step // steps_per_epoch
        assert 0 <= rate and math.isfinite(rate)
        assert recipe.schedule == "step" or rate <= recipe.peak_lr * (1 + 1e-9)
        assert size_at(recipe, epoch) in recipe.image_sizes and eval_size_at(recipe, epoch) and not is_frozen(recipe, epoch)
    plan = size_plan(recipe)
    assert plan[0][0] == 0 and len(plan) <= len(recipe.image_sizes)
    for (first, size), end in zip(plan, [first for first, _ in plan[1:]] + [recipe.epochs]):
        assert size_at(recipe, first) == size_at(recipe, end - 1) == size
        assert first == 0 or size_at(recipe, first - 1) != size


def test_a_billion_epochs_are_planned_in_little_memory():
    recipe = RECIPES["imagenet"].model_copy(update={"epochs": 10**9})
    tracemalloc.start()
    figure = plot_plan(recipe, 10_000)
    assert size_plan(recipe) == [*zip((0, 250_000_000, 500_000_000, 750_000_000), recipe.image_sizes, strict=True)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert len(figure.axes[0].lines[0].get_xdata()) <= 3000


@pytest.mark.parametrize("schedule", ["onecycle", "flat_cosine", "step"])
def test_a_run_of_one_step_nearly_all_of_it_warm_up_ends_whole(make_config, schedule):
    run_dir, outcome = run_here(
        make_config(f"brief-{schedule}", "local", epochs=1, image_sizes=[16], microbatch_size=24, schedule=schedule, warmup_ratio=0.97)
    )
    assert outcome == "completed" and len(read_rows(run_dir, "step")) == len(read_rows(run_dir, "val")) == 1


def test_a_run_of_a_million_epochs_starts_and_stops(make_config):
    config = make_config("endless", "local", epochs=10**6)
    (make_run_dir("endless") / "STOP").touch()
    assert "saved at step 1" in run_here(config)[1]


def test_names_of_runs_that_differ_in_case_alone_are_refused(home):
    make_run_dir("Cased")
    make_run_dir("Cased")
    with pytest.raises(ValueError, match="run name 'cased' differs from that of run 'Cased' in case alone"):
        make_run_dir("cased")
