"""What surrounds a run does not change it: the environment, the current folder, the terminal, damaged files."""

import hashlib
import os
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from click.testing import CliRunner
from conftest import STEPS

from resnet_nb import cli
from resnet_nb.data.formats import known_titles
from resnet_nb.data.splits import index_data
from resnet_nb.files import read_json, write_json
from resnet_nb.results.plots import plot_pictures
from resnet_nb.results.processes import in_processes
from resnet_nb.run.checkpoints import STATE, find_checkpoint
from resnet_nb.run.folder import create_run, damaged_lines, is_locked, lock_run, read_rows, read_status, run_path, write_status
from resnet_nb.run.worker import run_rank

STRAY = {
    "PL_TRAINER_LIMIT_TRAIN_BATCHES": "2", "PL_TRAINER_GRADIENT_CLIP_VAL": "0.001", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHON_EXEC": "/bin/false", "TORCH_COMPILE_DISABLE": "1", "TIMM_USE_NAFLEXVIT": "true",
    "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "a", "MASTER_ADDR": "10.1.2.3", "PET_NNODES": "2", "PYTHONWARNINGS": "error",
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder with modules that must not be imported."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "resnet_nb").mkdir()
    for name in ("json.py", "random.py", "socket.py", "lightning.py", "numpy.py", "resnet_nb/__init__.py"):
        (folder / name).write_text("raise SystemExit('a module of the current folder was imported')")
    (folder / "matplotlibrc").write_text("text.usetex: True\n")
    (folder / "jupyter/kernels/python3").mkdir(parents=True)
    (folder / "jupyter/kernels/python3/kernel.json").write_text('{"argv": ["false"], "display_name": "another", "language": "python"}')
    (folder / "ipython/profile_default/startup").mkdir(parents=True)
    (folder / "ipython/profile_default/startup/mine.py").write_text("batch_size = 64\nhw = None\n")
    return folder


def steps(run_dir):
    return [(row["digest"], row["train/step_loss"]) for row in read_rows(run_dir, "step")]


def test_a_run_is_the_same_in_any_environment_folder_and_terminal(home, one, hostile):
    config = read_json(one / "config.json")
    wish = Path(hostile / "wish.yaml")
    parameters = config["parameters"] | {"name": "surrounded"}
    wish.write_text("\n".join(f"{key}: {value!r}" for key, value in parameters.items()))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONUTF8", "LANG", "LC_ALL")}
    environment |= STRAY | {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "ascii",
        "GIT_DIR": str(hostile),
        "JUPYTER_PATH": str(hostile / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "0",
        "IPYTHONDIR": str(hostile / "ipython"),
        "MPLBACKEND": "nope",
    }
    command = [str(Path(sys.executable).parent / "resnet-nb"), "train", "-f", "wish.yaml"]
    del environment["PYTHONWARNINGS"]  # a person's own command may fail by it; what it starts must not
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run_dir = run_path("surrounded")
    assert steps(run_dir) == steps(one) and len(steps(run_dir)) == 3 * STEPS
    left_out = read_status(run_dir)["attempts"][0]["left_out_of_environment"]
    assert left_out == sorted(STRAY.keys() - {"PYTHONWARNINGS"} | {"PYTHONIOENCODING"})
    code = [read_json(run / "manifest.json")["attempts"][0]["git_commit"] for run in (run_dir, one)]
    assert code[0] == code[1]
    assert "📚 Epoch 1/3" in (run_dir / "train.log").read_text(encoding="utf-8")


def test_no_process_imports_a_module_of_the_current_folder(hostile, monkeypatch):
    keys = ["n01440764", *(f"n1{i:07d}" for i in range(998)), "n15075141"]
    monkeypatch.chdir(hostile)
    for name in ("json", "socket"):  # the control: what they need
        assert b"a module of the current folder" in subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).stderr
    titles = known_titles(hostile, keys)
    assert (len(titles), titles["n01440764"], titles["n15075141"]) == (1000, "tench", "toilet tissue")
    assert in_processes(divmod, 2, 2) == [divmod(0, 2), divmod(1, 2)]
    monkeypatch.setattr(cli, "recipe_lines", lambda: [os.environ.get("PYTHONSAFEPATH", "unsafe")])  # what else a command starts
    assert CliRunner().invoke(cli.main, ["recipes"]).output == "1\n" and "PYTHONSAFEPATH" not in os.environ


def test_inherited_whole_the_same_environment_would_have_changed_it(make_config):
    run_dir = create_run(make_config("inherited", "local", epochs=1, image_sizes=[16]))
    words = [sys.executable, "-m", "resnet_nb.run.worker", str(run_dir)]
    subprocess.run(words, env=os.environ | {"PL_TRAINER_LIMIT_TRAIN_BATCHES": "4"}, check=True, capture_output=True)
    assert 0 < len(steps(run_dir)) < STEPS


class Program:
    def __reduce__(self):
        return os.system, ("touch it-was-run",)


def test_a_checkpoint_is_not_run_as_a_program_whatever_the_environment_says(one, tmp_path, monkeypatch):
    subprocess.run(["cp", "-r", one, tmp_path / "copy"], check=True)
    checkpoint = find_checkpoint(tmp_path / "copy")
    state = checkpoint / STATE
    state.write_bytes(pickle.dumps(Program()))
    about = read_json(checkpoint / "MANIFEST.json")
    about["files"][STATE] = {"bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest()}
    write_json(checkpoint / "MANIFEST.json", about)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        run_rank(tmp_path / "copy", 2)
    assert not Path("it-was-run").exists()
    with pytest.raises(RuntimeError, match="corrupt file"), pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        torch.load(state)
    assert Path("it-was-run").exists()  # the control


def test_verify_knows_how_many_steps_a_complete_run_has_and_finds_damage(one, tmp_path):
    def verdict(damage):
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        subprocess.run(["cp", "-r", one, copy], check=True)
        damage(copy)
        result = CliRunner().invoke(cli.main, ["verify", str(copy)])
        return result.exit_code, result.output

    def without_its_last_steps(run):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        last = [n for n, line in enumerate(lines) if '"event": "step"' in line][-2:]
        (run / "metrics.jsonl").write_text("".join(line for n, line in enumerate(lines) if n not in last))

    def spoilt_validation(run):
        record = (run / "metrics.jsonl").read_bytes()
        at = record.rindex(b'"event": "val"') + 20
        (run / "metrics.jsonl").write_bytes(record[:at] + b"\xff\0" + record[at + 2 :])

    def garbage(run):
        with open(run / "metrics.jsonl", "ab") as file:
            file.write(b"\xff\x00 garbage\n")
        assert damaged_lines(run) and steps(run) == steps(one)

    code, text = verdict(lambda run: None)
    assert code == 0 and f"{3 * STEPS} of {3 * STEPS} steps" in text, text
    code, text = verdict(without_its_last_steps)
    assert code == 3 and f"it is completed, with {3 * STEPS - 2} of {3 * STEPS} steps" in text, text
    code, text = verdict(spoilt_validation)
    assert code == 3 and "it is completed, with 2 of 3 validations" in text and "what is no row" in text, text
    code, text = verdict(garbage)
    assert code == 3 and "metrics.jsonl holds what is no row, in line" in text, text
    for name in ("config.json", "manifest.json", "run.json"):
        code, text = verdict(lambda run, name=name: (run / name).write_bytes(b"\xff\x81{"))
        assert code == 3 and f"{name}' is damaged, it is not JSON" in text, text
    code, text = verdict(lambda run: (run / "manifest.json").write_text("[]"))
    assert code == 3 and "manifest.json' is damaged, it holds a list" in text, text


@pytest.mark.parametrize(
    "name, content, command, says",
    [
        ("manifest.json", b"\xff\x81{", "plot RUN", "manifest.json' is damaged, it is not JSON"),
        ("manifest.json", b"{}", "plot RUN", "manifest.json' is missing, or damaged"),
        ("checkpoints/BEST", b"\xff\x81", "predict RUN PICTURES", "BEST' is damaged: it names no checkpoint"),
        ("checkpoints/BEST", b"\xff\x81", "verify RUN", "BEST is damaged: it names no checkpoint"),
    ],
)
def test_a_damaged_file_is_named_by_the_command_that_needs_it(one, data, tmp_path, name, content, command, says):
    subprocess.run(["cp", "-r", one, tmp_path / "copy"], check=True)
    words = {"RUN": str(tmp_path / "copy"), "PICTURES": str(data / "val")}
    whole = CliRunner().invoke(cli.main, [words.get(word, word) for word in command.split()])
    assert whole.exit_code == 0, whole.output
    (tmp_path / "copy" / name).write_bytes(content)
    result = CliRunner().invoke(cli.main, [words.get(word, word) for word in command.split()])
    assert result.exit_code == 3 and says in result.output, result.output


def test_a_damaged_report_of_a_rank_ends_no_showing(one, tmp_path):
    subprocess.run(["cp", "-r", one, tmp_path / "copy"], check=True)
    write_status(tmp_path / "copy", status="failed", reason="rank 0 failed")
    (tmp_path / "copy" / "logs" / "attempt-1-rank-0.error.json").write_bytes(b"\xff\x81")
    result = CliRunner().invoke(cli.main, ["follow", str(tmp_path / "copy")])
    assert result.exit_code == 1 and "run 'copy' failed: rank 0 failed" in result.output, result.output


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user for a moment, which only root may")
def test_looking_at_a_run_of_another_user_writes_nothing(one):
    def look():
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                open(one / "lock", "a")
            return is_locked(one), read_status(one)["status"]
        finally:
            os.seteuid(0)

    for folder in [one, *one.parents]:
        folder.chmod(folder.stat().st_mode | 0o055)
    assert look() == (False, "completed")
    with lock_run(one):
        assert look() == (True, "completed")  # the control


def test_names_of_classes_are_drawn_as_they_are_written(data, make_config, tmp_path):
    subprocess.run(["cp", "-r", data, tmp_path / "odd"], check=True)
    for split in ("train", "val"):
        (tmp_path / "odd" / split / "0").rename(tmp_path / "odd" / split / "$x^{$")
        (tmp_path / "odd" / split / "1").rename(tmp_path / "odd" / split / os.fsdecode(b"\xff\xfe"))
    train, _ = index_data(tmp_path / "odd")
    assert {"$x^{$", "\\xff\\xfe"} < {*train.titles} and os.fsdecode(b"\xff\xfe") in train.classes
    plot_pictures(make_config("odd-names", "local", data_dir=tmp_path / "odd"), train).savefig(BytesIO())
    figure = plt.figure()
    figure.text(0, 0, "$x^{$")
    with pytest.raises(ValueError, match="ParseException|ParseFatalException|Expected"):
        figure.savefig(BytesIO())  # the control: as mathematics it can't be drawn
    plt.close(figure)
