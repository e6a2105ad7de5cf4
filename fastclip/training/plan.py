"""What a run will need before it is started: memory of a rank, traffic and time of a step, from one GPU to thousands.

Memory is counted, not fitted: weights, gradients and optimizer by the arithmetic of the ZeRO stage; the activations of
a chunk are measured here on two small copies of the model, of two blocks and of three, and extended to its depth. Time
is an alpha-beta model: a collective of W ranks takes alpha * hops + bytes / bandwidth.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastclip.errors import UserError
from fastclip.models import CLIPConfig, create_model
from fastclip.training.config import TrainConfig
from fastclip.training.model import model_of

BUCKET = 500_000_000  # figures, DeepSpeed's reduce_bucket_size
LIVE = 1_000_000_000  # figures, its stage3_max_live_parameters
STATES = {"adamw": 2, "lamb": 2, "stableadamw": 2, "lion": 1, "muon": 2}  # fp32 figures a parameter, at most
DEPTHS = (2, 3)  # blocks of the two copies; the last block of a model differs from the others
SAMPLES = (2, 4)  # pairs of the two measurements in a chunk


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages made within and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known | self._alive:
                storage = x.untyped_storage()
                self._alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the peak of a step, by what takes them."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float  # of the reduction
    activations: float  # of a chunk
    features: float  # of all ranks, and their gradients
    late: float  # of the gradients, what comes in the place of activations: all of a single chunk's, or a bucket
    pixels: float = 0.0  # of the rank's batch, where the GPU decodes them; else they come a chunk at a time

    @property
    def total(self) -> float:
        kept = self.weights + self.gradients - self.late + self.optimizer + self.pixels
        return kept + max(self.late + self.buffers, self.activations + self.features)


def memory(
    config: TrainConfig, world_size: int, text_tokens: float | None = None, model: CLIPConfig | None = None
) -> Memory:
    """The peak of a rank in a step of `config`.

    text_tokens: of a caption on average, start and end included; default: as many as fit. model: in place of the
    config's.
    """
    model = model or model_of(config)
    _check(model)
    count = float(parameters(model))
    local = config.global_batch // world_size
    chunk = min(config.chunk_size or local, local)
    width = 4 if config.precision == "fp32" else 2
    row = 2 * 4 * model.embed_dim  # both towers' features of a pair
    features = row * (4 * local + 3 * config.global_batch)
    activations = chunk_activations(model, config.precision, chunk, text_tokens, config.recompute)
    states = 4 * count * STATES[config.optimizer]
    pixels = 3.0 * model.vision.image_size**2 * local * config.gpu_decode
    is_single = chunk == local
    if config.engine == "torch":
        # The reduction joins all gradients in a copy.
        flat, late = 8 * count if world_size > 1 else 0.0, 4 * count * is_single
        return Memory(4 * count, 4 * count, states, flat, activations, features, late, pixels)
    share = 1 / world_size
    master = 0.0 if width == 4 and config.zero_stage == 0 else 4 * count
    whole, bucket = width * count, width * min(BUCKET, count)
    if config.zero_stage == 0:
        return Memory(whole + master, whole, states, bucket, activations, features, whole * is_single, pixels)
    part = whole * share
    is_whole = config.reduction != "boundary" or config.zero_stage == 1
    gradients = whole if is_whole else bucket + part
    weights = whole
    if config.zero_stage == 3:  # its own part of both, the weights that it has gathered, and a bucket that it keeps
        gradients, weights = gradients + (part + bucket) * is_whole, part + width * min(LIVE, count)
    late = whole * is_single if is_whole else bucket
    return Memory(weights + master * share, gradients, states * share, 2 * part, activations, features, late, pixels)


def _check(model: CLIPConfig) -> None:
    if model.decoder is not None:
        raise UserError("memory and time of a decoder of captions are not planned yet: leave --fit out, or try chunks")


@cache
def parameters(model: CLIPConfig) -> int:
    """Of both towers."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(model).parameters())


def chunk_activations(
    model: CLIPConfig, precision: str, chunk: int, text_tokens: float | None = None, recompute: str = "none"
) -> float:
    """Bytes alive at the peak of a chunk's forward and backward pass beside weights and gradients.

    Linear in the number of pairs and of blocks, so measured at two of each.
    """
    length = min(model.text.context_length, round(text_tokens or model.text.context_length))
    blocks = _blocks(model)
    peaks = {
        (depth, pairs): _peak(_shallow(model, depth), precision, pairs, length, recompute)
        for depth in (DEPTHS if blocks else (0,))
        for pairs in SAMPLES
    }

    def at(pairs: int, depth: int) -> float:
        low, high = (peaks[depth, n] for n in SAMPLES)
        return low + (high - low) * (pairs - SAMPLES[0]) / (SAMPLES[1] - SAMPLES[0])

    if not blocks:
        return at(chunk, 0)
    low, high = DEPTHS
    return at(chunk, low) + (at(chunk, high) - at(chunk, low)) * (blocks - low)


