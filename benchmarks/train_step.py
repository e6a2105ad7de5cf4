"""A whole training step beside open_clip's: both towers, loss, backward, AdamW, on one batch that lies on the device.

    python -m benchmarks.train_step [--model ViT-B-16] [--batch 2048] [--impl open_clip fastclip ...] [--seconds 20]
                                    [--apart] [--profile FILE.txt] [--out FILE.csv]

As `open_clip --precision amp_bf16` trains: fp32 weights, torch.autocast in bfloat16, torch's fused AdamW. Captions have
8 to 24 tokens, 16 on average. open_clip gets them padded to its context, and padded to 32 (`open_clip_32`); ours packed
into a bucket, as a loader would. A side is one graph with its loss by torch.compile, but for those named eager; those
named triton and sdpa take that attention in place of "auto". On the CPU nothing is compiled.

Gate: on a small batch each side's gradient, not compiled, against that of open_clip in fp32 (it may err as much as the
budget, or twice as much as open_clip's own in bfloat16); then that of its first step on the whole batch, compiled,
against the first side's. A side that fails, runs out of memory or cannot run has its reason in
its row, and the others go on. The sides take turns; with --apart, for models that do not fit beside each other, one
side after the other. Rows: op "train_step", peak_mb all that the side needs but the images.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import machine, rows
from benchmarks.encoder import BUDGETS, LENGTHS, MIB, SHORT, captions, is_ours, open_clip_model, version_of
from benchmarks.timing import Sample, interleave, quantiles
from fastclip.losses import ClipLoss
from fastclip.models import create_model, get_config
from fastclip.ops.attention import PackedText, implementations, pack_text

BUDGET = BUDGETS["bfloat16"]
WHOLE_BUDGET = 0.2  # of two roundings beside each other; a gradient that is lost on the way is off by 0.5 or more
BUCKET = 512  # tokens
GATE_BATCH = 16
WARM_UP = 2  # steps behind the first
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Side:
    """What takes turns. attention: "auto", or the one implementation of our attention that runs."""

    is_compiled: bool = True
    context: int | None = None
    attention: str = "auto"


SIDES = {
    "open_clip": Side(),
    f"open_clip_{SHORT}": Side(context=SHORT),
    "open_clip_eager": Side(is_compiled=False),
    f"open_clip_{SHORT}_eager": Side(is_compiled=False, context=SHORT),
    "fastclip": Side(),
    "fastclip_eager": Side(is_compiled=False),
    "fastclip_triton": Side(attention="triton"),
    "fastclip_triton_eager": Side(is_compiled=False, attention="triton"),
    "fastclip_sdpa": Side(attention="sdpa"),
    "fastclip_sdpa_eager": Side(is_compiled=False, attention="sdpa"),
}
DEFAULT = ("open_clip", f"open_clip_{SHORT}", "fastclip", "fastclip_eager")


class Problem:
    """The batch and the weights that all sides begin with."""

    def __init__(self, name: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.name, self.device, self.config = name, device, get_config(name)
        size, text = self.config.vision.image_size, self.config.text
        self.image = torch.randn(batch, 3, size, size, device=device)
        self.ids = captions(batch, text.context_length, text.vocab_size)
        with torch.device(device):
            self.weights = create_model(name).state_dict()

    def model(self, impl: str) -> nn.Module:
        """In train mode, with the common weights."""
        context, key = SIDES[impl].context or self.config.text.context_length, "positional_embedding"
        with torch.device(self.device):  # a large model's random weights take a CPU long
            model = create_model(self.name) if is_ours(impl) else peer_model(self.name, context)
        model.load_state_dict(self.weights | {key: self.weights[key][:context]})
        return model.to(self.device).train()

    def text(self, impl: str, batch: int) -> Tensor | PackedText:
        """The first captions, as the side takes them."""
        ids = self.ids[:batch]
        if not is_ours(impl) or self.config.text.why_not_packed:
            return ids[:, : SIDES[impl].context].to(self.device)
        longest = min(ids.shape[1], -(-LENGTHS[1] // 8) * 8)  # a loader knows the few tokens that captions may have
        return pack_text(ids[:, :longest], bucket=BUCKET).to(self.device)


class Step:
    """A side with its model and optimizer: block() is whole steps; milliseconds by the wall, the device waited for."""

    def __init__(self, problem: Problem, impl: str, is_compiled: bool) -> None:
        self.impl, self.device, self.problem = impl, problem.device, problem
        self.model = problem.model(impl)
        self.loss = loss_of(impl)
        self.text = problem.text(impl, len(problem.image))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, (0.9, 0.98), 1e-6, 0.2, fused=self.device == "cuda"
        )
        self.forward: Callable[[Tensor, Any], Tensor] = self._forward
        if is_compiled:
            self.forward = torch.compile(self._forward, dynamic=False, fullgraph=is_ours(impl))
        self.peak = 0

    def _forward(self, image: Tensor, text: Any) -> Tensor:
        image_features, text_features, scale = self.model(image, text)[:3]
        return self.loss(image_features, text_features, scale)

    def gradients(self) -> dict[str, Tensor]:
        """Of the batch by name, on the CPU: what the next `finish` steps by."""
        with attention_of(self.impl), torch.autocast(self.device, torch.bfloat16):
            value = self.forward(self.problem.image, self.text)
        value.backward()
        return gradients_of(self.model)

    def finish(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def block(self, repeats: int) -> Sample:
        before = self._begin_peak()
        start = time.perf_counter()
        with attention_of(self.impl), told_without_traceback():
            for _ in range(repeats):
                with torch.autocast(self.device, torch.bfloat16):
                    value = self.forward(self.problem.image, self.text)
                value.backward()
                self.finish()
                del value
        synchronize(self.device)
        spent = time.perf_counter() - start
        self.peak = max(self.peak, self._end_peak(before))
        return Sample(1e3 * spent / repeats, 0.0)

    def _begin_peak(self) -> int:
        """Bytes allocated now that are not this side's."""
        synchronize(self.device)
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        own = [*self.model.parameters(), *(x for s in self.optimizer.state.values() for x in s.values())]
        return torch.cuda.memory_allocated() - sum(x.nbytes for x in own if x.is_cuda)

    def _end_peak(self, before: int) -> int:
        return torch.cuda.max_memory_allocated() - before if self.device == "cuda" else 0


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def loss_of(impl: str) -> nn.Module:
    if is_ours(impl):
        return ClipLoss()
    from open_clip.loss import ClipLoss as OpenClipLoss

    return OpenClipLoss()


