"""Kills a run with SIGKILL at random instants, many of them within a save, and takes it up again each time.

    python tests/kills.py [200] [--engine deepspeed] [--snapshots] [--seed 0]

Every step is saved, or kept in a snapshot. At the end the log must hold each step once with the losses of a run that
nobody disturbed, bit for bit, and so must the weights. Runs start from a process that has imported all it needs, so
that a kill costs a second.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from training_helpers import lines, options, small_data

STEPS_A_KILL, TIMEOUT = 3, 120.0


def run(arguments: list[str], log: Path) -> None:
    """The process that is killed."""
    from fastclip.training.__main__ import main

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def started(arguments: list[str], log: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastclip.training.loop", "deepspeed", "kills"])
    process = context.Process(target=run, args=(arguments, log))
    process.start()
    return process


def steps_done(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def survive(folder: Path, kills: int, engine: str, seed: int, saves: str = "save_every") -> str:
    """What is wrong after `kills` kills, or ""."""
    data, out, whole, log = small_data(folder / "data"), folder / "out", folder / "whole", folder / "log"
    steps = STEPS_A_KILL * (kills + 1)
    changed = {"engine": engine, "steps": steps, saves: 1, "keep": 2, "chunk_size": 16, "schedule": "constant"}
    undisturbed = started(options(data, whole, **changed), log)
    undisturbed.join()
    if undisturbed.exitcode:
        return log.read_text()
    dice = random.Random(seed)
    for kill in range(kills + 1):
        process = started(options(data, out, **changed, resume="latest"), log)
        if kill < kills:
            end = time.monotonic() + TIMEOUT
            while steps_done(out) < STEPS_A_KILL * kill + 1:
                if not process.is_alive() or time.monotonic() > end:
                    return f"kill {kill}: it ended by itself or made no step\n{log.read_text()}"
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.12))
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        if kill < kills and process.exitcode != -signal.SIGKILL:
            return f"kill {kill}: it had ended before"
    if process.exitcode:
        return log.read_text()
    ours, truth = ([(line["step"], line["loss"], line["grad_norm"]) for line in lines(run)] for run in (out, whole))
    if [step for step, *_ in ours] != list(range(1, steps + 1)):
        return f"steps {[step for step, *_ in ours]}"
    if ours != truth:
        return "the losses are not those of the undisturbed run"
    weights = Path("checkpoints") / f"step_{steps:08d}" / "model.safetensors"
    if (out / weights).read_bytes() != (whole / weights).read_bytes():
        return "the weights are not those of the undisturbed run"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=200)
    parser.add_argument("--engine", default="torch", choices=["torch", "deepspeed"])
    parser.add_argument("--snapshots", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began, saves = time.monotonic(), "snapshot_every" if chosen.snapshots else "save_every"
    with tempfile.TemporaryDirectory() as folder:
        wrong = survive(Path(folder), chosen.kills, chosen.engine, chosen.seed, saves)
    print(
        wrong or f"{chosen.kills} kills survived in {time.monotonic() - began:.0f} s: steps, losses, weights bit-equal"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
