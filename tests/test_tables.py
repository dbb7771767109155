"""Pictures beside a table of their labels: the same data as in class folders, or one sentence about what is not clear."""

import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from test_any_folder import names, png, refusal, tree, write

from resnet_nb.cli import main
from resnet_nb.data.formats import find_pictures
from resnet_nb.data.pack import pack
from resnet_nb.data.splits import draw_val, index_data, load_data

CLASSES = ("ant", "bee")
ROWS = [(f"{key}-{i}", key, "train" if i < 6 else "val") for key in CLASSES for i in range(8)]


def pictures(folder):
    """16 pictures of two classes, side by side."""
    for number, (name, _, _) in enumerate(ROWS):
        write(folder / f"{name}.png", png(number))
    return folder.parent


def lines(*columns, rows=ROWS, end=""):
    """Lines of a table: of these columns, each a heading and what it says of a row."""
    return ",".join(head for head, _ in columns) + "\n" + "".join(",".join(say(*row) for _, say in columns) + "\n" for row in rows) + end


FILE, PATH, KEY = ("image_id", lambda name, *_: name), ("path", lambda name, *_: f"images/{name}.png"), ("label", lambda _, key, __: key)
SPLIT, NUMBER = (
    ("set", lambda *row: {"train": "Training", "val": "validation"}[row[2]]),
    ("class_id", lambda _, key, __: str(CLASSES.index(key))),
)
ONE_HOT = [(key, lambda _, own, __, key=key: str(float(own == key))) for key in CLASSES]
AGE = ("age", lambda name, *_: str(30 + int(name[-1])))

WHOLE = {  # a table for both splits
    "names without their endings": lines(FILE, KEY, SPLIT),
    "paths": lines(PATH, KEY, SPLIT),
    "other columns first, and more of them": lines(AGE, SPLIT, KEY, PATH),
    "a number and a name of each class": lines(FILE, NUMBER, KEY, SPLIT),
    "a column for each class": lines(FILE, *ONE_HOT, SPLIT),
    "a label of another name, alone": lines(FILE, ("insect", KEY[1]), SPLIT),
    "a byte order mark and Windows lines": "\ufeff" + lines(FILE, KEY, SPLIT).replace("\n", "\r\n"),
    "semicolons": lines(FILE, KEY, SPLIT).replace(",", ";"),
    "quotes": lines(("image_id", lambda name, *_: f'"{name}"'), KEY, SPLIT),
    "a row twice": lines(FILE, KEY, SPLIT, end="ant-0,ant,Training\n"),
    "paths of Windows": lines(PATH, KEY, SPLIT).replace("/", "\\"),
    "paths that begin with the folder, in capitals": lines(("path", lambda name, *_: f"/home/me/contest/images/{name}.PNG"), KEY, SPLIT),
    "an index without a name, as pandas writes it": lines(
        ("", lambda name, *_: str(ROWS.index(next(r for r in ROWS if r[0] == name)))), FILE, KEY, SPLIT
    ),
    "is_valid, true or false": lines(FILE, KEY, ("is_valid", lambda *row: str(row[2] == "val"))),
    "a mask that is longer than csv's limit": lines(("mask", lambda *_: 140_000 * "1"), FILE, KEY, SPLIT),
}


def labelled(index):
    return {os.path.basename(index.name(i)): (index.classes[index.labels[i]], index.read(i)) for i in range(len(index))}


@pytest.fixture(scope="module")
def usual():
    """What each split must hold: name, class and bytes of each picture."""
    return [{f"{name}.png".encode(): (key, png(n)) for n, (name, key, at) in enumerate(ROWS) if at == split} for split in ("train", "val")]


@pytest.mark.parametrize("how", WHOLE)
def test_one_table_for_both_splits(usual, tmp_path, how):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "labels.csv", WHOLE[how])
    found = find_pictures(data)
    assert [labelled(index) for index in (found.train, found.val)] == usual
    assert found.train.said.startswith("train: 12 pictures, validation: 4 pictures, labels: labels.csv (file: ")
    write(
        data / "labels.csv", lines(FILE, ("label", lambda name, key, _: CLASSES[key == CLASSES[0]] if name.endswith("-0") else key), SPLIT)
    )
    assert labelled(find_pictures(data).train) != usual[0]  # the control: two labels are exchanged


