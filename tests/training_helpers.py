"""What the tests of the training room share: an engine under a small model, small data, runs of the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contrastive_loss_helpers import free_port
from data_helpers import WORDS, write_samples
from torch import Tensor

from fastclip.data import normalize_image, train_tokenizer
from fastclip.grad_cache import GradCache
from fastclip.losses import contrastive_loss
from fastclip.models import CLIP, create_model, get_config
from fastclip.training.config import TrainConfig
from fastclip.training.deepspeed_config import resolve_deepspeed
from fastclip.training.engine import Engine, MakeOptimizer, StepResult, build_engine
from fastclip.training.loop import Loss, build_grad_cache
from fastclip.training.optim import parameter_groups
from fastclip.training.processes import Processes, start_processes

MODEL, BATCH, CHUNK = "debug", 16, 3
ENGINES = (("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3))
State = dict[str, Tensor]


def this_rank() -> Processes:
    """Inside `run_on_ranks`, with its share of the cores."""
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    return start_processes()


def global_batches(count: int, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Random images and captions of every length up to 30 tokens, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        image = torch.randint(0, 256, (size, 3, 64, 64), generator=generator, dtype=torch.uint8)
        text = torch.randint(1, 1000, (size, 32), generator=generator)
        lengths = torch.randint(2, 31, (size, 1), generator=generator)
        place = torch.arange(32)
        text = torch.where(place < lengths, text, torch.where(place == lengths, 1023, 0))
        batches.append((image, text))
    return batches


def debug_model() -> CLIP:
    torch.manual_seed(0)
    return create_model(MODEL)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Plain SGD, whose weights show every error of the gradient; Adam's hide its scale."""
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.05)


def whole_batch(
    steps: int,
    size: int = BATCH,
    make_optimizer: MakeOptimizer = sgd,
    dtype: torch.dtype = torch.float64,
    is_reordered: bool = False,
) -> tuple[State, list[float]]:
    """Weights and gradient norms of autograd on whole batches in one process.

    is_reordered: the pairs of each batch stand in another order, which changes nothing but the rounding of sums.
    """
    config, model = get_config(MODEL), debug_model().to(dtype)
    optimizer, norms = make_optimizer(parameter_groups(model, TrainConfig(model=MODEL))), []
    for image, text in global_batches(steps, size):
        order = torch.randperm(size) if is_reordered else torch.arange(size)
        pixels, text = normalize_image(image[order], config.image_mean, config.image_std, dtype), text[order]
        optimizer.zero_grad()
        contrastive_loss(**model(pixels, text, output_dict=True)).backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}, norms


def without_key_biases(state: State) -> State:
    """Softmax does not see them, so that their gradient is nothing but rounding, which Adam makes as large as any."""
    return {
        name: torch.cat((value.chunk(3)[0], value.chunk(3)[2])) if name.endswith("in_proj_bias") else value
        for name, value in state.items()
    }


def error(ours: State, truth: State) -> float:
    """Relative L2 over all parameters."""
    assert ours.keys() == truth.keys()
    difference = sum(float((ours[k].double() - truth[k].double()).square().sum()) for k in truth)
    return (difference / sum(float(truth[k].double().square().sum()) for k in truth)) ** 0.5


@dataclass
class Small:
    """An engine over the small model on this rank, and its gradient cache."""

    processes: Processes
    engine: Engine
    cache: GradCache
    global_batch: int = BATCH

    def steps(self, count: int, first: int = 0, order: int | None = None) -> list[tuple[float, StepResult]]:
        """order: a seed that the pairs of each batch are shuffled by."""
        n = self.global_batch // self.processes.world_size
        own, results = slice(self.processes.rank * n, (self.processes.rank + 1) * n), []
        for image, text in global_batches(first + count, self.global_batch)[first:]:
            rows = torch.arange(self.global_batch)
            if order is not None:
                rows = torch.randperm(self.global_batch, generator=torch.Generator().manual_seed(order))
            loss = self.cache.step({"clip": (image[rows[own]], text[rows[own]])})
            results.append((float(loss), self.engine.step(1.0)))
        return results


