"""A training step of the two towers beside open_clip's: forward, loss and backward, in turns, gradients checked first.

    python -m benchmarks.encoder [--model ViT-B-32] [--batch 16] [--dtype float32] [--seconds 40] [--out FILE.csv]

Captions have 8 to 24 tokens, 16 on average. open_clip is given them padded to 77, and once more padded to 32; ours
takes its steps with and without selective recomputation. Rows: "encoder" is the step, "encoder_text" the text tower
alone, both with the bytes saved for backward as peak_mb. With a checkout of open_clip first in PYTHONPATH that one is
measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, rows
from benchmarks.timing import Sample, interleave, quantiles, ratio
from fastclip._version import __version__
from fastclip.losses import ClipLoss
from fastclip.models import create_model, get_config

SHORT = 32
LENGTHS = (8, 24)
BUDGETS = {"float32": 1e-4, "bfloat16": 5e-2}  # relative, all gradients as one vector
MIB = 1 << 20


class Step:
    """Takes turns: forward, loss and backward of one batch.

    clock: "wall", or "cpu": what the process itself used, for one thread on a machine that has other work too.
    """

    def __init__(self, model: nn.Module, run: Callable[[], Tensor], clock: str) -> None:
        self.model, self.run = model, run
        self.now = time.process_time if clock == "cpu" else time.perf_counter

    def block(self, repeats: int) -> Sample:
        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        spent = 0.0
        for _ in range(repeats):
            self.model.zero_grad()
            wait()
            start = self.now()
            self.run().backward()
            wait()
            spent += self.now() - start
        return Sample(1e3 * spent / repeats, 0.0)

    def gradients(self) -> tuple[dict[str, Tensor], int]:
        """By name, and the bytes kept for backward."""
        self.model.zero_grad()
        value, saved = saved_bytes(self.run, self.model)
        value.backward()
        found = {name: p.grad.float() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return found, saved


def captions(batch: int, context: int, vocab: int) -> Tensor:
    """Ids (B, context), zeros behind end-of-text, of 16 tokens on average."""
    first, last = LENGTHS
    lengths = torch.linspace(first, last, batch).round().long()[torch.randperm(batch)]
    ids = torch.randint(1, vocab - 2, (batch, context))
    ids[torch.arange(batch), lengths - 1] = vocab - 1
    return ids.masked_fill(torch.arange(context) >= lengths[:, None], 0)


def open_clip_model(name: str, context: int) -> nn.Module:
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    import open_clip

    return open_clip.create_model(name, force_context_length=context)


def version_of(impl: str) -> str:
    """Of the package that was imported: a checkout on the path may stand in for an installed one."""
    return f"fastclip {__version__}" if is_ours(impl) else f"open_clip_torch {sys.modules['open_clip'].__version__}"


def is_ours(impl: str) -> bool:
    return impl.startswith("fastclip")


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """run(), and the bytes that autograd keeps for its backward: each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = run()
    return value, sum(kept.values())


class Subjects:
    """The implementations on one batch, by row: op -> impl -> step."""

    def __init__(self, name: str, batch: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        config = get_config(name)
        size = config.vision.image_size
        self.image = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
        self.ids = captions(batch, config.text.context_length, config.text.vocab_size).to(device)
        ours = create_model(name, device=device).train()
        theirs = open_clip_model(name, config.text.context_length).to(device).train()
        short = open_clip_model(name, SHORT).to(device).train()
        theirs.load_state_dict(ours.state_dict())
        state = {k: v[:SHORT] if k == "positional_embedding" else v for k, v in ours.state_dict().items()}
        short.load_state_dict(state)
        lean = copy.deepcopy(ours)
        lean.set_recompute("selective")
        self.models = {"open_clip": theirs, f"open_clip_{SHORT}": short, "fastclip": ours, "fastclip_selective": lean}
        for model in self.models.values():
            model.to(dtype)
        from open_clip.loss import ClipLoss as OpenClipLoss

        self.losses = {impl: ClipLoss() if is_ours(impl) else OpenClipLoss() for impl in self.models}

    def text_of(self, impl: str) -> Tensor:
        return self.ids[:, :SHORT] if impl.endswith(str(SHORT)) else self.ids

    def loss(self, impl: str) -> Tensor:
        image, text, scale = self.models[impl](self.image, self.text_of(impl))[:3]
        return self.losses[impl](image, text, scale)

    def text(self, impl: str) -> Tensor:
        model: Any = self.models[impl]
        return model.encode_text(self.text_of(impl)).float().square().sum()

    def steps(self, op: str, clock: str) -> dict[str, Step]:
        run = self.loss if op == "encoder" else self.text
        return {impl: Step(model, partial(run, impl), clock) for impl, model in self.models.items()}


def gate(steps: dict[str, Step]) -> tuple[float, dict[str, int]]:
    """The error of our gradient against open_clip's, all of it as one vector, and the bytes each keeps."""
    found = {impl: step.gradients() for impl, step in steps.items()}
    ours, theirs = found["fastclip"][0], found["open_clip"][0]
    lean = found["fastclip_selective"][0]
    if any(not torch.equal(lean[name], value) for name, value in ours.items()):
        raise RuntimeError("the gradient of selective recomputation is not the same")
    gap = sum(float((ours[name].reshape(value.shape) - value).square().sum()) for name, value in theirs.items())
    whole = sum(float(value.square().sum()) for value in theirs.values())
    return (gap / whole) ** 0.5, {impl: saved for impl, (_, saved) in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=tuple(BUDGETS), default="float32")
    parser.add_argument("--seconds", type=float, default=40.0, help="of rounds, for each of the two ops")
    parser.add_argument("--op", choices=("encoder", "encoder_text"), help="one of the two (both)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: one thread, busy machine")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "build" / "encoder.csv")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subjects = Subjects(options.model, options.batch, getattr(torch, options.dtype), device)
    shape = json.dumps({"batch": options.batch, "model": options.model, "threads": torch.get_num_threads()})
    for op in (options.op,) if options.op else ("encoder", "encoder_text"):
        steps = subjects.steps(op, options.clock)
        error, saved = gate(steps)
        if not error <= BUDGETS[options.dtype]:
            print(f"{op}: the gradient differs by {error:.1e}, may by {BUDGETS[options.dtype]:.0e}", file=sys.stderr)
            return 1
        taken, _ = interleave(steps, dict.fromkeys(steps, 1), options.seconds, least=3)
        times = {impl: quantiles(samples)["forward"] for impl, samples in taken.items()}
        for impl, quantile in times.items():
            faster = ratio(taken["open_clip"], taken[impl], "forward")
            row = rows.make_row(
                op=op, impl=impl, device=device, dtype=options.dtype, shape_json=shape, phase="both",
                p50_ms=quantile.p50, p20_ms=quantile.p20, p80_ms=quantile.p80, peak_mb=saved[impl] / MIB, ratio=faster,
                baseline="open_clip", error=error if is_ours(impl) else 0.0, peer_version=version_of(impl),
                budget=f"{BUDGETS[options.dtype]:.0e}", machine=machine.machine_name(device), torch=torch.__version__,
                commit=machine.commit(),
            )  # fmt: skip
            rows.append(options.out, [row])
            pairs = 1e3 * options.batch / quantile.p50
            print(f"{op} {options.dtype} {shape} {impl:18} {quantile.p50:8.1f} ms {pairs:7.1f} pairs/s "
                  f"{faster:5.2f} x open_clip, {saved[impl] / MIB:6.0f} MiB saved for backward")  # fmt: skip
        print(f"{op}: {len(taken['fastclip'])} rounds, gradient error {error:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
