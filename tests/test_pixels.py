"""What a network sees is what the file holds: 16 bits, floats, alpha, orientation, damage, and sizes that no memory holds."""

import io
import os
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile, ImageOps

from resnet_nb.config import RECIPES
from resnet_nb.data import index as index_module
from resnet_nb.data import transforms
from resnet_nb.data.index import BadPicture, fingerprint
from resnet_nb.data.inspect import examine, inspect_data
from resnet_nb.data.pack import pack, shrink
from resnet_nb.data.splits import list_data, load_data
from resnet_nb.data.transforms import BACKGROUND, ORIENTATION, decode, eval_picture, load_eval, load_train, read_size

RECIPE = RECIPES["imagenet"]
y, x = np.mgrid[:60, :84]
COLOURS = np.stack([x * 3, y * 4, (x * y) % 256], -1).astype(np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(picture, format="PNG", **options) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


class One:
    """A stand-in for an index of one picture."""

    def __init__(self, data):
        self.read, self.where = lambda i: data, lambda i: "one"


def everywhere(data, recipe=RECIPE):
    """What training, validation and a pack make of a picture."""
    training = [next(load_train(One(data), 0, [(epoch, 0, 24)], recipe))[0] for epoch in range(3)]
    return [*training, load_eval(One(data), 0, 32, recipe), decode(shrink(data, 20, 95), upright=recipe.exif_orientation)]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- more than 8 bits ----------------------------------------------------------------------------------------------------


def pgm(values) -> bytes:
    return b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes()


def tiff(values, bits=16, photometric=1, order="<") -> bytes:
    """An uncompressed greyscale TIFF, written by hand."""
    kind = {"<": b"II*\0", ">": b"MM\0*"}[order]
    tags = [
        (256, values.shape[1]),
        (257, values.shape[0]),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, values.shape[0]),
    ]
    strip = values.astype(order + "u2").tobytes()
    tags.append((279, len(strip)))
    number = lambda value, size: value.to_bytes(size, {"<": "little", ">": "big"}[order])
    entries = b"".join(number(tag, 2) + number(4, 2) + number(1, 4) + number(value, 4) for tag, value in sorted(tags))
    return kind + number(8 + len(strip), 4) + strip + number(len(tags), 2) + entries + bytes(4)


DEEP = RAMP * np.uint16(257)
DEEP_FILES = {
    "PNG": saved(DEEP),
    "PGM": pgm(DEEP),
    "TIFF": saved(DEEP, "TIFF"),
    "TIFF, compressed": saved(DEEP, "TIFF", compression="tiff_lzw"),
    "TIFF, big endian": tiff(DEEP, order=">"),
    "TIFF, big endian, as pillow writes it": saved(Image.frombytes("I;16B", (16, 16), DEEP.astype(">u2").tobytes()), "TIFF"),
    "TIFF, zero is white": tiff(65535 - DEEP, photometric=0),
    "floats in 0 to 1": saved(np.float32(RAMP / 255), "TIFF"),
    "floats in 0 to 255": saved(np.float32(RAMP), "TIFF"),
}


@pytest.mark.parametrize("form", DEEP_FILES)
def test_a_picture_in_more_than_8_bits_is_the_same_picture(form):
    shown = decode(DEEP_FILES[form])
    assert np.array_equal(shown, np.repeat(RAMP[..., None], 3, 2))
    assert same(everywhere(DEEP_FILES[form])[:4], everywhere(saved(RAMP))[:4]) and "16-bit" in examine(DEEP_FILES[form], "a").kinds


def test_pillows_own_conversion_would_have_clipped_it():
    assert (np.asarray(Image.open(io.BytesIO(DEEP_FILES["PNG"])).convert("RGB")) == 255).mean() > 0.9


def test_16_bits_are_rounded_and_their_transparent_value_is_background():
    values = np.array([[0, 128, 129, 32767, 65406, 65407, 65535]], np.uint16)
    assert decode(saved(values))[0, :, 0].tolist() == np.rint(values[0] / 257).tolist() == [0, 0, 1, 127, 254, 255, 255]
    assert decode(saved(values, transparency=129))[0, :, 0].tolist() == [0, 0, 255, 127, 254, 255, 255]


UNKNOWN = {
    "floats above 255": (np.float32([[0, 300]]), "its values lie in 0 to 300"),
    "floats below 0": (np.float32([[-0.5, 1]]), "its values lie in -0.5 to 1"),
    "a float that is none": (np.float32([[0, np.nan]]), "its values lie in nan to nan"),
    "infinite": (np.float32([[0, np.inf]]), "its values lie in 0 to inf"),
    "32 bits": (np.int32([[3, 70_000]]), "its whole numbers lie in 3 to 70,000, and nothing says what is white"),
}