def _blocks(model: CLIPConfig) -> int:
    """Of the deeper tower; 0 for a ResNet, which is measured as it is."""
    return 0 if model.vision.is_resnet else max(int(model.vision.layers), model.text.layers)  # type: ignore[arg-type]


def _shallow(model: CLIPConfig, depth: int) -> CLIPConfig:
    """The model with `depth` of its deeper tower's blocks, and the other tower's share of them."""
    if not depth:
        return model
    return replace(model, vision=replace(model.vision, layers=depth), text=replace(model.text, layers=depth))


@cache
def _peak(model: CLIPConfig, precision: str, pairs: int, length: int, recompute: str = "none") -> int:
    """Measured here, on the CPU."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = create_model(model)
        size = model.vision.image_size
        image = torch.randn(pairs, 3, size, size)
        text = torch.zeros(pairs, model.text.context_length, dtype=torch.int64)
        text[:, : length - 1], text[:, length - 1] = 1, model.text.vocab_size - 1
    clip.set_recompute(recompute)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    clip, image = clip.to(dtype), image.to(dtype)

    def run() -> None:
        image_features, text_features, scale = clip(image, text)[:3]
        (image_features.float() * text_features.float() * scale).sum().backward()

    run()  # makes the gradients
    with LiveBytes() as live:
        run()
    return live.peak


@dataclass(frozen=True)
class Machine:
    """One rank, and how ranks reach each other."""

    flops: float = 400e12  # a second, of a training step's products
    memory: float = 80e9  # bytes
    ranks_per_node: int = 8
    node_bandwidth: float = 300e9  # bytes a second and rank within a node
    network_bandwidth: float = 25e9  # bytes a second and rank between nodes
    latency: float = 10e-6  # seconds a hop


@dataclass(frozen=True)
class Traffic:
    """Seconds of a step, by what takes them; nothing overlaps."""

    compute: float
    features: float
    gradients: float
    weights: float

    @property
    def total(self) -> float:
        return self.compute + self.features + self.gradients + self.weights


def step_time(config: TrainConfig, world_size: int, machine: Machine, is_ring: bool = False) -> Traffic:
    """Of an optimizer step.

    is_ring: the loss passes features round (W - 1 hops, memory of two ranks' features) instead of gathering them.
    """
    model = model_of(config)
    _check(model)
    local = config.global_batch // world_size
    chunk = min(config.chunk_size or local, local)
    chunks = -(-local // chunk)
    count, width = parameters(model), 4 if config.precision == "fp32" else 2
    products = 2.0 * local * _products(model)
    # A forward, a backward twice as long, and the forwards that are done again.
    passes = 3 + (chunks - 1) / chunks + (config.recompute == "full")
    loss = 3 * 2 * 2.0 * local * config.global_batch * model.embed_dim
    row = 2 * 4 * model.embed_dim
    moved = row * config.global_batch
    hops = world_size - 1 if is_ring else math.ceil(math.log2(max(2, world_size)))
    forwards = 2 * chunks - 1
    gathers = (forwards + chunks) if config.engine == "deepspeed" and config.zero_stage == 3 else 0
    reductions = chunks if config.reduction == "boundary" else 1
    sent = width * count * reductions
    return Traffic(
        compute=(passes * products + loss) / machine.flops,
        features=_collective(2 * moved, hops, world_size, machine),
        gradients=_collective(2 * sent, math.ceil(math.log2(max(2, world_size))), world_size, machine),
        weights=gathers * _collective(width * count, math.ceil(math.log2(max(2, world_size))), world_size, machine),
    )


def _collective(size: float, hops: int, world_size: int, machine: Machine) -> float:
    """Seconds in which `size` bytes (whole, not a rank's part) come to every rank: alpha * hops + beta * bytes."""
    if world_size == 1:
        return 0.0
    is_one_node = world_size <= machine.ranks_per_node
    bandwidth = machine.node_bandwidth if is_one_node else machine.network_bandwidth
    return machine.latency * hops + size * (world_size - 1) / world_size / bandwidth


@cache
def _products(model: CLIPConfig) -> float:
    """Multiply-adds of a pair's forward pass: the parameters of each tower once for each of its tokens."""
    with torch.device("meta"):
        clip = create_model(model)
    image = sum(p.numel() for name, p in clip.named_parameters() if name.startswith("visual.") and p.ndim > 1)
    text = sum(
        p.numel() for name, p in clip.named_parameters() if "transformer." in name and not name.startswith("vis")
    )
    patches = 1 if model.vision.is_resnet else (model.vision.image_size // model.vision.patch_size) ** 2 + 1
    kept = max(1, round(patches * (1 - model.vision.patch_dropout)))
    return image * kept + text * model.text.context_length