def peer_model(name: str, context: int) -> nn.Module:
    """open_clip's, also of a model that only we know by name."""
    try:
        return open_clip_model(name, context)
    except RuntimeError:
        import open_clip

        data = get_config(name).to_dict()["model_cfg"]
        return open_clip.CLIP(**data | {"text_cfg": data["text_cfg"] | {"context_length": context}})


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def attention_of(impl: str) -> Any:
    """While the side runs, its attention is what "auto" tries."""
    wanted = SIDES[impl].attention
    return nullcontext() if wanted == "auto" else patch.object(implementations, "order", _only(wanted))


@cache
def _only(name: str) -> Callable[..., tuple[str, ...]]:
    """The same function each time: a graph is compiled anew for another."""
    return lambda *_, **__: (name,)


@contextmanager
def told_without_traceback() -> Iterator[None]:
    """A failure keeps its message and not the tensors of its frames."""
    message = ""
    try:
        yield
    except Exception as error:  # whatever a side does, the others go on
        message = reason_of(error)
    if message:
        raise RuntimeError(message)


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0] if len(lines[0]) > 20 else " ".join(lines)
    return ("out of memory: " if isinstance(error, torch.OutOfMemoryError) else "") + said[:300]


def gap(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Relative, all gradients as one vector; rows of the positional embedding that one side does not have are zero."""
    missing, whole = 0.0, 0.0
    for name, value in truth.items():
        ours = found[name]
        ours = nn.functional.pad(ours, (0, 0, 0, len(value) - len(ours))) if ours.dim() == 2 else ours.view_as(value)
        missing, whole = missing + float((ours - value).square().sum()), whole + float(value.square().sum())
    return (missing / whole) ** 0.5


def gate_errors(problem: Problem, impls: Sequence[str]) -> dict[str, float]:
    """Each side's error on a small batch against open_clip's gradient in fp32; sides that cannot run are left out."""
    image = problem.image[:GATE_BATCH]

    def gradient(impl: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        model, text = problem.model(impl), problem.text(impl, len(image))
        with attention_of(impl), torch.autocast(problem.device, dtype, enabled=dtype is not None):
            image_features, text_features, scale = model(image, text)[:3]
            value = loss_of(impl)(image_features, text_features, scale)
        value.backward()
        return gradients_of(model)

    truth = gradient("open_clip", None)
    errors = {}
    for impl in dict.fromkeys(("open_clip", *impls)):
        try:
            errors[impl] = gap(gradient(impl, torch.bfloat16), truth)
        except Exception as error:  # told again, and written, when the side is made
            print(f"{impl}: {reason_of(error)}", file=sys.stderr)
    return errors


class Run:
    """The sides of one problem, and what is told of them."""

    def __init__(self, problem: Problem, out: Path, errors: dict[str, float]) -> None:
        self.problem, self.out, self.errors = problem, out, errors
        self.first: dict[str, Tensor] = {}  # the gradient of the first side's first step
        self.failures: dict[str, str] = {}
        self.p50: dict[str, float] = {}

    def started(self, impl: str) -> Step | None:
        """The side after its warm-up; None where it cannot run, its row written."""
        start = time.perf_counter()
        try:
            with told_without_traceback():
                step = self._warm(impl)
        except RuntimeError as error:
            self.fail(impl, str(error))
            return None
        print(f"{impl}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        return step

    def _warm(self, impl: str) -> Step:
        allowed = max(BUDGET, 2 * self.errors.get("open_clip", 0.0))
        if not self.errors.get(impl, 0.0) <= allowed:
            raise RuntimeError(f"the gradient differs by {self.errors[impl]:.1e}, may by {allowed:.0e}")
        step = Step(self.problem, impl, SIDES[impl].is_compiled and self.problem.device == "cuda")
        found = step.gradients()
        if self.first:
            error = gap(found, self.first)
            if not error <= WHOLE_BUDGET:
                raise RuntimeError(f"the whole batch's gradient differs by {error:.1e}, may by {WHOLE_BUDGET}")
            print(f"{impl}: gradient error {self.errors.get(impl, 0.0):.1e}, on the whole batch {error:.1e}")
        elif SIDES[impl].context is None:
            self.first = found
        step.finish()
        step.block(WARM_UP)
        step.peak = 0
        return step

    def measure(self, steps: Mapping[str, Step], seconds: float) -> None:
        taken, failures = interleave(steps, dict.fromkeys(steps, 1), seconds, least=3)
        for impl, error in failures.items():
            self.fail(impl, str(error))
        times = {impl: quantiles(samples)["forward"] for impl, samples in taken.items()}
        self.p50 |= {impl: quantile.p50 for impl, quantile in times.items()}
        for impl, quantile in times.items():
            ratio = self.p50["open_clip"] / quantile.p50 if "open_clip" in self.p50 else None
            peak = steps[impl].peak / MIB or None
            self.write(
                impl, p50_ms=quantile.p50, p20_ms=quantile.p20, p80_ms=quantile.p80, ratio=ratio, peak_mb=peak,
                error=self.errors.get(impl, 0.0),
            )  # fmt: skip
            pairs = 1e3 * len(self.problem.image) / quantile.p50
            beside = f"{ratio:5.2f} x open_clip, " if ratio else ""
            print(f"{impl:22} {quantile.p50:8.1f} ms {pairs:9.1f} pairs/s {beside}"
                  f"{f'{peak:.0f} MiB, ' if peak else ''}{len(taken[impl])} rounds", flush=True)  # fmt: skip

    def fail(self, impl: str, reason: str) -> None:
        self.failures[impl] = reason
        print(f"{impl}: {reason}", file=sys.stderr, flush=True)
        self.write(impl, error=reason)
        gc.collect()
        if self.problem.device == "cuda":
            torch.cuda.empty_cache()

    def write(self, impl: str, **numbers: float | str | None) -> None:
        shape = {"batch": len(self.problem.image), "model": self.problem.name, "caption_tokens": sum(LENGTHS) // 2}
        device = self.problem.device
        row = rows.make_row(
            op="train_step", impl=impl, device=device, dtype="bfloat16", shape_json=json.dumps(shape), phase="both",
            baseline="open_clip", peer_version=version_of(impl), budget=f"{BUDGET:.0e}",
            machine=machine.machine_name(device), torch=torch.__version__, triton=machine.triton_version(),
            commit=machine.commit(), **numbers,
        )  # fmt: skip
        rows.append(self.out, [row])


def profile(steps: Mapping[str, Step], path: Path, device: str) -> None:
    """One step of each side by kernel, the longest first."""
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with path.open("a") as file:
        for impl, step in steps.items():
            with torch.profiler.profile(activities=kinds) as profiler:
                step.block(1)
            table = profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
            file.write(f"{impl}\n{table}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--impl", nargs="+", choices=tuple(SIDES), default=DEFAULT)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds; with --apart, of each side")
    parser.add_argument("--apart", action="store_true", help="one side after the other, each alone on the device")
    parser.add_argument("--profile", type=Path, help="append one step of each side by kernel to this file")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "build" / "train_step.csv")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(options.model, options.batch, device)
    run = Run(problem, options.out, gate_errors(problem, options.impl))
    for impls in [[impl] for impl in options.impl] if options.apart else [options.impl]:
        steps = {impl: step for impl in impls if (step := run.started(impl)) is not None}
        run.measure(steps, options.seconds)
        if options.profile:
            profile({impl: step for impl, step in steps.items() if impl in run.p50}, options.profile, device)
        steps.clear()
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
