"""What is left of a run that is killed every ten minutes: its save and its restart measured, its days simulated.

    python -m benchmarks.goodput [--kills-every 600] [--out FILE.csv]

The demo's recipe trains under `torchrun --max-restarts` with a snapshot after every step; a rank is killed with SIGKILL
and the run goes on. From what that took, kills at random (exponential) instants are simulated for each interval
between snapshots: goodput is the share of the time that went into steps which are kept. Exit 1 where the best is below
98 %, or a snapshot stalls training for as long as a step takes.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks import machine

LEAST = 0.98
SAVES = 12
TIMEOUT = 240.0
DAYS = 100
INTERVALS = (2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    step: float
    stall: float  # that a snapshot takes from training
    durable: float  # from a snapshot's step to the time that a kill leaves it
    restart: float  # from the kill to the first step's begin


class Run:
    """A run under torchrun, which starts all ranks anew when one dies; and when each step and checkpoint came."""

    def __init__(self, data: Path, out: Path) -> None:
        words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "9"]
        words += ["-m", "fastclip.training"]
        words += ["--recipe", "demo", "--data", str(data), "--out", str(out), "--minutes", "0", "--steps", "100000"]
        words += ["--log-every", "1", "--snapshot-every", "1", "--resume", "latest", "--eval-every", "0"]
        self.out, self.log, self.last = out, out.parent / "log", 0
        self.steps: dict[int, float] = {}
        self.saves: dict[int, float] = {}
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)

    def until(self, is_enough: Callable[[], bool]) -> None:
        """Looks at what it writes until then."""
        end = time.monotonic() + TIMEOUT
        while not is_enough():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"it ended, or made no step: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)
            step, saved = self._last_step(), self._last_save()
            if step and step != self.last:
                self.last = step
                self.steps[step] = time.monotonic()
            if saved:
                self.saves.setdefault(saved, time.monotonic())

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def end(self) -> None:
        processes = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes)

    def _last_step(self) -> int:
        try:
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, json.JSONDecodeError):
            return 0

    def median(self, key: str) -> float:
        """Of what the run says of itself, without its first step."""
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return statistics.median(line[key] for line in lines if line["step"] > 1)

    def _last_save(self) -> int:
        steps = [0]
        for record in (self.out / "snapshots").glob("*/rank_0.json"):
            with suppress(FileNotFoundError):
                steps.append(json.loads(record.read_text())["step"])
        return max(steps)


def measured(folder: Path) -> Costs:
    from fastclip.data.demo import write_demo

    data, out = folder / "data", folder / "run"
    write_demo(data, scenes=8_000)
    run = Run(data, out)
    try:
        run.until(lambda: len(run.saves) == SAVES)
        step, stall = run.median("step_time"), run.median("stall")
        durable = [at - run.steps[save] for save, at in run.saves.items()]
        first = max(run.saves) + 1
        time.sleep(step / 2)
        run.ranks()[-1].kill()
        killed = time.monotonic()
        run.until(lambda: run.last == first and run.steps[first] > killed)
        restart = run.steps[first] - killed - step
    finally:
        run.end()
    return Costs(step, stall, statistics.median(durable), restart)


def goodput(costs: Costs, save_every: float, kills_every: float, seed: int = 0) -> float:
    """Share of DAYS that goes into steps which are kept; times are drawn, steps and saves follow each other."""
    dice, total, kept = random.Random(seed), 0.0, 0.0
    steps = max(1, round(save_every / costs.step))  # between two saves
    period = steps * costs.step + costs.stall
    while total < DAYS * 86_400:
        lived = dice.expovariate(1 / kills_every)
        training = lived - costs.restart
        saves = max(0, int((training - costs.durable) / period)) if training > costs.durable else 0
        kept += saves * steps * costs.step
        total += lived
    return kept / total


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.goodput", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills-every", type=float, default=600.0, help="seconds, on average")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "build" / "goodput.csv")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        costs = measured(Path(folder))
    print(", ".join(f"{name} {value:.2f} s" for name, value in asdict(costs).items()))
    found = {every: goodput(costs, every, options.kills_every) for every in INTERVALS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*asdict(costs), "save_every", "kills_every", "goodput", "machine", "commit"])
        for every, share in found.items():
            times = [f"{value:.3f}" for value in asdict(costs).values()]
            where = [machine.machine_name("cpu"), machine.commit()]
            writer.writerow([*times, every, options.kills_every, f"{share:.4f}", *where])
            print(f"saved every {every:5.0f} s: {100 * share:.2f} % of the time is kept")
    return int(max(found.values()) < LEAST or costs.stall >= costs.step)


if __name__ == "__main__":
    sys.exit(main())
