"""Who can connect to a run: nobody from outside, and no other user."""

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
from conftest import epochs_begun, ranks_of, wait_for

from resnet_nb.run import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net/tcp, which only Linux has")


def listening(process: int) -> set[str]:
    """Addresses at which a process listens."""
    held = set()
    for handle in Path(f"/proc/{process}/fd").iterdir():
        try:
            held.add(os.readlink(handle))
        except FileNotFoundError:  # closed just now
            pass
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{process}/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in held:  # 0A: it listens
                raw = bytes.fromhex(words[1].partition(":")[0])
                found.add(socket.inet_ntop(family, b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))))
    return found


def test_a_run_listens_on_the_loopback_only(make_config):
    run_dir = launch.start(make_config("loopback", epochs=40, image_sizes=[32]))
    wait_for(lambda: epochs_begun(run_dir) >= 1)
    ranks = ranks_of(run_dir)
    parents = {int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks}
    private = Path(
        next(word for word in Path(f"/proc/{ranks[0]}/environ").read_text().split("\0") if word.startswith("RESNET_NB_PRIVATE=")).partition(
            "="
        )[2]
    )
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and (private / "store").exists()
    found = [listening(process) for process in (*ranks, *parents)]
    launch.stop(run_dir)
    launch.follow(run_dir)
    assert len(ranks) == 2 and len(parents) == 1
    assert set().union(*found) == {"127.0.0.1"}, found  # and gloo does listen
    assert not private.exists()


def test_a_listener_on_all_interfaces_would_be_seen():
    with socket.create_server(("", 0)):
        assert "0.0.0.0" in listening(os.getpid())
