"""Memory and time of an index of ImageNet's size, beside torchvision's ImageFolder: 1,281,000 empty files of 1,000 classes.

    python tests/bench/index_memory.py [FOLDER] [--files 1281]

Creates the files in FOLDER (a new temporary one, removed at the end, if not given). Linux only: reads /proc/self/smaps_rollup.
`own` is memory that a process has written and shares with nobody; `resident` adds pages of mapped files, which all processes share, once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def memory() -> dict[str, float]:
    """Resident memory of this process, and what of it is its own, MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    number = lambda key: int(lines[key].split()[0]) / 1024
    return {"own": number("Private_Dirty"), "resident": number("Rss")}


def grown(before: dict, after: dict) -> dict[str, float]:
    return {key: round(after[key] - before[key], 1) for key in before}


def in_child(look_up_all) -> dict[str, float]:
    """What a forked data worker grows by while it looks up every picture, as an epoch of it does."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        before = memory()
        look_up_all()
        os.write(writer, json.dumps(grown(before, memory())).encode())
        os._exit(0)
    os.close(writer)
    found = json.loads(os.read(reader, 1000))
    os.wait()
    return found


def measure(kind: str, folder: str) -> None:
    """Print, as JSON, what `kind` ('index', 'built' or 'ImageFolder') costs in this process and in a worker."""
    if kind == "ImageFolder":
        from torchvision.datasets import ImageFolder

        before, start = memory(), time.perf_counter()
        data = ImageFolder(folder + "/train", allow_empty=True)
        samples = data.samples
        look_up_all = lambda: [path for path, label in map(samples.__getitem__, range(len(samples))) if label < 0]
    else:
        from resnet_nb.data.index import fingerprint, kept_index
        from resnet_nb.data.splits import index_data

        before, start = memory(), time.perf_counter()
        index = (kept_index(folder) or {}).get("train") if kind == "index" else index_data(folder)[0]
        look_up_all = lambda: [index.where(i) for i in range(len(index)) if index.labels[i] < 0 or not index.where(i)]
    seconds = time.perf_counter() - start
    found = {"seconds": round(seconds, 3), "main": grown(before, memory()), "worker": in_child(look_up_all)}
    if kind == "index":
        start = time.perf_counter()
        fingerprint(index)
        found |= {"fingerprint_seconds": round(time.perf_counter() - start, 3), "main_after_fingerprint": grown(before, memory())}
    print(json.dumps(found))


def main(folder: Path, files: int) -> None:
    for split, count in (("train", files), ("val", 1)):
        for label in range(1000):
            at = folder / split / f"n{label:08d}"
            at.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                os.close(os.open(at / f"n{label:08d}_{i}.JPEG", os.O_CREAT, 0o644))
            os.utime(at, (1e9, 1e9))
        os.utime(folder / split, (1e9, 1e9))
    print(f"{1000 * files:,} files of 1,000 classes; MB of memory that a process grows by")
    for kind in ("ImageFolder", "built", "index"):
        os.sync()  # pages of a file that is not yet on the disk would count as a process's own
        command = [sys.executable, __file__, str(folder), "--measure", kind]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        name = {"built": "our index, built and kept", "index": "our index, kept before"}.get(kind, kind)
        main, worker = (f"{found[who]['own']:6.1f} own, {found[who]['resident']:6.1f} resident" for who in ("main", "worker"))
        print(f"{name:26} {found['seconds']:7.3f} s   main {main}   worker, all looked up {worker}")
    after = found["main_after_fingerprint"]
    print(
        f"fingerprint of it: {found['fingerprint_seconds']} s; then the main process has {after['own']} MB of its own, {after['resident']} resident"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--files", type=int, default=1281, help="in each of 1,000 classes")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            os.environ["RESNET_NB_HOME"] = temporary
            main(Path(given.folder or temporary + "/data"), given.files)
