"""Data that is damaged, incomplete or something else is refused with one sentence that says what is wrong; whole, it is taken."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_data
from PIL import Image

from resnet_nb.config import Parameters
from resnet_nb.data.formats import DEVKIT, TRAIN_TAR, VAL_TAR, damaged_parts, find_pictures
from resnet_nb.data.index import cache_dir, fingerprint
from resnet_nb.data.inspect import inspect_data, inspect_split
from resnet_nb.data.pack import pack, pack_problem
from resnet_nb.data.splits import index_data, list_data, read_inspection
from resnet_nb.data.transforms import MAX_PIXELS, TooLarge, decode, read_size
from resnet_nb.files import read_json, write_json
from resnet_nb.run.forecast import before_lines
from resnet_nb.run.plan import resolve

# --- a small ImageNet in five forms ------------------------------------------------------------------------------------

WORDS = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus"}


def picture(number, format="JPEG", size=(24, 20)) -> bytes:
    Image.new("RGB", size, (20 * number, 99, 0)).save(file := io.BytesIO(), format)
    return file.getvalue()


TRAIN = [(key, f"{key}_{i}.JPEG", picture(i + 3 * k)) for k, key in enumerate(WORDS) for i in range(3)]
VAL = [(key, f"ILSVRC2012_val_{2 * i + k:08d}.JPEG", picture(6 + i + 2 * k)) for k, key in enumerate(WORDS) for i in range(2)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write_folders(home):
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        for key, name, data in pictures:
            write(home / split / key / name, data)


def tar_of(files, mode="w") -> bytes:
    with tarfile.open(fileobj=(file := io.BytesIO()), mode=mode) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def write_tars(home):
    from scipy.io import savemat

    write(home / TRAIN_TAR, tar_of([(f"{key}.tar", tar_of([row[1:] for row in TRAIN if row[0] == key])) for key in WORDS]))
    in_order = sorted(VAL, key=lambda row: row[1])
    write(home / VAL_TAR, tar_of([row[1:] for row in in_order]))
    numbers = dict(zip(WORDS, (2, 1)))  # an order of its own
    fields = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
    table = [(numbers[key], key, words, 0) for key, words in WORDS.items()] + [(1001, "n00001740", "entity", 2)]
    savemat(meta := io.BytesIO(), {"synsets": np.array(table, dtype=fields)})
    truth = "".join(f"{numbers[key]}\n" for key, *_ in in_order).encode()
    write(home / DEVKIT, tar_of([("kit/meta.mat", meta.getvalue()), ("kit/ILSVRC2012_validation_ground_truth.txt", truth)], "w:gz"))


def write_kaggle(home):
    for key, name, data in TRAIN:
        write(home / "ILSVRC/Data/CLS-LOC/train" / key / name, data)
    for _, name, data in VAL:
        write(home / "ILSVRC/Data/CLS-LOC/val" / name, data)
    lines = [f"{name.removesuffix('.JPEG')},{key} 85 1 499 272 \n" for key, name, _ in VAL]
    write(home / "LOC_val_solution.csv", "ImageId,PredictionString\n" + "".join(lines))


def write_parquet(home):
    home.mkdir()
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": list(WORDS.values())}}}})}
    for split, pictures in (("train", TRAIN), ("val", VAL)):
        images = [{"bytes": data, "path": f"{name.removesuffix('.JPEG')}_{key}.JPEG"} for key, name, data in pictures]
        table = pa.table({"image": images, "label": [list(WORDS).index(key) for key, *_ in pictures]})
        pq.write_table(table.replace_schema_metadata(metadata), home / f"{split}.parquet")


def write_pack(home):
    write_folders(home.with_name("packed"))
    pack(home.with_name("packed"), home, short_side=0)


FORMS = {"folders": write_folders, "tars": write_tars, "kaggle": write_kaggle, "parquet": write_parquet, "pack": write_pack}


@pytest.fixture
def make(tmp_path, home):
    """make(form): a folder with the small ImageNet in one of FORMS."""
    return lambda form: FORMS[form](tmp_path / form) or tmp_path / form


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def over(data, at, damage):
    return data[:at] + damage + data[at + len(damage) :]


def seen(index):
    return [(index.relative_path(i), index.read(i)) for i in range(len(index))]


@pytest.mark.parametrize("form", FORMS)
def test_whole_data_is_taken_in_every_form(make, form):
    train, val, _ = find_pictures(make(form))
    wanted = [sorted((f"{key}/{name}".encode(), data) for key, name, data in pictures) for pictures in (TRAIN, VAL)]
    assert [seen(train), seen(val)] == wanted != [seen(val), seen(train)]


# --- what is refused ---------------------------------------------------------------------------------------------------


def table(text):
    return lambda data: write(data / "LOC_val_solution.csv", text)


def shard(**columns):
    return lambda data: pq.write_table(pa.table(columns), data / "train.parquet")


def pack_says(**other):
    return lambda data: write_json(data / "pack.json", read_json(data / "pack.json") | other)


def exchanged_part(data):
    "The training part becomes that of a pack of fewer pictures, whose labels are exchanged."
    other = data.with_name("other")
    for split, pictures in (("train", TRAIN[1:]), ("val", VAL)):
        for key, name, picture in pictures:
            write(other / split / next(word for word in WORDS if word != key) / name, picture)
    part = pack(other, data.with_name("other pack"), short_side=0) / "train-00000.arrow"
    write(data / part.name, part.read_bytes())


IMAGES = [{"bytes": data, "path": name} for _, name, data in TRAIN]
# claim: form, what is done to it, the sentence
REFUSED = {
    "a class that is a link to a folder that holds it": (
        "folders", lambda data: (data / "train/loop").symlink_to("."), "train/loop' is a link to a folder that holds it; remove it"),
    "a picture that is a link that leads nowhere": (
        "folders", lambda data: (data / "val/n01440764/away.png").symlink_to("away.png"), "it is a link that leads nowhere; remove it"),
    "an empty class folder": (
        "folders", lambda data: (data / "val/n9").mkdir(), "val/n9' has no pictures; add some or remove it"),
    "a training tar that is cut short": (
        "tars", lambda data: edit(data / TRAIN_TAR, lambda tar: tar[:2000]), f"{TRAIN_TAR}' is no tar file that can be used"),
    "a validation tar that is cut short": (
        "tars", lambda data: edit(data / VAL_TAR, lambda tar: tar[:2000]), f"{VAL_TAR}' is no tar file that can be used"),
    "a damaged header inside a class": (
        "tars", lambda data: edit(data / TRAIN_TAR, lambda tar: over(tar, tar.index(b"n01443537_1.JPEG"), b"?")), "damaged or cut short at byte"),
    "a damaged header of a class": (
        "tars", lambda data: edit(data / TRAIN_TAR, lambda tar: over(tar, tar.index(b"n01443537.tar"), bytes(512))), "damaged or cut short at byte"),
    "a member that would leave the folder": (
        "tars", lambda data: write(data / VAL_TAR, tar_of([("../../evil.JPEG", b"x")])), "outside the destination"),
    "a missing tar": (
        "tars", lambda data: (data / VAL_TAR).unlink(), f"has ImageNet's tar files, but no {VAL_TAR}; all three are needed"),
    "fewer validation pictures than labels": (
        "tars", lambda data: write(data / VAL_TAR, tar_of([row[1:] for row in VAL[:3]])), f"{VAL_TAR} has 3 pictures, {DEVKIT} labels 4"),
    "another file for the development kit": (
        "tars", lambda data: write(data / DEVKIT, tar_of([("notes.txt", b"")], "w:gz")), f"{DEVKIT}' is not ImageNet's development kit"),
    "Kaggle's table with other columns": (
        "kaggle", table("Id,PredictionString\nx,y\n"), "is not Kaggle's table: it needs the columns ImageId and PredictionString, both filled"),
    "Kaggle's table with an empty column": (
        "kaggle", table("ImageId,PredictionString\nx,\n"), "is not Kaggle's table: it needs the columns ImageId and PredictionString, both filled"),
    "Kaggle's table without a line for a picture": (
        "kaggle", table("\ufeffImageId,PredictionString\n"), "LOC_val_solution.csv has no line for 'ILSVRC2012_val_0000000"),
    "Kaggle's table with two labels for a picture": (
        "kaggle", lambda data: edit(data / "LOC_val_solution.csv", lambda text: text + b"ILSVRC2012_val_00000000,n01443537 1 2 3 4\n"),
        "LOC_val_solution.csv' gives 'ILSVRC2012_val_00000000' both 'n01440764' and 'n01443537'; keep one of the rows"),
    "Kaggle's table that is not UTF-8": (
        "kaggle", lambda data: edit(data / "LOC_val_solution.csv", lambda text: text + b"\xe9\xe8,n01443537 1\n"),
        "LOC_val_solution.csv' is no table in UTF-8 ("),
    "a development kit with a damaged table": (
        "tars", lambda data: write(data / DEVKIT, tar_of([("meta.mat", bytes(range(200))), ("ILSVRC2012_validation_ground_truth.txt", b"1")], "w:gz")),
        f"{DEVKIT}' is not ImageNet's development kit (Mat 4 mopt wrong format"),
    "a development kit whose bytes are damaged": (
        "tars", lambda data: edit(data / DEVKIT, lambda kit: over(kit, len(kit) // 2, b"?!?!")), f"{DEVKIT}' is not ImageNet's development kit ("),
    "a development kit that is cut short": (
        "tars", lambda data: edit(data / DEVKIT, lambda kit: kit[: len(kit) // 2]), f"{DEVKIT}' is not ImageNet's development kit ("),
    "an empty development kit": (
        "tars", lambda data: write(data / DEVKIT, ""), f"{DEVKIT}' is not ImageNet's development kit ("),
    "a parquet label that is null": (
        "parquet", shard(image=IMAGES, label=[None, 0, 0, 0, 1, None]), "has 2 rows without a label (null or -1)"),
    "a parquet label that is -1": (
        "parquet", shard(image=IMAGES, label=[-1] * 6), "has 6 rows without a label (null or -1)"),
    "a parquet label beyond the names": (
        "parquet", shard(image=IMAGES, label=[0, 0, 0, 2, 2, 2]), "has the label 2, and names of labels 0 to 1 only"),
    "a fractional parquet label": (
        "parquet", shard(image=IMAGES, label=[0.5] * 6), "has labels of type double; needed are whole numbers, or words"),
    "parquet images of bytes without path": (
        "parquet", shard(image=[b"bytes alone"], label=[0]), "has columns image, label; needed are image (with bytes and path) and label"),
    "other parquet columns": (
        "parquet", shard(pixels=[1]), "has columns pixels; needed are image"),
    "a parquet shard that is cut short": (
        "parquet", lambda data: edit(data / "train.parquet", lambda shard: shard[:-9]), "train.parquet' is no parquet file that can be used"),
    "parquet shards of one split only": (
        "parquet", lambda data: (data / "train.parquet").unlink(), "has parquet files, but none called train*.parquet; pictures to train on are needed"),
    "an old pack": (
        "pack", pack_says(version=1), "was made by another version of resnet-nb (pack version 1, needed is 2); pack again, into another folder"),
    "an unfinished pack": (
        "pack", pack_says(finished=False), "is not finished; run the same resnet-nb pack command again, it goes on where it stopped"),
    "a pack that has lost a part": (
        "pack", lambda data: (data / "val-00000.arrow").unlink(), "val-00000.arrow'; run the same resnet-nb pack command again"),
    "a part of a pack that is cut short": (
        "pack", lambda data: edit(data / "val-00000.arrow", lambda part: part[:-9]), "val-00000.arrow' is no whole part of a pack"),
    "a part of a pack that is empty": (
        "pack", lambda data: write(data / "val-00000.arrow", ""), "val-00000.arrow' is no whole part of a pack: it has 0 bytes, written were"),
    "a part of another pack, with other labels": (
        "pack", exchanged_part, "train-00000.arrow' is no whole part of a pack: it has"),
    "a pack of fewer pictures than were packed": (
        "pack", pack_says(source={split: {"pictures": 7} for split in ("train", "val")}),
        "holds 6 train pictures, packed were 7; run the same resnet-nb pack command again, into the same folder"),
    "a pack.json that is cut short": (
        "pack", lambda data: edit(data / "pack.json", lambda about: about[:99]),
        "; to pack again, remove it and the *.arrow files beside it, or choose another folder"),
    "an empty pack.json": (
        "pack", lambda data: write(data / "pack.json", ""),
        "; to pack again, remove it and the *.arrow files beside it, or choose another folder"),
    "another file called pack.json": (
        "pack", lambda data: write(data / "pack.json", "{}"), "pack.json' is not that of a pack; choose another folder"),
}  # fmt: skip


@pytest.mark.parametrize("claim", REFUSED)
def test_refused_with_one_sentence_is(make, claim):
    form, damage, sentence = REFUSED[claim]
    data = make(form)
    assert len(find_pictures(data).train) == len(TRAIN)
    damage(data)
    with pytest.raises(ValueError) as refused:
        find_pictures(data)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_picture_that_changed_after_it_was_indexed_is_refused_when_it_is_read(make):
    data = make("folders")
    index = find_pictures(data).train
    assert index.read(0) in [picture for *_, picture in TRAIN]
    write(data / "train" / os.fsdecode(index.relative_path(0)), "shorter")
    with pytest.raises(ValueError, match="has 7 bytes, .* when it was indexed; data must not change under a run"):
        index.read(0)


# --- what is no damage -------------------------------------------------------------------------------------------------


def test_a_class_that_is_a_link_to_itself_is_no_class_and_one_to_another_folder_is(make):
    data = make("folders")
    (data / "train/itself").symlink_to("itself")
    assert find_pictures(data).train.classes == tuple(sorted(WORDS))
    (data / "train/elsewhere").symlink_to(data / "val/n01440764")
    assert find_pictures(data).train.classes == ("elsewhere", *sorted(WORDS))


def test_hidden_files_thumbnails_and_loops_of_links_are_no_pictures(make):
    data = make("folders")
    before = fingerprint(find_pictures(data).train)
    for name in ("._0.png", "Thumbs.db"):
        write(data / "train/n01440764" / name, "")
    (data / "train/n01440764/loop").symlink_to(data / "train")
    assert fingerprint(find_pictures(data).train) == before
    write(data / "train/n01440764/one more.png", "")
    assert fingerprint(find_pictures(data).train) != before


def test_kaggles_validation_pictures_sorted_into_class_folders_are_the_same_data(make):
    data = make("kaggle")
    flat, val = find_pictures(data).val, data / "ILSVRC/Data/CLS-LOC/val"
    before = seen(flat)
    for key, name, _ in VAL:
        (val / key).mkdir(exist_ok=True)
        (val / name).rename(val / key / name)
    assert fingerprint(find_pictures(data).val) == fingerprint(flat) and seen(find_pictures(data).val) == before
    (val / VAL[0][0] / VAL[0][1]).rename(val / VAL[-1][0] / VAL[0][1])  # into another class
    assert fingerprint(find_pictures(data).val) != fingerprint(flat) and seen(find_pictures(data).val) != before


# --- what is found, and mended -----------------------------------------------------------------------------------------


def test_an_inspection_finds_pictures_that_were_replaced_in_place(make):
    data, (key, name, old) = make("folders"), TRAIN[0]
    before, listed = inspect_data(data)["splits"]["train"], list_data(data).train
    write(data / "train" / key / name, picture(9))  # as many bytes, others
    after = inspect_data(data)["splits"]["train"]
    assert len(picture(9)) == len(old) and before["sha256"] == after["sha256"]
    assert before["content_sha256"] != after["content_sha256"] and not after["listed"]
    write(data / "train" / key / name, "shorter")
    assert [name for _, name, _ in inspect_split(listed, "train")[0]["listed"]["unreadable"]] == [f"{key}/{name}"]
    assert [name for _, name, _ in inspect_data(data)["splits"]["train"]["listed"]["undecodable"]] == [f"{key}/{name}"]


@pytest.mark.parametrize(
    "damage",
    [lambda part: over(part, 700, b"!"), lambda part: part[:-9], lambda part: b"", None],
    ids=["other bytes", "cut short", "empty", "lost"],
)
def test_a_damaged_part_of_a_pack_is_found_and_made_again(make, damage):
    data, lines = make("pack"), []
    part = data / "train-00000.arrow"
    before, about = part.read_bytes(), read_json(data / "pack.json")
    assert damaged_parts(data) == []
    edit(part, damage) if damage else part.unlink()
    assert damaged_parts(data) == [part.name]
    pack(data.with_name("packed"), data, short_side=0, show=lines.append)
    assert part.read_bytes() == before and read_json(data / "pack.json") == about
    assert [line.split(":")[0] for line in lines[:-1]] == [part.name]


@pytest.mark.parametrize("text", ["", '{"version": 2, "fini'], ids=["empty", "cut short"])
def test_a_damaged_pack_json_is_refused_with_what_to_do_which_does_it(make, text):
    data = make("pack")
    write(data / "pack.json", text)
    with pytest.raises(ValueError, match="pack.json' is damaged.*; to pack again, remove it and the ..arrow files beside it, or choose"):
        pack(data.with_name("packed"), data, short_side=0)
    for path in (data / "pack.json", *data.glob("*.arrow")):
        path.unlink()
    assert len(find_pictures(pack(data.with_name("packed"), data, short_side=0)).train) == len(TRAIN)


def test_a_pack_one_level_down_is_checked_as_the_pack_that_it_is(make, tmp_path):
    data = make("pack")
    for place in (data, tmp_path / "wrap"):
        if place != data:
            place.mkdir()
            data.rename(place / "p")
            data = place / "p"
        train, val = index_data(place, 0)
        assert pack_problem(train, 64) == "" and inspect_data(place)["damaged"] == []
        about, part = read_json(data / "pack.json"), (data / "train-00000.arrow").read_bytes()
        write_json(data / "pack.json", about | {"short_side": 32, "drawn": {"val_share": 0.2, "group": ""}})
        assert "with a short side of 32 px, and the recipe's images grow to 64 px" in pack_problem(index_data(place)[0], 64)
        assert len(index_data(place, 0.2)[1]) == len(val)  # the share that was drawn may be asked for again
        with pytest.raises(ValueError, match="drawn with .*'val_share': 0.2"):
            index_data(place, 0.3)
        write_json(data / "pack.json", about)
        write(data / "train-00000.arrow", over(part, 700, b"!"))
        assert inspect_data(place)["damaged"] == ["train-00000.arrow"]
        write(data / "train-00000.arrow", part)


def test_what_a_system_leaves_in_a_folder_does_not_fill_it_and_a_picture_does(make, tmp_path):
    write(tmp_path / "new" / ".DS_Store", "")
    assert len(find_pictures(pack(make("folders"), tmp_path / "new")).train) == len(TRAIN)
    write(tmp_path / "full" / "a.png", "")
    with pytest.raises(ValueError, match="is not empty and holds no pack"):
        pack(tmp_path / "folders", tmp_path / "full")


def test_a_bad_picture_stops_a_pack_that_keeps_no_half_part(make, tmp_path):
    data = make("folders")
    write(data / "train/n01440764/bad.JPEG", "bad")
    with pytest.raises(ValueError, match="bad.JPEG' can't be decoded as a picture"):
        pack(data, tmp_path / "new pack")
    assert os.listdir(tmp_path / "new pack") == ["pack.json"]
    (data / "train/n01440764/bad.JPEG").unlink()
    assert len(find_pictures(pack(data, tmp_path / "another pack")).train) == len(TRAIN)


# --- files that are no whole pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_half_a_picture_a_text_and_nothing_are_not_decoded(format):
    data = picture(1, format, (300, 200))
    assert decode(data).shape == (200, 300, 3)
    assert (read_size(data), read_size(b"not a picture")) == ((300, 200), (1, 1))
    for bad in (data[: len(data) // 2], b"not a picture", b""):
        with pytest.raises(ValueError, match="can't be decoded as a picture: .*; replace it or remove it"):
            decode(bad)


@pytest.mark.parametrize("width, height", [(9_000, 9_000), (20_000, 10_000), (60_000, 60_000)])
def test_a_small_file_that_says_it_is_huge_is_not_decoded(width, height):
    png, jpeg = picture(1, "PNG"), picture(1)
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    png = over(png, 12, header + struct.pack(">I", zlib.crc32(header)))
    jpeg = over(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))
    for huge in (png, jpeg):
        with pytest.raises(ValueError, match=f"{width:,} x {height:,} pixels|{width * height} pixels") as refused:
            decode(huge)
        assert isinstance(refused.value.__cause__, TooLarge)
    assert 8_000 * 8_000 < MAX_PIXELS < 9_000 * 9_000


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"bad": 5}', b'{"splits": {}}'])
def test_what_is_known_of_data_is_passed_over_where_it_is_damaged(tmp_path, home, content):
    data = small_data(tmp_path)
    inspect_data(data)
    found = list_data(data)
    assert read_inspection(data, found.train, found.val)  # the control
    for name in ("inspection.json", "forecast.json"):
        (cache_dir(data) / name).write_bytes(content)
    assert read_inspection(data, found.train, found.val) is None
    config = resolve(Parameters(recipe="photos", data_dir=str(data)))
    assert before_lines(config)[0].startswith("how long it takes here is not measured yet")
