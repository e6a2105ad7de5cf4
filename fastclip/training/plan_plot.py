"""The simulated scaling as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastclip.training.config import TrainConfig
from fastclip.training.plan import Machine, step_time

MOST = 4096  # ranks


def draw(config: TrainConfig, world_size: int, machine: Machine, path: Path) -> Path:
    """Throughput and efficiency from one rank to thousands, at the pairs a rank has in `config`; returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    local = config.global_batch // world_size
    sizes = [2**power for power in range(MOST.bit_length())]
    runs = {size: replace(config, global_batch=local * size) for size in sizes}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ways = {"features gathered": (config.zero_stage, False), "features round a ring": (config.zero_stage, True)}
    if config.zero_stage != 3:
        ways["gathered, ZeRO-3"] = (3, False)
    for label, (stage, is_ring) in ways.items():
        staged = {size: replace(run, zero_stage=stage) for size, run in runs.items()}
        rates = [run.global_batch / step_time(run, size, machine, is_ring).total for size, run in staged.items()]
        left.loglog(sizes, rates, marker=".", label=label)
        right.semilogx(
            sizes, [100 * rate / (size * rates[0]) for size, rate in zip(sizes, rates, strict=True)], marker="."
        )
    left.loglog(sizes, [size * rates[0] for size in sizes], color="0.7", linestyle=":", label="linear")
    left.set(xlabel="GPUs", ylabel="pairs a second")
    right.set(xlabel="GPUs", ylabel="percent of linear", ylim=(0, 105))
    left.legend(frameon=False, fontsize=8)
    what = "predicted, nothing overlaps; every pair is compared with those of all GPUs"
    figure.suptitle(f"{config.model}, {local} pairs a GPU, {config.precision}: {what}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