def test_a_table_for_each_split_tabs_and_the_pictures_that_are_to_be_guessed(usual, tmp_path):
    data = pictures(tmp_path / "contest" / "train_images")
    write(data / "test_images" / "ant-0.png", png(99))  # a name that is in training, too
    for split, name in (("train", "Train.tsv"), ("val", "valid_labels.tsv")):
        write(data / name, lines(FILE, KEY, rows=[row for row in ROWS if row[2] == split]).replace(",", "\t"))
    write(data / "test.csv", "image_id\nant-0\n")
    write(data / "sample_submission.csv", "image_id,label\nant-0,bee\n")
    found = find_pictures(data)
    assert [labelled(index) for index in (found.train, found.val)] == usual
    assert "passed over: 1 pictures without a row" in found.train.said


def test_without_a_validation_set_one_is_drawn_as_from_class_folders_and_kept_by_a_pack(tmp_path, home):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "labels.csv", lines(FILE, KEY))
    assert "has no validation pictures" in refusal(data, load_data)
    folders = tmp_path / "folders"
    for number, (name, key, _) in enumerate(ROWS):
        write(folders / key / f"{name}.png", png(number))
    drawn, same = (index_data(where, 0.4) for where in (data, folders))
    assert [labelled(index) for index in drawn] == [labelled(index) for index in same]
    assert len(drawn[1]) and [labelled(index) for index in index_data(data, 0.2)] != [labelled(index) for index in drawn]
    pack(data, tmp_path / "packed", 0, 90, "fail", print, 0.4)
    packed = index_data(tmp_path / "packed")
    assert [{key for key, _ in labelled(index).values()} for index in packed] == [set(CLASSES)] * 2
    assert [sorted(data for _, data in labelled(index).values()) for index in packed] == [
        sorted(data for _, data in labelled(index).values()) for index in drawn
    ]
    result = CliRunner().invoke(main, ["check", "data", str(data), "--no-page", "--val-share", "0.4"])
    assert result.exit_code == 0 and f"val_share 0.4: {len(drawn[0])} training and {len(drawn[1])} validation pictures" in result.output


def test_pictures_of_a_patient_stay_together_whatever_their_labels(tmp_path, home):
    data, rows = tmp_path / "clinic", []
    for patient in range(30):
        for k in range(4):
            write(data / f"images/p{patient:02d}/{k}.png", png(4 * patient + k))
            rows.append(f"images/p{patient:02d}/{k}.png,{CLASSES[k % 2]}\n")
    write(data / "labels.csv", "file,label\n" + "".join(rows))
    patients = lambda index: {index.name(i).split(b"/")[1] for i in range(len(index))}
    for group in ("folder", r"^images/(p\d+)/"):
        train, val = drawn = index_data(data, 0.3, group)
        assert len(val) and len(val) == 4 * len(patients(val)) and not patients(train) & patients(val)
        packed = pack(data, tmp_path / f"packed by {len(group)}", 0, val_share=0.3, group=group)
        assert [names(index) for index in index_data(packed, 0.3, group)] == [names(index) for index in drawn]
    train, val = index_data(data, 0.3)
    assert patients(train) & patients(val)  # the control: by bytes alone


def test_a_table_that_changed_is_read_again(tmp_path, home):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "labels.csv", lines(FILE, KEY, SPLIT))
    assert len(index_data(data)[0]) == 12
    os.utime(data / "labels.csv", (1, 1))
    write(data / "labels.csv", lines(FILE, KEY, SPLIT, rows=ROWS[1:]))
    assert len(index_data(data)[0]) == 11


def test_class_folders_go_before_a_table_that_lies_beside_them(tmp_path):
    data = tree(tmp_path / "plain")
    before = find_pictures(data).train.classes
    write(data / "metadata.csv", "file,width,height\ntrain/ant/0.png,16,16\ntrain/bee/0.png,16,16\n")
    assert find_pictures(data).train.classes == before
    for split in ("train", "val"):
        for key in CLASSES:
            shutil.move(data / split / key, data / f"part_{split}_{key}")
        (data / split).rmdir()
    names = sorted(str(path.relative_to(data)) for path in data.glob("part_*/*.png"))
    write(data / "metadata.csv", "file,age,sex\n" + "".join(f"{name},{30 + n},{'mf'[n % 2]}\n" for n, name in enumerate(names)))
    said = refusal(data)  # folders that are no classes: a guess would train on them
    assert "has 2 columns that may be the label, 'age', 'sex'; rename the right one to 'label', or move the table away if folders" in said


