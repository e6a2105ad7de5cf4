"""`python -m benchmarks.data_memory`: what the loader's processes hold, over many samples and with many shards listed.

Prints the private memory (MiB) of the process that draws the order and of one worker, at some numbers of samples read
and for some numbers of shards listed. Images are 16 pixels, so that a million are read in minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
from pathlib import Path

from fastclip.data import Loader, Tokenizer, train_tokenizer, write_shard
from fastclip.data.files import synthetic_caption, synthetic_jpeg

SHARD, BATCH = 1000, 1000


def private(process: int) -> float:
    """MiB that it wrote itself: neither libraries nor what it shares with the process it was forked from."""
    found = re.search(r"^Private_Dirty: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def write_shards(folder: Path, shards: int) -> None:
    """`shards` links to one shard of SHARD pairs."""
    pairs = [
        (f"{n:06d}", {"jpg": synthetic_jpeg(n % 64, 16), "txt": synthetic_caption(n).encode()}) for n in range(SHARD)
    ]
    write_shard(folder / "0.tar", pairs)
    for shard in range(1, shards):
        os.link(folder / "0.tar", folder / f"{shard}.tar")
        os.link(folder / "0.tar.index.npz", folder / f"{shard}.tar.index.npz")


def listed(folder: Path, shards: int, there: int) -> Path:
    """A shard index of `shards` names, of which `there` exist and are named again and again."""
    path = folder / f"{shards}.json"
    entries = [{"url": f"./{'./' * (n // there % 7)}{n % there}.tar", "nsamples": SHARD} for n in range(shards)]
    path.write_text(json.dumps({"shardlist": entries}))
    return path


def measure(data: Path, tokenizer: Tokenizer, samples: int, points: int) -> None:
    """Prints a line at each of `points` numbers of samples."""
    loader = Loader(data, tokenizer, 16, BATCH, workers=1)
    print(loader.describe(), flush=True)
    batches = loader.batches()
    every = max(samples // BATCH // points, 1)
    for step, _ in zip(range(1, samples // BATCH + 1), batches, strict=False):
        if step == 1 or step % every == 0:
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            here, there = private(os.getpid()), private(worker.pid)
            print(f"{step * BATCH:>9,} samples: main {here:7.1f} MiB, worker {there:7.1f} MiB", flush=True)
    batches.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--listed", type=int, nargs="*", default=[1_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=100)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = [synthetic_caption(number) for number in range(2000)]
        tokenizer = train_tokenizer(captions, folder / "tokenizer.json", 1000, 32)
        write_shards(folder, asked.shards)
        measure(listed(folder, asked.shards, asked.shards), tokenizer, asked.samples, 10)
        for shards in asked.listed:
            measure(listed(folder, shards, asked.shards), tokenizer, 20 * BATCH, 2)


if __name__ == "__main__":
    main()
