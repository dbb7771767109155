"""Data as it lies: accepted where it is clear what is what, and said; refused with what was found, and what to do."""

import hashlib
import io
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import trained_here
from PIL import Image

from resnet_nb.cli import main
from resnet_nb.data import splits
from resnet_nb.data.formats import find_pictures
from resnet_nb.data.index import cache_dir, fingerprint
from resnet_nb.data.inspect import examine, inspect_data, summary
from resnet_nb.data.pack import pack
from resnet_nb.data.splits import index_data, load_data
from resnet_nb.data.tables import ENDINGS
from resnet_nb.data.transforms import decode
from resnet_nb.files import read_json
from resnet_nb.results.plots import plot_odd, plot_sizes
from resnet_nb.run import launch, plan
from resnet_nb.run.folder import run_identity


def png(number=0, format="PNG") -> bytes:
    Image.new("RGB", (16, 16), (number % 256, number // 256, 99)).save(file := io.BytesIO(), format)
    return file.getvalue()


def write(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


CLASSES = ("ant", "bee")


def tree(home, train="train", val="val", classes=CLASSES, count=3):
    """`count` training and one validation picture of each class, each with its own colour."""
    for place, pictures in ((train, count), (val, 1)):
        for label, key in enumerate(classes):
            for i in range(pictures if place else 0):
                write(home / place / key / f"{i}.png", png(100 * label + i + 50 * (place == val)))
    return home


@pytest.fixture
def plain(tmp_path, home):
    """The healthy control: train/CLASS/FILE and val/CLASS/FILE."""
    return tree(tmp_path / "plain")


def refusal(data, do=find_pictures) -> str:
    with pytest.raises(ValueError) as refused:
        do(data)
    print(refused.value)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def prints(data):
    found = find_pictures(data)
    return fingerprint(found.train), fingerprint(found.val)


# --- names and levels --------------------------------------------------------------------------------------------------

ACCEPTED = {  # how it lies: folder, training, validation, what is said
    "other cases": ("", "Train", "Val", "train: …/Train (6 pictures), validation: …/Val (2 pictures)"),
    "valid": ("", "train", "valid", "train: …/train (6 pictures), validation: …/valid (2 pictures)"),
    "validation": ("", "training", "validation", "train: …/training (6 pictures), validation: …/validation (2 pictures)"),
    "dev": ("", "TRAIN", "dev", "train: …/TRAIN (6 pictures), validation: …/dev (2 pictures)"),
    "a wrapping folder": ("pets-v2", "train", "val", "train: …/pets-v2/train (6 pictures), validation: …/pets-v2/val (2 pictures)"),
    "unpacked into its own name": ("", "train/train", "val/val", "train: …/train/train (6 pictures), validation: …/val/val (2 pictures)"),
    "sets": ("", "training_set", "val-images", "train: …/training_set (6 pictures), validation: …/val-images (2 pictures)"),
    "years": ("", "train2017", "ValSet", "train: …/train2017 (6 pictures), validation: …/ValSet (2 pictures)"),
    "two wrapping folders": ("pets/v2", "train", "val", "train: …/pets/v2/train (6 pictures), validation: …/pets/v2/val (2 pictures)"),
    "images below": ("", "train/images", "val/images", "train: …/train/images (6 pictures), validation: …/val/images (2 pictures)"),
}  # fmt: skip


@pytest.mark.parametrize("how", ACCEPTED)
def test_usual_names_and_levels_are_the_same_data(plain, tmp_path, how):
    folder, train, val, said = ACCEPTED[how]
    data = tree(tmp_path / "other" / folder, train, val) and tmp_path / "other"
    assert prints(data) == prints(plain)
    assert find_pictures(data).train.said == said
    write(data / folder / train / "ant" / "one more.png", png(7))
    assert prints(data)[0] != prints(plain)[0]


def test_folders_without_pictures_are_passed_over_with_a_word(plain, tmp_path):
    data = tree(tmp_path / "mac" / "pets")
    for name in (
        "__MACOSX/pets/train/ant/._0.png",
        "pets/__MACOSX/._x",
        "pets/train/__MACOSX/._ant.png",
        "pets/val/.ipynb_checkpoints/a.txt",
    ):
        write(tmp_path / "mac" / name)
    write(data / "test" / "ant" / "0.png", png(200))
    write(data / "notes" / "read me.txt", "about")
    assert prints(tmp_path / "mac") == prints(plain)
    assert find_pictures(tmp_path / "mac").train.said == (
        "train: …/pets/train (6 pictures), validation: …/pets/val (2 pictures), test: …/pets/test, which is not read; "
        "passed over: …/__MACOSX, …/pets/__MACOSX, …/pets/notes, …/pets/train/__MACOSX"
    )
    (data / "train" / "cat").mkdir()
    assert "train/cat' has no pictures; add some or remove it" in refusal(tmp_path / "mac")


def test_an_empty_folder_beside_a_full_one_of_the_same_role_is_no_candidate(plain, tmp_path):
    data = tree(tmp_path / "twice", val="valid")
    (data / "val").mkdir()
    assert prints(data) == prints(plain)
    tree(data, train="", val="val")
    assert "2 folders that may hold the validation pictures, 'val' and 'valid'; keep one, or rename the other" in refusal(data)


def test_what_is_no_data_set_is_refused_with_what_lies_there(plain, tmp_path):
    for name in ("notes.txt", "papers/one.pdf", "a.zip"):
        write(tmp_path / "other" / name)
    assert "holds 'a.zip', 'notes.txt', 'papers' (a folder); pictures are needed as train/CLASS/FILE" in refusal(tmp_path / "other")
    assert "is one split by itself; pass the folder that holds 'train' and 'val'" in refusal(plain / "train")
    tree(tmp_path / "several" / "cats"), tree(tmp_path / "several" / "dogs")
    assert "holds 2 data sets, 'cats', 'dogs'; pass the folder of one" in refusal(tmp_path / "several")
    write(tmp_path / "flat" / "train" / "0.png", png()), write(tmp_path / "flat" / "val" / "0.png", png())
    assert "train' has no class folders, it holds '0.png'; pictures are needed as train/CLASS/FILE" in refusal(tmp_path / "flat")
    assert len(find_pictures(plain).train) == 6


def test_a_split_among_the_classes_is_refused_and_a_class_of_such_a_name_is_not(plain, tmp_path):
    data = tree(tmp_path / "inside", val="train/val")
    assert "train/val' lies among the classes and is a split by its name, with folders of its own; move it out of 'train'" in refusal(data)
    data = tree(tmp_path / "vehicles", classes=("car", "train"))
    assert find_pictures(data).train.classes == ("car", "train")
    data = tree(tmp_path / "tubes", train="", val="", classes=("test tube", "training shoe"))
    tree(data, train=".", val="", classes=("test tube", "training shoe"))
    assert find_pictures(data).train.classes == ("test tube", "training shoe")


def test_folders_below_a_class_are_said_and_neighbours_of_the_data_do_not_matter(plain, tmp_path):
    data = tree(tmp_path / "deep", train="train/insect", val="val/insect")
    tree(data, train="train/bird", val="val/bird")
    assert find_pictures(data).train.said.endswith(", pictures in folders below a class count for it, those of 'bird/bee' for instance")
    assert "below" not in find_pictures(plain).train.said
    for neighbour in ("train", "training", "val", "valid"):
        write(tmp_path / neighbour / "a" / "0.png", png())
    assert prints(plain) == prints(tree(tmp_path / "the same"))


def test_a_class_alone_is_refused_with_what_was_found_below_it(plain, tmp_path, make_config):
    validate = lambda data: plan.validate(make_config("alone", "local", data_dir=data, num_microbatches=1, microbatch_size=2))
    assert len(validate(plain)[0]) == 6
    data = tree(tmp_path / "deep", "train/insects", "val/insects")
    sentence = refusal(data, validate)
    assert "has a single class, 'insects', and one class can't be learned; below it lie the folders 'ant', 'bee': if these" in sentence
    assert sentence in inspect_data(data)["problems"] and inspect_data(plain)["problems"] == []
    assert "it holds pictures only" in refusal(tree(tmp_path / "one", classes=["ant"]), validate)


def test_without_validation_pictures_there_is_a_sentence(plain, tmp_path):
    for data in (tree(tmp_path / "a", val=""), tree(tmp_path / "b", train=".", val=""), tree(tmp_path / "c", train="insects", val="")):
        found = find_pictures(data)
        assert (len(found.train), len(found.val), found.val.classes) == (6, 0, CLASSES)
        assert "has no validation pictures" in refusal(data, index_data)
    assert len(index_data(plain)[1]) == 2


def test_what_was_taken_for_what_is_shown_before_a_run_and_by_the_check(tmp_path, home, make_config):
    data = tree(tmp_path / "other", "Train", "valid")
    config = make_config("shown", "local", data_dir=data, num_microbatches=1, microbatch_size=2)
    said = "train: …/Train (6 pictures), validation: …/valid (2 pictures)"
    assert plan.describe(config, *plan.validate(config))["found"] == said
    assert summary(inspect_data(data))[0] == said


# --- files passed over -------------------------------------------------------------------------------------------------


def test_jfif_is_jpeg_and_avif_is_read_where_pillow_can(plain):
    write(plain / "train/ant/a.jfif", png(1, "JPEG"))
    assert len(find_pictures(plain).train) == 7
    if b".avif" in ENDINGS:
        write(plain / "train/ant/a.avif", png(1, "AVIF"))
        assert len(find_pictures(plain).train) == 8
    report = inspect_data(plain)
    assert report["problems"] == [] and not {"misnamed", "undecodable"} & report["splits"]["train"]["listed"].keys()


def test_the_grey_and_the_black_and_white_kinds_of_ppm_are_pictures(plain):
    for number, ending in enumerate((".pgm", ".pbm", ".pnm")):
        image = Image.new("1" if ending == ".pbm" else "L", (16, 16), number)
        buffer = io.BytesIO()
        image.save(buffer, "PPM")
        write(plain / f"train/ant/a{ending}", buffer.getvalue())
    assert len(find_pictures(plain).train) == 9
    report = inspect_data(plain)
    assert report["problems"] == [] and report["strays"] == []
    assert not {"misnamed", "undecodable"} & report["splits"]["train"]["listed"].keys()


def test_pictures_in_formats_that_are_not_read_are_counted_and_named(plain):
    assert len(load_data(plain)[0]) == 6
    for name in ("x.HEIC", "y.heic", "z.jxl", "._x.heic"):
        write(plain / "train/bee" / name, b"\0" * 20)
    sentence = refusal(plain, load_data)
    assert "train: 3 pictures are in formats that are not read here (2 .heic, 1 .jxl), 'bee/x.HEIC' for one; convert them" in sentence
    assert "overrides: {bad_pictures: skip-listed}" in sentence
    assert any(problem.startswith("train: 3 pictures are in formats") for problem in inspect_data(plain)["problems"])
    assert len(load_data(plain, "skip-listed")[0]) == 6
    for folder, _, _ in os.walk(plain):
        os.utime(folder, (1e9, 1e9))
    index_data(plain)  # kept, and what is not read is kept with it
    assert "3 pictures are in formats" in refusal(plain, load_data)


# --- no validation set -------------------------------------------------------------------------------------------------

MANY = 40  # pictures of a class: enough for both sides of a share


def names(index):
    return {index.relative_path(i) for i in range(len(index))}


def aged(data):
    """So that what is found is kept: nothing changed just now."""
    for at, _, files in os.walk(data):
        for path in (at, *(os.path.join(at, name) for name in files)):
            os.utime(path, (1e9, 1e9))
    return data


def test_a_drawn_validation_set_depends_on_the_bytes_alone(tmp_path, home, make_config):
    data = tree(tmp_path / "all", val="", count=MANY)
    train, val = index_data(data, 0.2)
    expected = {
        os.fsencode(f"{key}/{i}.png")
        for label, key in enumerate(CLASSES)
        for i in range(MANY)
        if int.from_bytes(hashlib.sha256(png(100 * label + i)).digest()[:8]) < 0.2 * 2**64
    }
    assert names(val) == expected and len(train) + len(val) == 2 * MANY and 5 < len(val) < 30
    flat = tree(tmp_path / "elsewhere", train=".", val="", count=MANY)  # another place and form, the same bytes
    assert names(index_data(flat, 0.2)[1]) == expected != names(index_data(flat, 0.3)[1])
    seeds = [plan.validate(make_config("drawn", "local", seed, data, val_share=0.2))[1] for seed in (0, 1)]
    assert [names(index) for index in seeds] == [expected] * 2
    assert "validation: " in train.said and f"{len(val)} of these, drawn with val_share 0.2" in train.said
    assert names(index_data(data, 0.4)[1]) > expected


def test_adding_pictures_moves_none_and_copies_fall_on_one_side(tmp_path, home):
    data = tree(tmp_path / "all", val="", count=MANY)
    train, val = map(names, index_data(data, 0.2))
    for i in range(MANY):
        write(data / "train/ant" / f"copy of {i}.png", png(i))
        write(data / "train/bee" / f"new {i}.png", png(1000 + i))
    more_train, more_val = map(names, index_data(data, 0.2))
    assert train < more_train and val < more_val
    for i in range(MANY):
        assert (f"ant/{i}.png".encode() in more_val) == (f"ant/copy of {i}.png".encode() in more_val)
    assert {name for name in more_val if b"new" in name} and {name for name in more_train if b"new" in name}


def test_pictures_of_one_object_stay_together(tmp_path, home):
    data = tmp_path / "films"
    for key, colour in (("ant", 0), ("bee", 1000)):
        for film in range(12):
            for frame in range(4):
                write(data / key / f"film{film}" / f"{key}_{film:02d}-{frame}.png", png(colour + 4 * film + frame))
    film_of = lambda index: {name.rpartition(b"-")[0] for name in names(index)}
    for group in ("folder", r"(\w+_\d+)-"):
        train, val = index_data(data, 0.3, group)
        assert len(val) % 4 == 0 and not film_of(train) & film_of(val)
    assert film_of(index_data(data, 0.3)[0]) & film_of(index_data(data, 0.3)[1])  # the control: by bytes alone
    assert "group='(zebra)' finds nothing in 'ant/film0/ant_00-0.png'; it must find" in refusal(
        data, lambda data: index_data(data, 0.3, "(zebra)")
    )


def test_shares_and_groups_that_can_not_be_are_refused(plain, tmp_path, make_config):
    alone = tree(tmp_path / "few", val="", count=1)
    sentence = refusal(alone, lambda data: index_data(data, 0.01))
    assert (
        "val_share=0.01 leaves 2 of 2 classes without validation pictures, 'ant' (1 pictures in all) for one; add pictures to it"
        in sentence
    )
    assert "with group='folder' leaves 2 of 2 classes" in refusal(alone, lambda data: index_data(data, 0.5, "folder"))
    assert "draw them from the training pictures, with overrides: {val_share: 0.2}" in refusal(alone, index_data)
    assert "draw them from the training pictures" in refusal(aged(alone), index_data)
    assert "draw them from the training pictures" in refusal(alone, index_data)  # the index is kept now
    assert "has one of its own (2 pictures); use that one" in refusal(plain, lambda data: index_data(data, 0.2))
    for wrong, sentence in (
        (dict(val_share=0.6), "val_share=0.6: input should be less than or equal to 0.5"),
        (dict(group="folder"), "it needs a val_share, such as 0.2"),
        (dict(val_share=0.2, group="_"), "needs 'folder', or a regular expression with parentheses"),
        (dict(val_share=0.2, group="(_"), "is no regular expression"),
    ):
        assert sentence in refusal(wrong, lambda wrong: make_config("wrong", "local", **wrong))
    assert make_config("right", "local", val_share=0.2, group="(_)").recipe.group == "(_)"


def test_hashes_are_kept_until_a_file_changes(tmp_path, home, monkeypatch):
    data = aged(tree(tmp_path / "all", val="", count=MANY))
    val = names(index_data(data, 0.2)[1])
    read = []
    monkeypatch.setattr(splits, "_number", lambda data: read.append(data) or 0)
    assert names(index_data(data, 0.2)[1]) == val and not read
    path = data / "train/ant/0.png"
    os.utime(path, (2e9, 2e9))  # as after a change in place
    with pytest.raises(ValueError, match="leaves 2 of 2 classes without training"):  # all numbers are 0 now
        index_data(data, 0.2)
    assert len(read) == 2 * MANY


def test_a_link_that_leads_elsewhere_now_changes_no_other_folder(tmp_path, home):
    data = aged(tree(tmp_path / "one"))
    other = shutil.copytree(data, tmp_path / "other")
    write(other / "train/ant/0.png", png(200))
    assert os.path.getsize(data / "train/ant/0.png") == os.path.getsize(aged(other) / "train/ant/0.png")
    (tmp_path / "current").symlink_to("one")
    index_data(tmp_path / "current")
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("other")
    for place, first in ((data, png(0)), (tmp_path / "current", png(200)), (other, png(200))):
        train, _ = index_data(place)
        assert train.read(0) == first and train.where(0) == str(place.resolve() / "train/ant/0.png")


def test_a_pack_keeps_what_was_drawn_and_takes_the_same_recipe(tmp_path, home, make_config):
    data = tree(tmp_path / "all", val="", count=MANY)
    code = CliRunner().invoke(main, ["pack", str(data), str(tmp_path / "pack"), "--size", "8", "--val-share", "0.2"])
    assert code.exit_code == 0, code.output
    drawn = [names(index) for index in index_data(data, 0.2)]
    assert [names(index) for index in index_data(tmp_path / "pack")] == drawn
    assert [names(index) for index in index_data(tmp_path / "pack", 0.2)] == drawn
    assert "drawn with {'val_share': 0.2, 'group': ''}" in refusal(tmp_path / "pack", lambda data: index_data(data, 0.3))
    assert "draw them" in refusal(data, lambda data: pack(data, tmp_path / "another"))


def test_commands_advise_their_own_options_and_runs_overrides(tmp_path, home, plain):
    data, pack_ = tree(tmp_path / "all", val="", count=MANY), str(tmp_path / "pack")
    said = lambda *line: " ".join(CliRunner().invoke(main, [*map(str, line)]).output.split())
    assert "with --val-share 0.2 for instance" in said("pack", data, pack_) and "overrides: {val_share: 0.2}" in refusal(data, load_data)
    write(plain / "train/ant/bad.png", b"bad")
    inspect_data(plain)
    assert "leave them out with --bad-pictures skip-listed" in said("pack", plain, pack_)
    assert "leave them out with overrides: {bad_pictures: skip-listed}" in refusal(plain, load_data)
    for command in (("pack", plain, pack_), ("check", "data", plain)):
        assert "use that one, with --val-share 0 --group ''" in said(*command, "--val-share", 0.2)
    advised = CliRunner().invoke(main, ["pack", str(data), pack_, "--val-share", "0.2", "--group", "", "--bad-pictures", "fail"])
    assert advised.exit_code == 0, advised.output


def test_a_run_on_drawn_pictures_says_so_and_leaves_out_bad_ones(tmp_path, home, make_config):
    data = tree(tmp_path / "all", val="", count=MANY)
    before = index_data(data, 0.2)
    bad = sorted(names(before[0]))[0].decode()
    write(data / "train" / bad, b"no picture")
    report = inspect_data(data)
    assert any("no validation pictures: a run draws them" in line for line in summary(report)) and len(report["problems"]) == 1
    config = make_config("on-drawn", "local", data_dir=data, val_share=0.2, bad_pictures="skip-listed", epochs=1)
    assert "1 pictures can't be trained on" in refusal(data, lambda data: load_data(data, "fail", 0.2))
    manifest = read_json(trained_here(config) / "manifest.json")
    assert manifest["data"]["train_pictures"] == len(before[0]) - 1 and manifest["data"]["val_pictures"] == len(before[1])
    assert manifest["attempts"][0]["inspection"]["left_out"]["train"] == [bad]
    assert run_identity(config)["val_share"] == 0.2 != run_identity(make_config("x", "local", data_dir=data))["val_share"]


# --- names and labels --------------------------------------------------------------------------------------------------


def test_names_of_classes_that_differ_in_spelling_alone_are_refused_with_the_difference(plain, tmp_path, home):
    for one, other, difference in (
        ("caf\u00e9", "cafe\u0301", "in Unicode form alone (composed and decomposed accents): 'cafe\\u0301' (in val) and 'caf\\xe9' (in train)"),
        ("cat", "cat ", "by spaces at an end alone: 'cat' (in train) and 'cat ' (in val)"),
        ("Cat", "cat", "by upper and lower case alone: 'Cat' (in train) and 'cat' (in val)"),
    ):  # fmt: skip
        data = tree(tmp_path / other, val="", classes=("ant", one))
        tree(data, train="", classes=("ant", other))
        sentence = refusal(data, index_data)
        assert f"two names of classes differ {difference}" in sentence
        assert sentence in inspect_data(data)["problems"]
    letters = tree(tmp_path / "letters", classes=("a", "A"))
    assert index_data(letters)[0].classes == ("A", "a") and index_data(plain)[0].classes == CLASSES
    alone = tree(tmp_path / "drawn", val="", classes=("a", "A"), count=MANY)  # no validation set that could tell
    assert (
        "'A' (in train) and 'a' (in train); rename one, so that there is one name for a class; if they are two, as a and A are, sort"
        in refusal(alone, lambda data: index_data(data, 0.2))
    )
    assert len(inspect_data(alone)["problems"]) == 1 and not inspect_data(letters)["problems"]
    assert len(index_data(tree(tmp_path / "control", val="", classes=("a", "B"), count=MANY), 0.2)[1])


def shards(home, places, label=None, kind=None, names=None):
    """Parquet shards at `places`, each with three pictures of each class; labels of type `kind`."""
    for number, place in enumerate(places):
        known = names[number] if names else CLASSES
        pictures = [(key, i) for key in CLASSES for i in range(3)]
        labels = [key if label == "text" else known.index(key) for key, _ in pictures]
        images = [{"bytes": png(100 * CLASSES.index(key) + 10 * number + i), "path": f"{number}-{i}.png"} for key, i in pictures]
        table = pa.table(
            {
                "image": images,
                "label": pa.array(labels, kind) if not pa.types.is_dictionary(kind or pa.null()) else pa.array(labels).dictionary_encode(),
            }
        )
        about = {"huggingface": json.dumps({"info": {"features": {"label": {"names": list(known)}}}})} if label != "text" else {}
        (home / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(about), home / place)
    return home


def pictures_of(index):
    return sorted((index.classes[index.labels[i]], index.read(i)) for i in range(len(index)))


PLACES = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-00000-of-00001.parquet"]


def test_labels_of_any_text_or_integer_type_are_read(tmp_path):
    usual = pictures_of(find_pictures(shards(tmp_path / "usual", PLACES)).train)
    assert len(usual) == 12 and {key for key, _ in usual} == set(CLASSES)
    words = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    numbers = [pa.int8(), pa.uint8(), pa.int16(), pa.uint64()]
    for form, kinds in (("text", words), ("number", numbers)):
        for kind in kinds:
            assert pictures_of(find_pictures(shards(tmp_path / str(kind).replace("/", "-"), PLACES, form, kind)).train) == usual
    other = shards(tmp_path / "other", PLACES, names=[CLASSES, CLASSES[::-1], CLASSES[::-1]])  # numbered otherwise
    assert pictures_of(find_pictures(other).train) == usual
    assert {key for key, _ in pictures_of(find_pictures(other).val)} == set(CLASSES)


def test_missing_shards_are_refused_by_number(tmp_path):
    data = shards(tmp_path / "some", [f"data/train-{i:05d}-of-00004.parquet" for i in (0, 1, 2, 3)] + ["data/val-00000-of-00001.parquet"])
    assert len(find_pictures(data).train) == 24
    for i in (1, 3):
        (data / "data" / f"train-{i:05d}-of-00004.parquet").unlink()
    assert "has 2 of 4 train shards; missing: 00001, 00003; download them" in refusal(data)


def test_shards_of_two_copies_are_refused_and_older_names_have_a_hash(tmp_path):
    usual = pictures_of(find_pictures(shards(tmp_path / "usual", PLACES)).train)
    older = [f"data/train-{i:05d}-of-00002-{'abcdef0123456789'[i:]}.parquet" for i in range(2)]
    data = shards(tmp_path / "older", [*older, "data/validation-00000-of-00001-b42a775f407cee45.parquet"])
    assert pictures_of(find_pictures(data).train) == usual
    (data / older[0]).unlink()
    assert "has 1 of 2 train shards; missing: 00000; download them" in refusal(data)
    one = "train-00000-of-00001.parquet"
    for name, places in (
        ("another number of shards", [one, *PLACES]),
        ("another hash", [one.replace(".", "-aaaa."), one.replace(".", "-bbbb."), PLACES[2]]),
        ("with a hash and without", [one, one.replace(".", "-aaaa."), PLACES[2]]),
        ("with a number and without", ["train.parquet", *PLACES]),
        ("in a folder", [f"default/train/{place}" for place in (one, *PLACES[:2])]),
        ("of validation", [*PLACES, "validation.parquet"]),
    ):
        said = refusal(shards(tmp_path / name, places))
        assert (
            "are shards of two copies of the " + ("val" if "validation" in name else "train") in said and "would count twice; keep" in said
        )


def test_what_comes_before_the_number_of_a_shard_is_the_split(tmp_path):
    for n, name in enumerate(
        ("train.parquet", "train_0.parquet", "train-0.parquet", "train0.parquet", "train2017.parquet", "train_images-1.parquet")
        + (
            "train-part-3.parquet",
            "train_shard_3.parquet",
            "data/train_set-00000-of-00001.parquet",
            "train/a.parquet",
            "data/train/0.parquet",
        )
    ):
        assert len(find_pictures(shards(tmp_path / f"{n}", [name])).train) == 6
    data = shards(tmp_path / "all", ["train.parquet", "val.parquet"])
    before = prints(data)
    assert find_pictures(data).train.said == ""
    shards(data, ["trainval.parquet", "train_val.parquet", "values.parquet", "test.parquet"])
    assert prints(data) == before
    assert find_pictures(data).train.said == (
        "train: 6 pictures in 1 shards, validation: 6 pictures in 1 shards; "
        "passed over: test.parquet, train_val.parquet, trainval.parquet and 1 more"
    )
    (data / "train.parquet").unlink()
    assert "are needed, in train.parquet or train-00000-of-00001.parquet for instance" in refusal(data)


def test_labels_that_are_words_here_and_nameless_numbers_there_are_refused(tmp_path):
    data = shards(tmp_path / "words", ["train-0.parquet", "train-1.parquet"], "text")
    assert find_pictures(data).train.classes == CLASSES
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(4)]
    pq.write_table(numbers := pa.table({"image": images, "label": [0, 1, 0, 1]}), data / "train-1.parquet")
    assert "has shards whose labels are words, and shards whose labels are numbers without names; write them again" in refusal(data)
    pq.write_table(numbers.slice(0, 0), data / "train-1.parquet")
    assert len(find_pictures(data).train) == 6  # no rows, no labels
    shards(data, ["train-1.parquet"])
    assert find_pictures(data).train.classes == CLASSES and len(find_pictures(data).train) == 12  # numbers with names


def test_hugging_faces_other_layouts_are_read_or_refused_with_what_to_do(plain, tmp_path):
    usual = find_pictures(shards(tmp_path / "usual", PLACES))
    places = ["default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"]
    copied = find_pictures(shards(tmp_path / "hub", places))
    assert [pictures_of(index) for index in copied[:2]] == [pictures_of(index) for index in usual[:2]]
    write(tmp_path / "saved/dataset_dict.json", '{"splits": ["train"]}')
    write(tmp_path / "saved/train/state.json", "{}"), write(tmp_path / "saved/train/data-00000-of-00001.arrow")
    assert "was written by save_to_disk of Hugging Face's datasets, which is not read; write it as parquet: for split" in refusal(
        tmp_path / "saved"
    )
    before = prints(plain)
    shards(plain, ["metadata.parquet"])
    assert prints(plain) == before  # a table beside good class folders
    shards(tmp_path / "alone", ["metadata.parquet"])
    assert "has parquet files, but none called train*.parquet" in refusal(tmp_path / "alone")


def test_a_class_that_is_called_as_a_split_is_refused_with_what_to_do_which_does_it(tmp_path):
    for name in ("train", "val", "test"):
        data = tree(tmp_path / name, train=".", val="", classes=("bus", "car", name))
        sentence = f"a folder called {name!r} is taken for a split: if it is a class, as 'bus' is, move all class folders into 'train'"
        assert sentence in refusal(data)
        (data / "within").mkdir()
        for key in ("bus", "car", name):
            (data / key).rename(data / "within" / key)
        (data / "within").rename(data / "train")
        assert find_pictures(data).train.classes == tuple(sorted(("bus", "car", name)))
    write(tmp_path / "flat" / "train" / "0.png", png())
    assert "taken for a split" not in refusal(tmp_path / "flat")  # the control: no classes beside it


def test_folders_and_files_that_can_not_be_read_are_named_with_what_to_do(plain, home, monkeypatch):
    index_data(plain)

    def refuse(what, closed):
        def listing(path="."):
            if os.fsdecode(path).rstrip("/") == str(closed):
                raise PermissionError(13, "Permission denied", path)
            return whole(path)

        whole = getattr(os, what)
        monkeypatch.setattr(os, what, listing)
        said = refusal(aged(plain), splits.list_data)
        monkeypatch.undo()
        return said

    for what, closed in (("scandir", plain / "train/ant"), ("listdir", plain / "train"), ("scandir", plain)):
        assert f"{str(closed)!r} can't be read: Permission denied; make it readable (chmod -R u+rX), or move it out" in refuse(what, closed)
    assert len(index_data(plain)[0]) == 6  # the control


def test_tiny_imagenet_and_kaggle_are_found_from_a_level_above_or_below(plain, tmp_path):
    data, lines = tmp_path / "downloads" / "tiny-imagenet-200", []
    for label, key in enumerate(("n01443537", "n01629819")):
        for i in range(3):
            write(data / "train" / key / "images" / f"{key}_{i}.JPEG", png(100 * label + i))
        write(data / "train" / key / f"{key}_boxes.txt", "")
        write(data / "val/images" / f"val_{label}.JPEG", png(200 + label))
        lines.append(f"val_{label}.JPEG\t{key}\t0\t32\t44\t62\n")
    write(data / "val/val_annotations.txt", "".join(lines))
    for place in (data, data.parent):
        found = find_pictures(place)
        assert names(found.train) == {f"{key}/images/{key}_{i}.JPEG".encode() for key in found.train.classes for i in range(3)}
        assert pictures_of(found.val) == [("n01443537", png(200)), ("n01629819", png(201))]
    write(data / "val/val_annotations.txt", lines[0])
    assert "val_annotations.txt' has no line for 'val_1.JPEG'; it needs one for every picture" in refusal(data)
    write(data / "val/val_annotations.txt", "".join(lines) + lines[0])  # a row twice is one row
    assert len(find_pictures(data).val) == 2
    write(data / "val/val_annotations.txt", "".join(lines) + lines[0].replace("n01443537", "n01629819"))
    assert "val_annotations.txt' gives 'val_0.JPEG' both 'n01443537' and 'n01629819'; keep one of the rows" in refusal(data)
    write(data / "val/val_annotations.txt", "".join(lines).encode() + b"\xe9\tn01443537\n")
    assert "val_annotations.txt' is no table in UTF-8" in refusal(data)

    kaggle = tmp_path / "imagenet-object-localization-challenge"
    tree(kaggle / "ILSVRC/Data/CLS-LOC", val="")
    for label in range(2):
        write(kaggle / "ILSVRC/Data/CLS-LOC/val" / f"{label}.JPEG", png(50 + 100 * label))
    write(kaggle / "LOC_val_solution.csv", "ImageId,PredictionString\n0,ant 1 2 3 4\n1,bee 1 2 3 4\n")
    for place in (kaggle, kaggle / "ILSVRC", kaggle / "ILSVRC/Data/CLS-LOC"):
        found = find_pictures(place)
        assert (len(found.train), pictures_of(found.val)) == (6, [("ant", png(50)), ("bee", png(150))])
    assert find_pictures(plain).train.layout == "folders"


# --- what files hold, and what they are called -------------------------------------------------------------------------

NO_PICTURES = {
    b"<!DOCTYPE html>\n<html><body>404": "it is no picture but a web page (HTML), as a download that failed leaves behind",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00": "it is no picture but a Git LFS pointer to one: run git lfs pull",
    bytes(500): "it is no picture but zeros alone",
    b"hello": "it is no picture",
}


@pytest.mark.parametrize("data", NO_PICTURES)
def test_files_that_are_no_pictures_are_called_what_they_are(data):
    assert examine(data, "a.jpg").kinds == {"undecodable": NO_PICTURES[data]}
    with pytest.raises(ValueError) as refused:
        decode(data)
    assert str(refused.value) == f"can't be decoded as a picture: {NO_PICTURES[data]}; replace it or remove it"
    assert examine(png(), "a.png").kinds == {}


def test_the_same_bytes_under_two_labels_are_a_problem(plain):
    write(plain / "train/ant/copy.png", png(0))  # in one class: counts more, and is not wrong
    assert inspect_data(plain)["problems"] == []
    write(plain / "train/bee/ant.png", png(1))
    assert inspect_data(plain)["problems"] == [
        "train: 1 pictures are in two classes with the same bytes, 'train/ant/1.png' and 'train/bee/ant.png' for one"
    ]


def test_names_that_are_not_utf8_work_throughout(plain, tmp_path, home, make_config):
    odd = os.fsdecode(b"b\xe9e")
    data = tree(tmp_path / "odd", classes=("ant", odd))
    for split in ("train", "val"):
        write(data / split / "ant" / os.fsdecode(b"\xff.png"), png(70 if split == "val" else 71))
    result = CliRunner().invoke(main, ["check", "data", str(data), "--no-page"])
    assert result.exit_code == 0, result.output
    packed = pack(data, tmp_path / "pack", short_side=0)
    assert [fingerprint(index) for index in index_data(packed)] == [fingerprint(index) for index in index_data(data)]
    assert index_data(packed)[0].classes == ("ant", odd)
    report = read_json(cache_dir(data) / "inspection.json")
    assert list(report["splits"]["train"]["classes"]) == ["ant", odd]
    for place, train in ((data, launch.train), (packed, trained_here)):
        run_dir = train(make_config(f"odd-{place.name}", "local", data_dir=place, epochs=1, num_microbatches=1, microbatch_size=4))
        assert read_json(run_dir / "manifest.json")["data"]["classes"] == ["ant", odd]
    plot_sizes(report), plot_odd(report, dict(zip(("train", "val"), index_data(data))))
    assert index_data(pack(plain, tmp_path / "another", short_side=0))[0].classes == CLASSES
