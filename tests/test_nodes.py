"""Several machines that train together: two network namespaces are the hosts, with two gloo ranks each."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import STEPS, trained_here, wait_for

from resnet_nb.files import read_json
from resnet_nb.run import launch
from resnet_nb.run.checkpoints import checkpoints
from resnet_nb.run.folder import all_rows, read_rows, read_status

# a small network: what an exact step sends over the network is 8 bytes for each weight
RECIPE = {"arch": "shufflenet_v2_x0_5", "epochs": 4, "image_sizes": [16, 24], "hang_minutes": 0.6, "join_minutes": 3.0}
PORT = 29417
TRAIN = """
import json, sys
from resnet_nb.config import Parameters
from resnet_nb.run import launch
from resnet_nb.run.plan import resolve
try:
    launch.train(resolve(Parameters(**json.loads(sys.argv[1]))))
except launch.RunFailed as error:
    print(error)
    sys.exit(error.code)
"""


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


class Network:
    """Hosts one (10.77.0.1) and two (10.77.0.2), each a network namespace with a name and a home of its own, on one switch."""

    def __init__(self, folder: Path):
        self.folder, self.mark, self.processes = folder, f"rnb{os.getpid()}", []
        self.homes = {name: folder / name for name in ("one", "two")}
        self.spaces = {name: f"{self.mark}-{name}" for name in ("switch", "one", "two")}

    def __enter__(self):
        try:
            for space in self.spaces.values():
                ip(f"netns add {space}")
            switch = self.spaces["switch"]
            ip(f"-n {switch} link add bridge type bridge")
            ip(f"-n {switch} link set bridge up")
            for number, name in enumerate(("one", "two"), 1):
                space = self.spaces[name]
                ip(f"-n {switch} link add port-{name} type veth peer name eth0 netns {space}")
                ip(f"-n {switch} link set port-{name} master bridge up")
                ip(f"-n {space} addr add 10.77.0.{number}/24 dev eth0")
                for link in ("eth0", "lo"):
                    ip(f"-n {space} link set {link} up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in ("one", "two"):
            self.kill(name)
        for process in self.processes:
            process.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def start(self, host: str, *words: str, **more: str) -> subprocess.Popen:
        """A process on a host; `more` is added to its environment."""
        home = self.homes[host]
        home.mkdir(exist_ok=True)
        within = ["ip", "netns", "exec", self.spaces[host], "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
        self.processes.append(
            subprocess.Popen(
                [*within, sys.executable, *words],
                env=os.environ | {"RESNET_NB_HOME": str(home)} | more,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return self.processes[-1]

    def train(self, host: str, config, **more) -> subprocess.Popen:
        given = config.parameters.model_dump() | {"nodes": 2, "rdzv": f"10.77.0.1:{PORT}"} | more
        return self.start(host, "-c", TRAIN, json.dumps(given))

    def command(self, host: str, name: str, *words: str) -> subprocess.Popen:
        command = "from resnet_nb.cli import main; main(prog_name='resnet-nb')"
        return self.start(host, "-c", command, "train", "-r", "name", name, "-p", "nodes", "2", "-p", "rdzv", f"10.77.0.1:{PORT}", *words)

    def run(self, host: str, name: str) -> Path:
        return self.homes[host] / "runs" / (name if host == "one" else f"{name}@{host}")

    def cut(self, on: bool = True) -> None:
        """Cut host two off, or let it back on, as a switch would."""
        ip(f"-n {self.spaces['switch']} link set port-two {'down' if on else 'up'}")

    def kill(self, host: str) -> None:
        """All that runs on a host, as if its power went."""
        found = subprocess.run(["ip", "netns", "pids", self.spaces[host]], capture_output=True, text=True).stdout.split()
        for process in found:
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                pass


def no_namespaces() -> str:
    """Why there can be no hosts here; empty where there can."""
    if sys.platform != "linux" or not shutil.which("ip") or not shutil.which("unshare"):
        return "network namespaces are Linux's, and take ip and unshare"
    tried = subprocess.run(
        "ip netns add rnb-try && ip -n rnb-try link add type veth && ip netns exec rnb-try unshare --uts true",
        shell=True,
        capture_output=True,
        text=True,
    )
    subprocess.run(["ip", "netns", "del", "rnb-try"], capture_output=True)
    return f"network namespaces can't be made here: {tried.stderr.strip()[-200:]}" if tried.returncode else ""


hosts = pytest.mark.skipif(bool(reason := no_namespaces()), reason=reason)


@pytest.fixture
def network(tmp_path_factory):
    with Network(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def config(make_config):
    def make(name, **more):
        return make_config(name, **({"numerics": "exact"} | RECIPE | more))

    return make


@pytest.fixture(scope="module")
def alone(config):
    """The run on one process of one machine."""
    return trained_here(config("alone", hw="local"))


def tensors(run_dir: Path) -> dict[str, dict]:
    """sha256 of every weight, statistic and momentum, of each checkpoint."""
    return {path.name: read_json(path / "MANIFEST.json")["tensors"] for path in checkpoints(run_dir)}


def rows(run_dir: Path) -> list:
    names = ("train/step_loss", "digest", "val/acc", "val/loss", "train/loss")
    return [{name: row.get(name) for name in names} for event in ("step", "epoch", "val") for row in read_rows(run_dir, event)]


def note(row: dict, begins: str, attempt: int) -> bool:
    return row.get("note", "").startswith(begins) and row["attempt"] == attempt


def ended(*processes: subprocess.Popen, seconds: int = 400) -> list[str]:
    said = [process.communicate(timeout=seconds)[0] for process in processes]
    print(*said, sep="\n")
    return said


@hosts
def test_two_hosts_make_the_bits_of_one_through_a_cut_and_a_stop(network, config, alone):
    asked = config("cut")
    folders = [network.run(host, "cut") for host in ("one", "two")]
    first = [network.train(host, asked) for host in ("two", "one")]  # who comes first waits
    wait_for(lambda: len(read_rows(folders[0], "step")) > STEPS, 300)
    network.cut()  # both hang, and begin again by themselves
    wait_for(lambda: all(any(note(row, "waits at", 2) for row in all_rows(folder)) for folder in folders), 300)
    network.cut(False)
    wait_for(lambda: len(read_rows(folders[0], "step")) > 2 * STEPS, 300)
    (folders[1] / "STOP").touch()  # what `resnet-nb stop` does on a machine that does not lead
    ended(*first)
    for folder in folders:
        status = read_status(folder)
        assert (status["status"], [attempt["kind"] for attempt in status["attempts"][:-1]]) == ("stopped", ["Hang"])
    assert "a STOP file; saved at step" in read_status(folders[1])["reason"]
    stopped_at = checkpoints(folders[0])[0].name
    assert 2 * STEPS < int(stopped_at[5:]) < STEPS * RECIPE["epochs"]  # in the middle of the run
    again = [network.command(host, "cut") for host in ("one", "two")]  # nothing but the name, and where they meet
    said = ended(*again)
    assert all("epoch   4/4" in text and "done: " in text for text in said)
    assert "2 meet at 10.77.0.1:29417, this one leads" in said[0] and "this one follows, in cut@two" in said[1]
    assert [process.returncode for process in again] == [0, 0]
    assert [read_status(folder)["status"] for folder in folders] == ["completed"] * 2
    leaders = [read_json(folder / "manifest.json")["attempts"][-1]["leader"] for folder in folders]
    assert leaders == [{"host": "one", "attempt": len(read_status(folders[0])["attempts"])}] * 2
    assert f"Resumes from {stopped_at}" in (folders[1] / "logs" / "attempt-3-rank-2.log").read_text()
    assert tensors(folders[0]) == tensors(alone)
    assert rows(folders[0]) == rows(folders[1]) == rows(alone)  # each host has the whole record, and only the leader checkpoints
    assert not [*(folders[1] / "checkpoints").iterdir()] and not (folders[1] / "tensorboard").exists()


def test_another_seed_has_other_bits(config, alone):
    other = trained_here(config("other-seed", hw="local", seed=1))
    seeds = [tensors(run_dir)[f"step-{STEPS * RECIPE['epochs']:08d}"] for run_dir in (alone, other)]
    assert {name for name in seeds[0] if seeds[0][name] == seeds[1][name]} == {name for name in seeds[0] if "num_batches" in name}
    assert not any(row in rows(alone) for row in rows(other))


@hosts
def test_hosts_with_different_pictures_refuse_to_train_and_name_the_host(network, config, data, tmp_path):
    shutil.copytree(data, tmp_path / "small")
    picture = sorted((tmp_path / "small" / "train" / "3").iterdir())[0]
    picture.rename(picture.with_name("renamed.png"))
    given = {"one": str(data), "two": str(tmp_path / "small")}
    asked = config("differ")
    processes = [network.train(host, asked, data_dir=given[host]) for host in given]
    said = ended(*processes)
    assert [process.returncode for process in processes] == [2, 2]
    for text in said:
        assert re.search(r"train_sha256 is '\w+' on two, and '\w+' on one, which leads; bring the same pictures", text.replace("\n", " "))


@hosts
def test_a_run_whose_leader_lost_its_power_goes_on_when_that_is_started_again(network, config, alone):
    network.homes["two"] = network.homes["one"]  # on shared storage each has a folder of its own all the same
    asked = config("power")
    folders = [network.run(host, "power") for host in ("one", "two")]
    one, two = (network.train(host, asked) for host in ("one", "two"))
    wait_for(lambda: len(read_rows(folders[0], "step")) > STEPS, 300)
    network.kill("one")
    wait_for(lambda: any(note(row, "waits at", 2) for row in all_rows(folders[1])), 300)
    one = network.train("one", asked)
    ended(one, two)
    assert [read_status(folder)["status"] for folder in folders] == ["completed"] * 2
    assert tensors(folders[0]) == tensors(alone)


@hosts
def test_a_machine_whose_others_do_not_come_says_so_and_can_be_stopped(network, config):
    asked, folder = config("lonely", join_minutes=0.2), network.run("one", "lonely")
    said = ended(network.train("one", asked))[0]
    assert "waits at 10.77.0.1" in said and "not all 2 machines came to 10.77.0.1:29417 within 0.2 minutes" in said
    assert (read_status(folder)["status"], len(read_status(folder)["attempts"])) == ("stopped", 1)
    two = network.train("two", config("lonely"))
    wait_for(lambda: read_status(network.run("two", "lonely"))["status"] == "running")  # before, it takes an old STOP file away
    launch.stop(network.run("two", "lonely"))
    assert "asked to stop while it waited for the other machines" in ended(two)[0]