def test_a_table_inside_a_class_folder_does_not_make_it_the_data(tmp_path):
    data = tree(tmp_path / "plain", train="", val="")
    for n, key in enumerate(CLASSES):
        write(data / key / "0.png", png(n)), write(data / key / "1.png", png(10 + n))
    before = find_pictures(data).train.classes
    write(data / "ant" / "labels.csv", "file,label\n0,red\n1,black\n")
    assert find_pictures(data).train.classes == before == CLASSES
    assert find_pictures(data / "ant").train.classes == ("black", "red")  # the control: by itself it is data
    (tmp_path / "download").mkdir()
    shutil.move(data / "ant", tmp_path / "download" / "contest")
    assert find_pictures(tmp_path / "download").train.classes == ("black", "red")  # and in a folder that only wraps it


def test_a_table_for_validation_alone_is_refused_and_beside_one_without_a_role_it_is_not(usual, tmp_path):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "val.csv", lines(FILE, KEY, rows=[row for row in ROWS if row[2] == "val"]))
    assert "have no rows to train on: val.csv (file: 'image_id', label: 'label'); a table called train.csv is needed" in refusal(data)
    write(data / "labels.csv", lines(FILE, KEY, rows=[row for row in ROWS if row[2] == "train"]))
    found = find_pictures(data)
    assert [labelled(index) for index in (found.train, found.val)] == usual


