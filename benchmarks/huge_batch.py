"""A step of a huge batch on one GPU: the trainer's own, gradient cached, under a real DeepSpeed engine.

    python -m benchmarks.huge_batch [--model ViT-B-32] [--batches 32768 ... 1048576] [--chunk 2048] [--stage 2]
                                    [--time-budget 540] [--out FILE.csv]

Each batch size has a process of its own, which the budget or the memory may end: a row a size, written when it is
known, says how long a step took and what it held, or why there is none. Images are drawn from a few thousand on the
device, since a million of them are 150 GB; captions have 8 to 24 tokens. On a machine without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.encoder import captions
from fastclip.data import normalize_image
from fastclip.grad_cache import GradCache
from fastclip.models import create_model, get_config
from fastclip.training.config import TrainConfig
from fastclip.training.deepspeed_config import resolve_deepspeed
from fastclip.training.engine import build_engine, computes_in_bf16
from fastclip.training.loop import Loss
from fastclip.training.processes import start_processes

BATCHES = (32768, 131072, 262144, 524288, 1048576)
POOL = 4096  # images
ENOUGH = 10.0  # seconds of timed steps
COLUMNS = (
    "model", "device", "precision", "zero_stage", "global_batch", "chunk", "seconds", "pairs_per_second", "peak_mib",
    "loss", "note", "machine", "torch", "deepspeed", "commit",
)  # fmt: skip
Row = dict[str, object]


def measured(name: str, batch: int, chunk: int, stage: int) -> Row:
    """One size, in this process."""
    import deepspeed

    torch.manual_seed(0)
    processes = start_processes()
    device, model = processes.device, get_config(name)
    chunk, is_gpu = min(chunk, batch), processes.device.type == "cuda"
    config = TrainConfig(
        model=name, engine="deepspeed", zero_stage=stage, global_batch=batch, chunk_size=chunk,
        precision="bf16" if computes_in_bf16(device) else "fp32",
    )  # fmt: skip
    config, ds_config, _ = resolve_deepspeed(config, processes.world_size)
    engine = build_engine(create_model(model), config, processes, ds_config)
    size = model.vision.image_size
    pool = torch.randint(0, 256, (min(POOL, batch), 3, size, size), dtype=torch.uint8, device=device)
    ids = captions(batch, model.text.context_length, model.text.vocab_size).to(device)
    which = torch.randint(0, len(pool), (batch,), device=device)

    def clip(index: Tensor, text: Tensor) -> dict[str, Tensor]:
        return engine.forward(normalize_image(pool[index], model.image_mean, model.image_std, engine.dtype), text)

    cache = GradCache(
        {"clip": clip}, Loss(config, processes), chunk, processes.group, engine.backward, engine.set_boundary, device
    )

    def step(pairs: int) -> float:
        start = time.perf_counter()
        loss = cache.step({"clip": (which[:pairs], ids[:pairs])})
        engine.step(1.0)
        losses.append(float(loss))  # waits for the device
        return time.perf_counter() - start

    losses: list[float] = []
    step(min(batch, 2 * chunk))
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken = [step(batch)]
    while sum(taken) < ENOUGH and len(taken) < 5:
        taken.append(step(batch))
    seconds = statistics.median(taken)
    peak = torch.cuda.max_memory_allocated() / (1 << 20) if is_gpu else None
    return {
        "device": device.type, "precision": config.precision, "seconds": round(seconds, 3),
        "pairs_per_second": round(batch / seconds, 1), "peak_mib": peak and round(peak), "loss": round(losses[-1], 4),
        "deepspeed": deepspeed.__version__,
    }  # fmt: skip


def _row(options: argparse.Namespace, batch: int, left: float) -> Row:
    """What its process says, or why it says nothing."""
    row: Row = {
        "model": options.model, "zero_stage": options.stage, "global_batch": batch, "chunk": min(options.chunk, batch),
        "torch": torch.__version__, "commit": machine.commit(),
        "machine": machine.machine_name("cuda" if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip
    if left <= 0:
        return row | {"note": "not run: the time is up"}
    words = [
        "--one",
        str(batch),
        "--model",
        options.model,
        "--chunk",
        str(options.chunk),
        "--stage",
        str(options.stage),
    ]
    command = [sys.executable, "-m", "benchmarks.huge_batch", *words]
    try:
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return row | {"note": f"not run: it was not done within {left:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return row | {"note": f"failed: {last[:200]}"}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where a size has no figures for another reason than the time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.huge_batch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--chunk", type=int, default=2048, help="pairs of a chunk (2048)")
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO (2)")
    parser.add_argument("--time-budget", type=float, default=540.0, metavar="S", help="seconds in all (540)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "build" / "huge_batch.csv")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measured(options.model, options.one, options.chunk, options.stage)))
        return 0
    deadline, failed = time.monotonic() + options.time_budget, False
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in options.batches:
        row = _row(options, batch, deadline - time.monotonic())
        is_new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        failed |= str(row.get("note", "")).startswith("failed")
        figures = f"{row['seconds']} s a step, {row['pairs_per_second']} pairs/s" if "seconds" in row else row["note"]
        print(f"{batch:>9,}  {figures}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
