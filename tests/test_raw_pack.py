"""Packs of bare pixels: what is learned from them, what a check says of them, and which recipes they hold enough for."""

import io

import pytest
from click.testing import CliRunner
from conftest import trained_here
from PIL import Image

from resnet_nb.cli import main
from resnet_nb.config import RECIPES
from resnet_nb.data.pack import pack
from resnet_nb.data.splits import index_data
from resnet_nb.data.transforms import ORIENTATION, load_eval, load_train
from resnet_nb.run.folder import read_rows
from resnet_nb.run.plan import validate


@pytest.fixture(scope="module")
def bare(data, tmp_path_factory):
    """The small data as pixels."""
    folder = tmp_path_factory.mktemp("packs") / "bare"
    result = CliRunner().invoke(main, ["pack", str(data), str(folder), "--raw", "--size", "0"])
    assert result.exit_code == 0, result.output
    return folder


def test_a_run_on_the_pixels_of_pictures_without_loss_learns_what_it_learns_from_the_files(one, bare, make_config, data, tmp_path):
    run_dir = trained_here(make_config("on-pixels", "local", data_dir=bare))
    rows = [[(row["digest"], row["train/step_loss"]) for row in read_rows(run, "step")] for run in (one, run_dir)]
    assert rows[0] == rows[1]
    smaller = trained_here(
        make_config("on-fewer-pixels", "local", data_dir=pack(data, tmp_path / "smaller", 8, raw=True), epochs=1, image_sizes=[8])
    )
    first = read_rows(smaller, "step")[0]
    assert first["train/step_loss"] != rows[0][0][1]
    assert read_rows(one, "val")[-1]["val/loss"] == read_rows(run_dir, "val")[-1]["val/loss"]


def test_a_check_finds_nothing_odd_in_it(bare):
    result = CliRunner().invoke(main, ["check", "data", str(bare), "--no-page"])
    assert result.exit_code == 0 and "healthy" in result.output and "misnamed" not in result.output, result.output


def test_a_recipe_whose_images_outgrow_a_pack_is_refused_with_both_numbers(data, make_config, tmp_path):
    for name, raw in (("pixels", True), ("files", False)):
        packed = pack(data, tmp_path / name, 16, raw=raw)
        validate(make_config("fits", "local", data_dir=packed, image_sizes=[8, 16]))
        with pytest.raises(ValueError, match="short side of 16 px, and the recipe's images grow to 24 px; pack again with --size 24"):
            validate(make_config("outgrows", "local", data_dir=packed, image_sizes=[16, 24]))
    validate(make_config("files-outgrow-nothing", "local", image_sizes=[16, 24]))


def test_orientation_and_odd_sides_are_kept(tmp_path):
    for n, (label, size) in enumerate((("ant", (41, 23)), ("bee", (17, 64)), ("ant", (200, 8)), ("bee", (1, 90)))):
        exif = Image.Exif()
        exif[ORIENTATION] = 1 + 2 * n
        for split in ("train", "val"):
            (tmp_path / "files" / split / label).mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 90).convert("RGB").save(file := io.BytesIO(), "PNG", exif=exif)
            (tmp_path / "files" / split / label / f"{n}.png").write_bytes(file.getvalue())
    files, pixels = (index_data(where) for where in (tmp_path / "files", pack(tmp_path / "files", tmp_path / "bare", 0, raw=True)))
    keys = [(0, i, 16) for i in range(4)]
    trained = []
    for upright in (False, True):
        recipe = RECIPES["photos"].model_copy(update={"exif_orientation": upright})
        seen, same = ([x.tolist() for x, _ in load_train(index[0], 0, keys, recipe)] for index in (files, pixels))
        judged, also = ([load_eval(index[1], i, 16, recipe).tolist() for i in range(4)] for index in (files, pixels))
        assert (seen, judged) == (same, also)
        trained.append(seen)
    assert trained[0] != trained[1]