@pytest.mark.parametrize("claim", UNKNOWN)
def test_values_of_no_known_range_are_refused_with_it(claim):
    values, words = UNKNOWN[claim]
    with pytest.raises(BadPicture, match=re.escape(f"can't be decoded as a picture: {words}")):
        decode(saved(values, "TIFF"))
    assert words in examine(saved(values, "TIFF"), "a.tif").kinds["undecodable"]


# --- transparency --------------------------------------------------------------------------------------------------------


def glass(mode, alpha) -> bytes:
    image = Image.fromarray(np.dstack([COLOURS, np.full_like(COLOURS[..., 0], alpha)]), "RGBA")
    if mode == "P":
        image = image.quantize(64)
    return saved(image.convert(mode) if mode != "P" else image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_background_everywhere(mode):
    clear, opaque, half = (glass(mode, alpha) for alpha in (0, 255, 128))
    blank = saved(np.full_like(COLOURS, BACKGROUND))
    assert same(everywhere(clear), everywhere(blank)) and not same(everywhere(opaque), everywhere(blank))
    kept = Image.open(io.BytesIO(opaque))
    assert np.array_equal(decode(opaque), np.asarray(kept.convert("RGB")))
    mean = (decode(opaque).astype(float) * 128 + 255 * 127) / 255
    assert np.abs(decode(half) - mean).max() < (1.5 if mode != "P" else 40)
    assert "over white" in examine(clear, "a.png").kinds["transparent"]


def test_a_palette_with_a_transparent_entry_and_a_colour_that_means_transparent_are_laid_over_background():
    palette = Image.fromarray(RAMP // 128).convert("P")
    for image, transparency in ((palette, 0), (Image.fromarray(np.dstack([RAMP // 128 * 255] * 3)), (0, 0, 0))):
        assert (decode(saved(image, transparency=transparency))[:8] == 255).all()
        assert (decode(saved(image))[:8] == 0).all()


def test_8_bit_pictures_without_alpha_are_as_they_were():
    images = [Image.fromarray(COLOURS).convert(mode) for mode in ("RGB", "L", "1", "P")]
    for image in images:
        assert np.array_equal(decode(saved(image)), np.asarray(image.convert("RGB")))
    for mode in ("RGB", "L", "CMYK"):
        data = saved(Image.fromarray(COLOURS).convert(mode), "JPEG")
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# --- EXIF orientation ----------------------------------------------------------------------------------------------------


def lying(orientation, format, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return saved(COLOURS, format, exif=exif, **options)


TURNING = RECIPE.model_copy(update={"exif_orientation": True})


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_heeded_everywhere_where_the_recipe_says_so(format, orientation):
    data = lying(orientation, format)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(decode(data, upright=True), upright) and read_size(data, upright=True) == upright.shape[1::-1]
    turned, lossless = everywhere(data, TURNING), everywhere(saved(upright))
    assert same(turned[3:4], lossless[3:4])
    if format != "JPEG":  # of which training decodes another way
        assert same(turned[:3], lossless[:3])
    ignoring = everywhere(data)
    assert same(ignoring[:4], everywhere(saved(COLOURS, format))[:4]) == (format != "TIFF" or orientation == 1)
    assert same(ignoring, turned) == (format == "TIFF" or orientation == 1)


def test_a_pack_keeps_the_orientation_for_the_recipe_to_decide():
    data = lying(6, "JPEG")
    packed = shrink(data, 20, 95)
    assert decode(packed).shape == (20, 28, 3) and decode(packed, upright=True).shape == (28, 20, 3)
    assert shrink(saved(COLOURS, "JPEG"), 20, 95) == shrink(lying(1, "JPEG"), 20, 95)  # upright: not a byte more


@pytest.mark.parametrize("half", [False, True])
def test_crops_are_drawn_on_what_is_seen(half):
    data, size = lying(6, "JPEG", quality=95), 12 if half else 40
    upright = saved(np.rot90(COLOURS, -1), "JPEG", quality=95)
    for epoch in range(5):
        (one, crop), (other, theirs) = (next(load_train(One(file), 0, [(epoch, 0, size)], TURNING)) for file in (data, upright))
        assert crop == theirs and np.abs(one.astype(int) - other).mean() < 12
    assert {next(load_train(One(data), 0, [(e, 0, size)], RECIPE))[1] for e in range(5)} != {
        next(load_train(One(data), 0, [(e, 0, size)], TURNING))[1] for e in range(5)
    }


# --- damage --------------------------------------------------------------------------------------------------------------

noise = np.random.default_rng(0).integers(0, 60, COLOURS.shape)
PHOTO = np.repeat(np.repeat(COLOURS // 2 + noise.astype(np.uint8), 3, 0), 3, 1)
needs_simplejpeg = pytest.mark.skipif(transforms.simplejpeg is None, reason="pillow alone does not see it")


@needs_simplejpeg
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}], ids=["baseline", "progressive", "restarts"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_has_lost_its_middle_is_damaged_with_the_same_words_in_training_and_in_the_check(options, mode):
    whole = saved(Image.fromarray(PHOTO).convert(mode), "JPEG", **options)
    assert "damaged" not in examine(whole, "a.jpg").kinds and decode(whole).shape == PHOTO.shape
    hole = whole[: len(whole) // 2] + whole[len(whole) // 2 + 700 :]
    with pytest.raises(BadPicture, match="'one' can't be decoded as a picture: it is damaged: .*; replace it or remove it") as refused:
        everywhere(hole)
    assert examine(hole, "a.jpg").kinds["damaged"] in str(refused.value)
    with pytest.raises(BadPicture, match="it is damaged|truncated"):
        decode(whole[: len(whole) // 2])


def with_app(data, marker, content) -> bytes:
    return data[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content + data[2:]


def says_something(data) -> bool:
    """Whether libjpeg has a warning for this file."""
    try:
        transforms.simplejpeg.decode_jpeg(data)
    except ValueError:
        return True
    return False


@needs_simplejpeg
def test_notes_on_a_header_and_padding_are_no_damage_and_hide_none():
    whole = saved(PHOTO, "JPEG")
    jfif = whole.index(b"JFIF\0") + 5
    noted = {
        "an unknown revision": whole[:jfif] + b"\x07" + whole[jfif + 1 :],
        "an unknown transform": with_app(whole, 0xEE, b"Adobe\0\x64\0\0\0\0\x07"),
        "bytes between segments": whole[:20] + b"???" + whole[20:],
        "padding": whole[:-2] + bytes([1, 2, 3]) + bytes(400) + whole[-2:],
    }
    for name, data in noted.items():
        assert says_something(data) == (name != "an unknown transform"), name  # which does not count beside JFIF
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))), name
        with pytest.raises(BadPicture, match="it is damaged"):
            decode(data[: len(data) // 2] + data[len(data) // 2 + 700 :])
    with pytest.raises(BadPicture, match="extraneous bytes"):
        decode(whole[:-2] + bytes(range(1, 60)) + whole[-2:])


@needs_simplejpeg
def test_most_holes_are_found_and_no_whole_picture_is_refused():
    draw, found = random.Random(0), 0
    for number in range(60):
        whole = saved(np.roll(PHOTO, number, 1), "JPEG", quality=70 + number % 25, progressive=number % 2 == 1)
        decode(whole)
        at = draw.randrange(len(whole) // 4, len(whole) // 2)
        try:
            decode(whole[:at] + whole[at + 512 :])
        except BadPicture:
            found += 1
    assert found >= 55


def test_pillow_alone_finds_what_is_cut_short_whatever_another_library_has_set(monkeypatch):
    monkeypatch.setattr(transforms, "simplejpeg", None)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for format in ("JPEG", "PNG"):
        whole = saved(PHOTO, format)
        assert decode(whole).shape == PHOTO.shape
        with pytest.raises(BadPicture, match="can't be decoded as a picture: .*truncated"):
            decode(whole[: len(whole) // 2])


# --- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 9_000)])
def test_a_long_strip_needs_one_crop_only(shape, monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *how, **more: sizes.append(size) or resize(image, size, *how, **more))
    assert eval_picture(pixels, 224, 8 / 7).shape == (224, 224, 3) and sizes == [(224, 224)]


@pytest.mark.parametrize("shape", [(40, 300), (300, 41), (400, 500), (31, 30)])
def test_the_crop_alone_is_within_rounding_of_the_crop_of_the_whole(shape, monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    whole = eval_picture(pixels, 96, 8 / 7).astype(int)
    monkeypatch.setattr(transforms, "MAX_SCALED", 0)
    off = np.abs(eval_picture(pixels, 96, 8 / 7) - whole)
    assert off.max() <= 2 and off.mean() < 0.5  # each of two passes rounds
    assert np.abs(eval_picture(np.roll(pixels, 1, 1), 96, 8 / 7) - whole).mean() > 1


def huge(format, size=(9_000, 8_000), **options) -> bytes:
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    return saved(image, format, **options)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_very_large_picture_is_refused_for_training_with_advice_that_packing_follows(format, tmp_path, home, capfd):
    data = tmp_path / "data"
    for split, content in (("train", huge(format)), ("val", saved(COLOURS, format))):
        for label, file in (("a", content), ("b", saved(COLOURS, format))):
            (data / split / label).mkdir(parents=True)
            (data / split / label / f"1.{format}").write_bytes(file)
    refusal = f"/train/a/1.{format}' can't be decoded as a picture: it has 9,000 x 8,000 pixels, at most .* are decoded; resnet-nb pack shrinks it"
    with pytest.raises(BadPicture, match=refusal):
        load_eval(list_data(data).train, 0, 32, RECIPE)
    assert "9,000 x 8,000" in inspect_data(data)["splits"]["train"]["listed"]["too large"][0][2]
    for what in (lambda: load_data(data), lambda: pack(data, tmp_path / "as they are", short_side=0)):
        with pytest.raises(ValueError, match="1 pictures can't be trained on, 'a/1.* are decoded; resnet-nb pack shrinks it"):
            what()
    train, *_ = load_data(pack(data, tmp_path / "packed", short_side=64))
    seen = decode(train.read(0))
    assert len(train) == 2 and seen.shape == (64, 72, 3) and seen[:, :34].min() > 250 and seen[:, 38:].max() < 5


def test_a_large_jpeg_that_is_damaged_is_not_packed_and_a_long_strip_stays_too_large():
    whole = huge("JPEG")
    assert decode(shrink(whole, 64, 90)).shape == (64, 72, 3)
    with pytest.raises(BadPicture, match="it is damaged|truncated"):
        shrink(whole[: len(whole) // 2], 64, 90)
    with pytest.raises(
        BadPicture,
        match="can't be packed at 64 px: it has 2,000,000 x 40 pixels, and is no longer than that on its short side; cut it or remove it",
    ):
        shrink(saved(Image.new("1", (2_000_000, 40)), "PNG"), 64, 90)


# --- parquet: a row group is read once -----------------------------------------------------------------------------------


def rows_data(folder, count=120, per_group=30):
    """Parquet files whose rows are in no order of class or name; returns the folder."""
    folder.mkdir()
    order = random.Random(0).sample(range(count), count)
    images = [{"bytes": saved(np.roll(COLOURS, i, 1), "JPEG"), "path": f"{i:04d}.jpg"} for i in order]
    for split in ("train", "val"):
        pq.write_table(pa.table({"image": images, "label": [i % 3 for i in order]}), folder / f"{split}.parquet", row_group_size=per_group)
    return folder


@pytest.fixture
def groups_read(monkeypatch):
    """Which row groups are read in this process, in order."""
    read, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, group, **how: read.append(group) or original(file, group, **how))
    index_module._groups.clear()
    yield read
    index_module._groups.clear()


def test_reading_in_the_order_of_rows_reads_each_group_once_and_any_order_gives_the_same(tmp_path, groups_read, monkeypatch, home):
    index = list_data(rows_data(tmp_path / "rows")).train
    groups_read.clear()
    wanted = {i: saved(np.roll(COLOURS, int(index.name(i)[:4]), 1), "JPEG") for i in range(len(index))}
    monkeypatch.setattr(index_module, "ROWS_KEPT", 0)
    assert {i: index.read(i) for i in index.reading_order().tolist()} == wanted and groups_read == [0, 1, 2, 3]
    assert {i: index.read(i) for i in range(len(index))} == wanted and len(groups_read) > 40  # by class and name, with one group kept
    assert len(index_module._groups) == 1
    monkeypatch.setattr(index_module, "ROWS_KEPT", 2**28)
    groups_read.clear()
    assert {i: index.read(i) for i in range(len(index))} == wanted and len(groups_read) <= 4


def test_another_file_in_the_same_place_is_not_taken_for_the_one_that_was_read(tmp_path, groups_read, home):
    before = list_data(rows_data(tmp_path / "rows")).train.read(0)
    (tmp_path / "rows").rename(tmp_path / "old")
    rows_data(tmp_path / "rows", count=60)
    after = list_data(tmp_path / "rows").train
    assert after.read(0) == before and len(groups_read) == 2
    assert after.read(1) != before


def test_check_and_pack_of_rows_are_those_of_the_same_pictures_in_folders(tmp_path, home):
    rows = rows_data(tmp_path / "rows")
    found = list_data(rows)
    for split, index in (("train", found.train), ("val", found.val)):
        for i in range(len(index)):
            path = tmp_path / "folders" / split / os.fsdecode(index.relative_path(i))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(index.read(i))
    by_rows, by_folders = (inspect_data(data)["splits"]["train"] for data in (rows, tmp_path / "folders"))
    for fact in ("pictures", "bytes", "content_sha256", "classes", "listed", "histogram"):
        assert by_rows[fact] == by_folders[fact]
    packs = [list_data(pack(tmp_path / form, tmp_path / f"{form} packed", short_side=32)).train for form in ("rows", "folders")]
    assert [packs[0].read(i) for i in range(120)] == [packs[1].read(i) for i in range(120)] and fingerprint(packs[0]) == fingerprint(
        packs[1]
    )
    assert packs[0].arrays["offsets"].tolist() != packs[1].arrays["offsets"].tolist()  # the parts hold them in another order