REFUSED = {
    "a label that is missing": (lines(FILE, KEY, end="ant-0,\n"), "has 1 rows without a label (column 'label'); every picture needs one"),
    "two labels": (lines(FILE, KEY, end="ant-0,bee\n"), "gives 'images/ant-0.png' both 'bee' and 'ant'; keep one of the rows"),
    "two splits": (lines(FILE, KEY, SPLIT, end="ant-0,ant,validation\n"), "gives 'images/ant-0.png' both 'val' and 'train'"),
    "pictures that are gone": (lines(FILE, KEY, end="wasp-0,ant\n"), "names 1 of 17 pictures that are not there"),
    "several labels at once": (lines(FILE, ONE_HOT[0], ("flies", lambda *_: "1")), "gives 8 pictures several labels at once"),
    "two labels' columns": (lines(FILE, KEY, ("category", lambda name, *_: name[-1])), "has 2 columns that may be the label, 'label', 'category'"),
    "a quote that is not closed": (lines(FILE, KEY).replace("ant-3,ant", 'ant-3,"ant'), "can't be read at line 17 (unexpected end of data"),
    "a column twice": (lines(FILE, KEY, ("label", lambda name, *_: name)), "has 2 columns called 'label'; rename or remove the wrong one"),
    "no headings": (lines(FILE, KEY).partition("\n")[2], "which is a picture and no heading; add a first line, such as file,label"),
    "pictures that are all elsewhere": (lines(("file", lambda name, *_: f"far/{name}.png"), KEY), "names 16 of 16 pictures that are not there"),
    "missing labels, as numpy writes them": (lines(FILE, KEY, end="").replace("ant-3,ant", "ant-3,nan"), "has 1 rows without a label"),
    "flags beside a label": (lines(FILE, ONE_HOT[0], ONE_HOT[1], ("kind", KEY[1])), "has 3 columns that may be the label, 'ant', 'bee', 'kind'"),
    "two splits of a row": (lines(FILE, KEY, SPLIT, ("is_valid", lambda *_: "0")), "has 2 columns that say the split, 'set', 'is_valid'; keep one"),
    "a short row": (lines(FILE, KEY, end="ant-0\n"), "has 1 values in row 18, its first row has 2; mend that row"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_refused_with_one_sentence_is(tmp_path, how):
    data = pictures(tmp_path / "contest" / "images")
    text, why = REFUSED[how]
    write(data / "labels.csv", lines(FILE, KEY))
    find_pictures(data)  # the healthy control
    write(data / "labels.csv", text)
    assert why in refusal(data)


def test_a_validation_set_is_drawn_from_parquet_by_the_bytes_of_its_pictures(tmp_path, home):
    from test_any_folder import pictures_of, shards

    data = shards(tmp_path / "shards", ["train-00000-of-00001.parquet"])
    assert "has no validation pictures (train: 6 pictures in 1 shards, validation: none)" in refusal(data, load_data)
    train, val = index_data(data, 0.4)
    whole = find_pictures(data).train
    assert sorted(pictures_of(train) + pictures_of(val)) == pictures_of(whole) and len(val)
    for n, (key, bytes_) in enumerate(pictures_of(whole)):
        write(tmp_path / "folders" / key / f"{n}.png", bytes_)
    same = draw_val(tmp_path / "folders", find_pictures(tmp_path / "folders").train, 0.4)
    assert [pictures_of(index) for index in same] == [pictures_of(train), pictures_of(val)]


def test_pictures_whose_table_lies_one_level_up_are_refused_with_the_folder_to_pass(tmp_path):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "labels.csv", lines(FILE, KEY))
    assert f"'labels.csv' lies one level up: pass {str(data)!r}" in refusal(data / "images")
    (data / "labels.csv").unlink()
    assert "one level up" not in refusal(data / "images")


def test_a_number_of_the_row_is_no_picture_where_another_column_names_one(tmp_path):
    order = (4, 2, 8, 1, 6, 3, 7, 5)  # the first four pictures are ants
    for n in order:
        write(tmp_path / "contest" / "images" / f"{n}.png", png(n))
    data = tmp_path / "contest"
    for heading, row in (
        ("id,file,label", "{n},{file}.png,{key}"),
        ("file,label,id", "{file},{key},{n}"),
        ("label,file", "{key},{file}.png"),
    ):
        rows = [row.format(n=n, file=file, key=CLASSES[file > 4]) for n, file in enumerate(order, 1)]
        write(data / "train.csv", "\n".join([heading, *rows]))
        assert {name: key for name, (key, _) in labelled(find_pictures(data).train).items()} == {
            f"{n}.png".encode(): CLASSES[n > 4] for n in range(1, 9)
        }
    write(data / "train.csv", "\n".join(["id,number,label", *(f"{n},{file},{CLASSES[file > 4]}" for n, file in enumerate(order, 1))]))
    assert "has 2 columns that may name the pictures, 'id', 'number'; rename the right one to 'file'" in refusal(data)


def test_a_column_of_splits_says_which_of_two_pictures_of_one_name_is_meant(tmp_path):
    data = tmp_path / "contest"
    for split, n in (("train", 0), ("val", 10)):
        for i in range(6):
            write(data / split / f"{i}.png", png(n + i))
    rows = [f"{i}.png,{CLASSES[i % 2]},{'val' if i > 3 else 'train'}\n" for i in range(6)]
    write(data / "labels.csv", "file,label,split\n" + "".join(rows))
    train, val, _ = find_pictures(data)
    assert {train.name(i) for i in range(len(train))} == {b"train/%d.png" % i for i in range(4)}
    assert {val.name(i) for i in range(len(val))} == {b"val/4.png", b"val/5.png"}


def test_a_table_means_the_same_in_every_process_and_one_for_testing_is_passed_over(usual, tmp_path):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "train_val_labels.csv", lines(FILE, KEY, SPLIT))
    write(data / "test.csv", "image_id,label\nfar-0,ant\nfar-1,bee\n")
    code = "import sys; from pathlib import Path; from resnet_nb.data.formats import find_pictures; print(find_pictures(Path(sys.argv[1])).train.said)"
    told = {
        subprocess.check_output([sys.executable, "-c", code, str(data)], env=os.environ | {"PYTHONHASHSEED": str(seed)}, text=True)
        for seed in range(4)
    }
    assert told == {
        "train: 12 pictures, validation: 4 pictures, labels: train_val_labels.csv (file: 'image_id', label: 'label', split: 'set')\n"
    }
    assert [labelled(index) for index in find_pictures(data)[:2]] == usual


def test_beside_a_table_for_training_another_may_say_anything(usual, tmp_path):
    data = pictures(tmp_path / "contest" / "images")
    write(data / "bounding_boxes.csv", "file,x,y\nfar-0.png,1,2\n")
    assert "names 1 of 1 pictures that are not there" in refusal(data)  # the control
    write(data / "train.csv", lines(FILE, KEY, SPLIT))
    assert [labelled(index) for index in find_pictures(data)[:2]] == usual
