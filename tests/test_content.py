"""Pictures that were swapped between a stop and a resume, under the same names and with the same sizes in bytes, are noticed."""

import lightning as L
import pytest
from conftest import run_here, small_data

from resnet_nb.data.datamodule import ImageNetDataModule
from resnet_nb.data.index import BadPicture
from resnet_nb.run import launch, worker
from resnet_nb.run.folder import make_run_dir, read_rows


def of_one_size(folder):
    """Small data whose files all have the same number of bytes; what follows a PNG's end is not read."""
    data = small_data(folder)
    files = sorted(data.rglob("*.png"))
    longest = max(path.stat().st_size for path in files)
    for path in files:
        path.write_bytes(path.read_bytes().ljust(longest, b"\0"))
    return data, [path for path in files if "train" in path.parts]


def stopped_run(make_config, name, data):
    """A run that was stopped after its first step."""
    config = make_config(name, "local", data_dir=data, epochs=1, image_sizes=[16])
    (make_run_dir(name) / "STOP").touch()
    run_dir, outcome = run_here(config)
    assert "saved at step 1" in outcome
    (run_dir / "STOP").unlink()
    return config, run_dir


def test_a_resume_refuses_pictures_that_were_swapped(make_config, tmp_path):
    data, files = of_one_size(tmp_path)
    config, run_dir = stopped_run(make_config, "swapped", data)
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[30:] + contents[:30]):  # each gets that of another class
        path.write_bytes(content)
    with pytest.raises(BadPicture, match="was trained on other pictures of the same names and sizes: of those that step 1 read") as failure:
        run_here(config, attempt=2)
    assert str(data) in str(failure.value) and launch.CODES["BadPicture"] == 3  # one sentence, and not started again
    for path, content in zip(files, contents):
        path.write_bytes(content)
    assert run_here(config, attempt=3)[1] == "completed"  # the control: the data as they were
    assert len({row["content"] for row in read_rows(run_dir, "step")}) == 4


def test_a_run_is_not_completed_with_pictures_that_were_swapped_while_it_trained(make_config, tmp_path, monkeypatch):
    data, files = of_one_size(tmp_path)
    contents = [path.read_bytes() for path in files]

    class Swap(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                for path, content in zip(files, contents[30:] + contents[:30], strict=True):
                    path.write_bytes(content)

    usual = worker.make_trainer

    def make_trainer(*args):
        trainer = usual(*args)
        trainer.callbacks.append(Swap())
        return trainer

    config = make_config("swapped-meanwhile", "local", data_dir=data, epochs=2, image_sizes=[16])
    make_run_dir("swapped-meanwhile")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "make_trainer", make_trainer)
        with pytest.raises(BadPicture, match="holds something else now"):
            run_here(config)
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    with pytest.raises(BadPicture, match="or choose another name"):  # what it learned from both can't be mended
        run_here(config, attempt=2)
    make_run_dir("not-swapped")
    assert run_here(make_config("not-swapped", "local", data_dir=data, epochs=2, image_sizes=[16]))[1] == "completed"


def test_what_is_not_covered(make_config, tmp_path):
    data, files = of_one_size(tmp_path)
    config, run_dir = stopped_run(make_config, "one-swapped", data)
    datamodule = ImageNetDataModule(config)
    datamodule.setup()
    sampled = {datamodule.train_index.where(keys[0].index) for keys in datamodule.step_keys(0)}
    other = next(path for path in files if str(path) not in sampled)
    other.write_bytes(next(path for path in files if path.parent != other.parent).read_bytes())
    assert run_here(config, attempt=2)[1] == "completed"
    one = next(path for path in files if str(path) in sampled)
    config, run_dir = stopped_run(make_config, "sampled-swapped", data)
    one.write_bytes(next(path for path in files if path.parent != one.parent).read_bytes())
    with pytest.raises(BadPicture, match="holds something else now"):
        run_here(config, attempt=2)
