"""What is left of a run that is killed every ten minutes: its save and its restart measured, its days simulated.

    python -m benchmarks.goodput [--kills-every 600] [--out FILE.csv]

The demo's recipe trains through the launcher, is saved every few steps, killed with SIGKILL and taken up again. From
what that took, kills at random (exponential) instants are simulated for each interval between saves: goodput is the
share of the time that went into steps which are kept. Exit 1 where the best is below 98 %, or a save stalls a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import machine

LEAST = 0.98
SAVE_EVERY, SAVES = 3, 4
TIMEOUT = 900.0
DAYS = 100
INTERVALS = (2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    step: float
    stall: float  # that a save takes from training
    durable: float  # from a save's step to the checkpoint that a kill leaves
    restart: float  # from the launcher's start to the first step's


class Run:
    """A run under the launcher, and when each of its steps and checkpoints came."""

    def __init__(self, data: Path, out: Path) -> None:
        words = ["-m", "fastclip.training.launch", "--recipe", "demo", "--data", str(data), "--out", str(out)]
        words += ["--minutes", "0", "--steps", "100000", "--log-every", "1", "--save-every", str(SAVE_EVERY)]
        words += ["--resume", "latest", "--eval-every", "0"]
        self.out, self.log = out, out.parent / "log"
        self.steps: dict[int, float] = {}
        self.saves: dict[int, float] = {}
        before = self._last_step()
        self.began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, start_new_session=True)
        self.first = before + 1

    def until(self, saves: int) -> None:
        """Looks until so many checkpoints of this run are there."""
        end = time.monotonic() + TIMEOUT
        while len(self.saves) < saves:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"it ended, or made no step: {self.log.read_text()[-2000:]}")
            time.sleep(0.005)
            step, saved = self._last_step(), self._last_save()
            if step >= self.first:
                self.steps.setdefault(step, time.monotonic())
            if saved >= self.first:
                self.saves.setdefault(saved, time.monotonic())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def intervals(self) -> tuple[list[float], list[float]]:
        """Seconds from one step to the next, (of those without a save, of those with one) between them."""
        plain: list[float] = []
        saving: list[float] = []
        for step, at in self.steps.items():
            if step + 1 in self.steps:
                (plain if step % SAVE_EVERY else saving).append(self.steps[step + 1] - at)
        return plain, saving

    def _last_step(self) -> int:
        try:
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (FileNotFoundError, json.JSONDecodeError):
            return 0

    def _last_save(self) -> int:
        try:
            return int((self.out / "latest").read_text().strip().removeprefix("step_"))
        except (FileNotFoundError, ValueError):
            return 0


def measured(folder: Path) -> Costs:
    from fastclip.data.demo import write_demo

    data, out = folder / "data", folder / "run"
    write_demo(data, scenes=8_000)
    run = Run(data, out)
    run.until(SAVES)
    run.kill()
    plain, saving = run.intervals()
    step = statistics.median(plain)
    durable = [at - run.steps[save] for save, at in run.saves.items() if save in run.steps]
    again = Run(data, out)
    again.first = max(run.saves) + 1  # the lines behind the checkpoint are the killed run's until it drops them
    again.until(1)
    again.kill()
    restart = again.steps[again.first] - again.began - step
    return Costs(step, statistics.median(saving) - step, statistics.median(durable), restart)


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
