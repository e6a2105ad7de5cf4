"""What caching costs: a step in four chunks beside a plain step of the same batch, in turns, with the gradient checked.

    python -m benchmarks.grad_cache [--model demo] [--batch 256] [--seconds 40] [--out FILE.csv]

With chunks of a quarter three of four are forwarded twice: 1.25 times a plain step where a backward takes twice a
forward. Exit 1 where the median ratio is above 1.40.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine, rows
from benchmarks.timing import Sample, interleave, quantiles, ratio
from fastclip.grad_cache import GradCache
from fastclip.losses import contrastive_loss
from fastclip.models import create_model

MOST = 1.40
BUDGET = 1e-5  # relative, all gradients as one vector
CHUNKS = 4


class Step:
    """Takes turns: forward, loss and backward of one batch; there is nothing between to time apart."""

    def __init__(self, model: torch.nn.Module, run: Callable[[], object]) -> None:
        self.model, self.run = model, run

    def block(self, repeats: int) -> Sample:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        spent = 0.0
        for _ in range(repeats):
            self.model.zero_grad()
            wait()
            start = time.perf_counter()
            self.run()
            wait()
            spent += time.perf_counter() - start
        return Sample(1e3 * spent / repeats, 0.0)

    def gradient(self) -> Tensor:
        self.model.zero_grad()
        self.run()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def steps(name: str, batch: int, device: str) -> dict[str, Step]:
    torch.manual_seed(0)
    model = create_model(name, device=device)
    vision, text = model.config.vision, model.config.text
    image = torch.randn(batch, 3, vision.image_size, vision.image_size, device=device)
    ids = torch.randint(1, text.vocab_size - 1, (batch, text.context_length), device=device)
    ids[:, -1] = text.vocab_size - 1
    clip = partial(model, output_dict=True)
    cache = GradCache({"clip": clip}, contrastive_loss, -(-batch // CHUNKS))
    return {
        "plain": Step(model, lambda: contrastive_loss(**clip(image, ids)).backward()),
        "grad_cache": Step(model, lambda: cache.step({"clip": (image, ids)})),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grad_cache", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "build" / "grad_cache.csv")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subjects = steps(options.model, options.batch, device)
    truth, ours = (subjects[name].gradient() for name in ("plain", "grad_cache"))
    error = float((ours - truth).norm() / truth.norm())
    if not error <= BUDGET:
        print(f"the gradient is wrong: relative error {error:.1e}, may be {BUDGET:.0e}", file=sys.stderr)
        return 1
    taken, _ = interleave(subjects, dict.fromkeys(subjects, 1), options.seconds)
    times = {name: quantiles(samples)["forward"] for name, samples in taken.items()}
    shape = json.dumps({"batch": options.batch, "chunk": -(-options.batch // CHUNKS), "model": options.model})
    shared = {"op": "grad_cache", "device": device, "dtype": "float32", "shape_json": shape, "phase": "both"}
    shared |= {"baseline": "plain", "machine": machine.machine_name(device), "torch": torch.__version__}
    shared |= {"commit": machine.commit(), "budget": f"{BUDGET:.0e}"}
    for name, quantile in times.items():
        row = rows.make_row(
            impl=name,
            p50_ms=quantile.p50,
            p20_ms=quantile.p20,
            p80_ms=quantile.p80,
            ratio=ratio(taken["plain"], taken[name], "forward"),
            error=error if name == "grad_cache" else 0.0,
            **shared,
        )
        rows.append(options.out, [row])
    overhead = ratio(taken["grad_cache"], taken["plain"], "forward")
    print(f"{shape}: {overhead:.3f} times a plain step ({len(taken['plain'])} rounds), gradient error {error:.1e}")
    return int(overhead > MOST)


if __name__ == "__main__":
    sys.exit(main())