def small(
    processes: Processes,
    kind: str,
    stage: int,
    zero: dict[str, Any] | None = None,
    weights: State | None = None,
    make_optimizer: MakeOptimizer | None = sgd,
    **options: Any,
) -> Small:
    """The engine `kind` at `stage`, under plain SGD unless `options` name an optimizer; `zero` is DeepSpeed's JSON."""
    make_optimizer = None if "optimizer" in options else make_optimizer
    config = TrainConfig(
        **{"engine": kind, "zero_stage": stage, "global_batch": BATCH, "chunk_size": CHUNK, "precision": "fp32"}
        | options
    )
    config, ds_config, _ = resolve_deepspeed(config, processes.world_size)
    ds_config["zero_optimization"] |= zero or {}
    model = debug_model()
    model.set_recompute(config.recompute)
    if weights:
        model.load_state_dict(weights)
    engine = build_engine(model, config, processes, ds_config if kind == "deepspeed" else None, make_optimizer)
    cache = build_grad_cache(config, get_config(MODEL), engine, processes, Loss(config, processes))
    return Small(processes, engine, cache, config.global_batch)


def errors_of_engines(
    make: Callable[[], CLIP],
    loss: Callable[..., Tensor],
    engines: Sequence[tuple[str, int]] = ENGINES,
    steps: int = 3,
    **options: Any,
) -> dict[str, float]:
    """Of each engine, in chunks, the relative error of the weights behind `steps` of SGD; the truth is autograd of
    loss(**outputs) on whole batches in one process, in fp64."""
    processes, found = this_rank(), {}
    truth = make().double()
    clip = truth.config
    optimizer = sgd(parameter_groups(truth, TrainConfig(model=MODEL)))
    for image, text in global_batches(steps):
        optimizer.zero_grad()
        pixels = normalize_image(image, clip.image_mean, clip.image_std, torch.float64)
        loss(**truth(pixels, text, output_dict=True)).backward()
        optimizer.step()
    n = BATCH // processes.world_size
    own = slice(processes.rank * n, (processes.rank + 1) * n)
    for kind, stage in engines:
        config = TrainConfig(
            **{"model": MODEL, "global_batch": BATCH, "chunk_size": CHUNK, "precision": "fp32"} | options,
            engine=kind,
            zero_stage=stage,
        )
        _, ds_config, _ = resolve_deepspeed(config, processes.world_size)
        model = make()
        model.set_recompute(config.recompute)
        engine = build_engine(model, config, processes, ds_config if kind == "deepspeed" else None, sgd)
        cache = build_grad_cache(config, clip, engine, processes, Loss(config, processes))
        for image, text in global_batches(steps):
            cache.step({"clip": (image[own], text[own])})
            engine.step(1.0)
        state = engine.full_state_dict()
        found[f"{kind}{stage}"] = error(state, truth.state_dict()) if processes.is_first else 0.0
    return found


def small_data(directory: Path, count: int = 64, shards: int = 3, **broken: Any) -> Path:
    """Shards with a tokenizer beside them, no held-out sets; `broken` as for `write_samples`."""
    write_samples(directory, count, shards, **broken)
    train_tokenizer([" ".join(WORDS)] * 3, directory / "tokenizer.json", 600, 32)
    return directory


def options(*folders: Path, **changed: Any) -> list[str]:
    """Command-line options of a run on a folder of data into another that takes a second or two."""
    values: dict[str, Any] = dict(zip(("data", "out"), folders, strict=True)) | {"model": MODEL}
    values |= {"global_batch": BATCH, "chunk_size": 4, "steps": 4, "precision": "fp32", "warmup": 2, "workers": 0}
    values |= changed
    return [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def command(launcher: str, arguments: list[str]) -> list[str]:
    """The process that trains with `arguments`: under python, deepspeed or torchrun, the two last with 2 ranks."""
    python = [sys.executable, "-m"]
    if launcher == "python":
        return [*python, "fastclip.training", *arguments]
    if launcher == "launch":
        return [*python, "fastclip.training.launch", *arguments]
    port = str(free_port())
    if launcher == "deepspeed":
        words = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--module"]
    else:
        words = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m"]
    return [*python, *words, "fastclip.training", *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def run(launcher: str, arguments: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(launcher, arguments), env=environment(), capture_output=True, text=True, timeout=timeout
    )
