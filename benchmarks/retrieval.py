"""Retrieval over many pairs: time and peak memory of `fastclip.evaluation.retrieval`.

    python -m benchmarks.retrieval --pairs 200000 --width 512

Features are random, text i near image i. One line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from torch.nn import functional as F

from fastclip.evaluation import retrieval


def main() -> None:
    """Prints pairs, width, threads, seconds, peak resident memory in GiB, R@1 both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.pairs, options.width, generator=generator)
    texts = torch.randn(options.pairs, options.width, generator=generator)
    texts.mul_(3.5).add_(images)
    F.normalize(images, dim=1, out=images)
    F.normalize(texts, dim=1, out=texts)
    start = time.monotonic()
    found = retrieval(images, texts, torch.arange(options.pairs))
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    row = {"pairs": options.pairs, "width": options.width, "threads": torch.get_num_threads()}
    row |= {"seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
    print(json.dumps(row | {way: round(figures["R@1"], 4) for way, figures in found.items()}))


if __name__ == "__main__":
    main()
