"""`fastclip plan`: what a run needs, and how it scales, before a GPU is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fastclip.cli.options import optional, parse
from fastclip.errors import UserError

if TYPE_CHECKING:
    from fastclip.training.config import TrainConfig
    from fastclip.training.plan import Memory

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Memory of a rank and time of a step: a model, some GPUs, a global batch.

    What is not given is looked for: the lowest stage, then the largest chunk.

    Example: fastclip plan --model ViT-B-16 --gpus 8 --plot scaling.png
    """

    model: str = "ViT-B-32"
    """Name of the model."""
    recipe: Annotated[str, optional("NAME", "none")] = ""
    """Take model, batch and optimizer from a recipe, under the options given here."""
    gpus: int = 8
    """Ranks."""
    global_batch: int = 32_768
    """Pairs in a step, over all ranks."""
    chunk_size: int = 0
    """The most pairs that a rank forwards at once; 0 looks for the largest that fits."""
    zero_stage: int = -1
    """DeepSpeed ZeRO stage; -1 looks for the lowest that fits."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of the computation."""
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    """What backward computes again instead of keeping it; auto looks for the least that fits."""
    text_tokens: float = 0.0
    """Tokens of a caption on average, start and end included; 0 takes as many as fit."""
    memory: float = 80.0
    """Of a GPU, 10^9 bytes; 15 % of it are left free."""
    tflops: float = 400.0
    """Of a GPU in a training step, 10^12 operations a second: measure yours, this is a guess."""
    gpus_per_node: int = 8
    """That reach each other by --node-bandwidth."""
    node_bandwidth: float = 300.0
    """Within a node, 10^9 bytes a second and GPU."""
    network_bandwidth: float = 25.0
    """Between nodes, 10^9 bytes a second and GPU."""
    latency: float = 10.0
    """Of a hop, microseconds."""
    core_rate: float = 750.0
    """Pairs a second that a CPU core turns from JPEGs into batches: fastclip data bench measures yours."""
    plot: Annotated[str, optional("FILE", "none")] = ""
    """Draw throughput over the number of GPUs, at this batch a GPU, into a picture."""


def main(arguments: Sequence[str]) -> int:
    """Prints the plan; exit status 2 where nothing fits."""
    options = parse(Plan, "plan", arguments)
    from fastclip.training.plan import Machine, step_time

    machine = Machine(
        flops=options.tflops * 1e12,
        memory=options.memory * GB,
        ranks_per_node=options.gpus_per_node,
        node_bandwidth=options.node_bandwidth * GB,
        network_bandwidth=options.network_bandwidth * GB,
        latency=options.latency * 1e-6,
    )
    config, need = _fitting(options)
    local = config.global_batch // options.gpus
    chunk = config.chunk_size
    print(
        f"{config.model}, {options.gpus} GPUs, global batch {config.global_batch} = {options.gpus} x "
        f"{-(-local // chunk)} chunks of {chunk}, ZeRO-{config.zero_stage}, recompute {config.recompute}, "
        f"{config.precision}"
    )
    print(f"memory of a GPU at its peak: {need.total / GB:.1f} GB of {options.memory:g}")
    for name in ("weights", "gradients", "optimizer", "buffers", "activations", "features"):
        print(f"  {name:<12}{getattr(need, name) / GB:>8.2f} GB")
    for is_ring in (False, True):
        spent = step_time(config, options.gpus, machine, is_ring)
        parts = ", ".join(
            f"{name} {1e3 * getattr(spent, name):.0f}" for name in ("compute", "features", "gradients", "weights")
        )
        how = "features round a ring" if is_ring else "features gathered"
        print(f"step, {how}: {1e3 * spent.total:.0f} ms ({parts}), {config.global_batch / spent.total:,.0f} pairs/s")
    rate = config.global_batch / step_time(config, options.gpus, machine).total / options.gpus
    cores = math.ceil(rate / options.core_rate)
    print(f"data: {rate:,.0f} pairs/s a GPU take {cores:,} CPU cores at {options.core_rate:g} pairs/s")
    if options.plot:
        from fastclip.training.plan_plot import draw

        print(f"drawn: {draw(config, options.gpus, machine, Path(options.plot))}")
    return 0


def _fitting(options: Plan) -> tuple[TrainConfig, Memory]:
    """The config that fits, as little partitioned, recomputed and chunked as can be; or the one that is given."""
    from fastclip.training.config import TrainConfig
    from fastclip.training.fit import RECOMPUTES, cheapest
    from fastclip.training.plan import memory
    from fastclip.training.recipes import get_recipe

    if options.core_rate <= 0:
        raise UserError(f"--core-rate must be above 0, was {options.core_rate:g}")
    if options.gpus < 1 or options.global_batch % options.gpus:
        raise UserError(f"--global-batch must be a multiple of --gpus, was {options.global_batch} of {options.gpus}")
    base = get_recipe(options.recipe) if options.recipe else TrainConfig()
    if not options.recipe:
        base = replace(base, model=options.model, global_batch=options.global_batch)
    base = replace(base, engine="deepspeed", precision=options.precision, chunk_size=options.chunk_size)
    tokens = options.text_tokens or None
    if options.chunk_size and options.zero_stage >= 0 and options.recompute != "auto":
        config = replace(base, zero_stage=options.zero_stage, recompute=options.recompute)
        return config, memory(config, options.gpus, tokens)
    stages = [options.zero_stage] if options.zero_stage >= 0 else [1, 2, 3]
    recomputes = RECOMPUTES if options.recompute == "auto" else (options.recompute,)
    return cheapest(base, options.gpus, options.memory * GB, stages, recomputes, tokens)
