"""Gradient caching: the gradient of one huge batch, in the memory of one chunk (Gao et al. 2021, arXiv 2101.06983).

    pass 1   embeddings of every chunk without a graph          e_k = f(x_k)
    loss     once, on all embeddings as leaves                  L(e_1 .. e_n),  g_k = dL / de_k
    pass 2   every chunk again, with the surrogate              d/dw sum_k <f(x_k; w), g_k> = dL / dw

The last chunk keeps its graph from pass 1 and is not computed again: with n chunks (n - 1) / n of the batch is
forwarded twice instead of all of it, at the same peak memory, and a batch of one chunk costs what a plain step costs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

Outputs = dict[str, Tensor]


class GradCache:
    """One optimizer step's gradient, exactly that of the whole batch, chunk by chunk.

    Args:
        towers: callables by name. A tower takes its chunk (a tensor or packed captions; a tuple as *args, a dict as
            **kwargs) and returns a tensor (B, ...), which the loss receives under the tower's name, or a dict of
            tensors, which it receives under their own names. A 0-dim output (such as the exponentiated `logit_scale`)
            is shared: the loss gets the first chunk's, and its gradient is applied once. A module without trained
            parameters (a locked tower) is forwarded once.
        loss_fn: called once a step as loss_fn(**outputs, **loss_inputs) on fp32 leaves outside autocast; a scalar.
            Parameters it uses itself receive their gradient from it directly.
        chunk_size: samples a chunk, or one figure for each tower.
        group: process group whose ranks must make the same number of forwards and backwards (ZeRO, DDP and FSDP wait
            for each other in them). A rank with fewer chunks repeats its last one with a gradient of zero.
        backward: called with each fp32 scalar surrogate instead of surrogate.backward(); an engine's.
        boundary: called with is_last before each backward; where an engine learns which one ends the step.
        device: where the chunks go, one at a time, so that the inputs may stay in (pinned) host memory. Default: where
            the inputs are.

    A tower that is a DDP or FSDP2 module, a bound method of one or a `functools.partial` of either reduces its gradient
    over the ranks once, in its last backward. (Hidden in another function it does so in every backward: as exact.)

    Batch norm normalises each chunk by itself, so its gradient is that of the chunked batch, not of the whole one: use
    layer norm, or lock it. Its running statistics move once for each chunk of a tower that is such a module; a tower
    hidden in a function says so with `statistics_held`.

    Source: the gradient cache of luyug/GradCache, with one surrogate a chunk, replayed random numbers on every device
    and the last graph kept.
    """

    def __init__(
        self,
        towers: Mapping[str, Callable[..., Any]],
        loss_fn: Callable[..., Tensor],
        chunk_size: int | Mapping[str, int],
        group: dist.ProcessGroup | None = None,
        backward: Callable[[Tensor], None] | None = None,
        boundary: Callable[[bool], None] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = dict(chunk_size) if isinstance(chunk_size, Mapping) else dict.fromkeys(towers, chunk_size)
        if sizes.keys() != towers.keys():
            raise ValueError(f"chunk_size names {sorted(sizes)}, towers are {sorted(towers)}: they must be the same")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"chunk_size of {name} must be at least 1, was {size}")
        self.towers, self.loss_fn, self.chunk_sizes, self.group = dict(towers), loss_fn, sizes, group
        self.device = None if device is None else torch.device(device)
        self._backward = backward or torch.Tensor.backward
        self._boundary = boundary or (lambda is_last: None)

    def step(self, inputs: Mapping[str, Any], **loss_inputs: Any) -> Tensor:
        """Accumulates the gradient of the batch in the parameters and returns the loss, detached.

        Args:
            inputs: by tower name: a tensor (B, ...), packed captions (a dataclass with tokens, cu_seqlens and
                max_seqlen), a tuple or dict of such, or a list: the chunks, ready made.
            loss_inputs: further keyword arguments of the loss.

        Raises:
            ValueError: inputs that do not name the towers, are empty or of several lengths; on every rank of the group
                if on one.
        """
        calls = self._calls(inputs)
        trained = [call for call in calls if call.is_trained]
        kept = trained[-1] if trained else None
        # The kept graph is freed first, so that never more than one chunk's activations are alive.
        order = [] if kept is None else [kept, *trained[:-1]]
        last_of = {call.reducer: call for call in order}
        for call in calls:
            if call is kept:
                call.forward(is_last=last_of[call.reducer] is call)
            else:
                call.forward_without_graph()
        leaves = {name: leaf.requires_grad_() for name, leaf in _joined(calls).items()}
        with _no_autocast(leaves):
            loss = self.loss_fn(**leaves, **loss_inputs)
            loss.backward()
        _hand_out_gradients(calls, leaves)
        for call in order:
            if call.results is None:
                call.forward_again(is_last=last_of[call.reducer] is call)
            self._boundary(call is order[-1])
            self._backward(call.surrogate())
        return loss.detach()

    def _calls(self, inputs: Mapping[str, Any]) -> list[_Call]:
        """Tower by tower, as many on every rank of the group."""
        chunks: dict[str, list[Any]] = {}
        mistake = None
        try:
            if inputs.keys() != self.towers.keys():
                names = f"inputs name {sorted(inputs)}, towers are {sorted(self.towers)}"
                raise ValueError(f"{names}: they must be the same")
            chunks = {name: _split(inputs[name], self.chunk_sizes[name], name) for name in self.towers}
        except ValueError as error:
            mistake = error
        counts = {name: len(chunks.get(name, ())) for name in self.towers}
        if self.group is not None:
            device = _device_of(self.group)
            agreed = torch.tensor([mistake is not None, *counts.values()], device=device, dtype=torch.int64)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self.group)
            has_mistake, *most = agreed.tolist()
            counts = dict(zip(counts, most, strict=True))
            if has_mistake and mistake is None:
                mistake = ValueError("the inputs of another rank are wrong: see its message")
        if mistake is not None:
            raise mistake
        return [
            _Call(name, tower, chunks[name][min(place, len(chunks[name]) - 1)], self.device, place >= len(chunks[name]))
            for name, tower in self.towers.items()
            for place in range(counts[name])
        ]


@contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Within, batch norm in training mode normalises by its batch and leaves its running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class _Call:
    """One tower on one chunk: its inputs, random state, outputs and their gradients."""

    def __init__(
        self, name: str, tower: Callable[..., Any], chunk: Any, device: torch.device | None, is_filler: bool
    ) -> None:
        self.name, self.tower, self.chunk, self.device = name, tower, chunk, device
        self.is_filler = is_filler  # keeps step with ranks that have more chunks: no part of the batch
        self.module = _module_of(tower)
        self.reducer = id(self.module or tower)  # two towers may be methods of one module
        self.is_trained = self.module is None or any(p.requires_grad for p in self.module.parameters())
        self.random: list[Any] = []
        self.outputs: Outputs = {}
        self.results: Outputs | None = None
        self.gradients: Outputs = {}

    def forward(self, is_last: bool) -> None:
        """With a graph; is_last: of its module's in the step."""
        self._forward_with_graph(is_last)
        assert self.results is not None
        self.outputs = {name: _at_least_fp32(value.detach()) for name, value in self.results.items()}

    def forward_without_graph(self) -> None:
        held = statistics_held(self.module) if self.module is not None and self.is_trained else nullcontext()
        self.random = self._random_states()
        with torch.no_grad(), held:
            self.outputs = {name: _at_least_fp32(value) for name, value in self._run().items()}

    def forward_again(self, is_last: bool) -> None:
        """With a graph and the random numbers of the first time; the generators then go on where they were."""
        now = self._random_states()
        _set_random_states(self.random)
        self._forward_with_graph(is_last)
        _set_random_states(now)

    def surrogate(self) -> Tensor:
        """sum over the outputs of <output, gradient>, in fp32; frees the graph's last reference but its own."""
        assert self.results is not None
        terms = [(_at_least_fp32(value) * self.gradients[name]).sum() for name, value in self.results.items()]
        self.results = None
        return torch.stack(terms).sum()

    def _forward_with_graph(self, is_last: bool) -> None:
        if self.module is not None:
            _reduce_in_backward(self.module, is_last)
        self.results = self._run()

    def _run(self) -> Outputs:
        chunk = self.chunk if self.device is None else _moved(self.chunk, self.device)
        if isinstance(chunk, tuple):
            result = self.tower(*chunk)
        elif isinstance(chunk, dict):
            result = self.tower(**chunk)
        else:
            result = self.tower(chunk)
        return dict(result) if isinstance(result, Mapping) else {self.name: result}

    def _random_states(self) -> list[Any]:
        """The random state of the CPU and of every GPU that the tower may draw from."""
        devices = {x.device for x in _tensors(self.chunk)} | ({self.device} if self.device else set())
        if torch.cuda.is_initialized():  # a tower may move its chunk itself
            devices.add(torch.device("cuda", torch.cuda.current_device()))
        return [torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}]


def _module_of(tower: Callable[..., Any]) -> nn.Module | None:
    """The module that the tower is, or whose method it is; None for a function."""
    while isinstance(tower, functools.partial):
        tower = tower.func
    tower = getattr(tower, "__self__", tower)
    return tower if isinstance(tower, nn.Module) else None


def _reduce_in_backward(module: nn.Module, is_last: bool) -> None:
    """Tells what wraps the module (DDP, FSDP2) whether the next backward reduces the gradient over the ranks."""
    part: Any
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            part.require_backward_grad_sync = is_last
        elif hasattr(part, "set_requires_gradient_sync"):  # FSDPModule, whose import takes half a second
            part.set_requires_gradient_sync(is_last, recurse=False)
            part.set_is_last_backward(is_last)


def _is_packed(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and hasattr(batch, "cu_seqlens")


def _split(batch: Any, size: int, name: str) -> list[Any]:
    """The chunks of a batch, along its first dimension."""
    if isinstance(batch, list):
        chunks = batch
    elif isinstance(batch, Tensor):
        chunks = list(batch.split(size)) if len(batch) else []
    elif isinstance(batch, tuple):
        chunks = list(zip(*_columns(batch, size, name), strict=True))
    elif isinstance(batch, dict):
        rows = zip(*_columns(tuple(batch.values()), size, name), strict=True)
        chunks = [dict(zip(batch, row, strict=True)) for row in rows]
    elif _is_packed(batch):
        chunks = list(_packed_chunks(batch, size))
    else:
        raise ValueError(
            f"the inputs of {name} must be a tensor, packed captions, a tuple or dict of them, or a list of chunks, "
            f"was {type(batch).__name__}"
        )
    if not chunks:
        raise ValueError(f"the inputs of {name} are empty")
    return chunks


def _columns(parts: tuple[Any, ...], size: int, name: str) -> list[list[Any]]:
    columns = [_split(part, size, name) for part in parts]
    lengths = sorted({len(part) for part in parts if not isinstance(part, (tuple, dict, list))})
    if len(lengths) > 1 or len({len(column) for column in columns}) > 1:
        raise ValueError(f"the inputs of {name} must have one number of samples, have {lengths}")
    return columns


def _packed_chunks(batch: Any, size: int) -> Iterator[Any]:
    """Captions laid end to end, `size` of them at a time."""
    edges = batch.cu_seqlens.tolist()
    for first in range(0, len(edges) - 1, size):
        own = edges[first : first + size + 1]
        yield dataclasses.replace(
            batch,
            tokens=batch.tokens[own[0] : own[-1]],
            cu_seqlens=batch.cu_seqlens[first : first + size + 1] - own[0],
            max_seqlen=max(end - start for start, end in pairwise(own)),
        )


def _joined(calls: list[_Call]) -> Outputs:
    """The outputs of all chunks as one tensor a name; a shared (0-dim) output is the first chunk's."""
    own = [call for call in calls if not call.is_filler]
    joined = {}
    for name in dict.fromkeys(name for call in own for name in call.outputs):
        parts = [call.outputs[name] for call in own if name in call.outputs]
        joined[name] = parts[0].clone() if parts[0].dim() == 0 else torch.cat(parts)
    return joined


def _hand_out_gradients(calls: list[_Call], leaves: Outputs) -> None:
    """Each chunk gets its rows of the leaves' gradients; a shared output's goes to its last trained chunk alone."""
    for call in calls:
        call.gradients = {name: torch.zeros_like(value) for name, value in call.outputs.items()}
    own = [call for call in calls if not call.is_filler]
    for name, leaf in leaves.items():
        if leaf.grad is None:
            continue
        owners = [call for call in own if name in call.outputs]
        if leaf.dim() == 0:
            ([call for call in owners if call.is_trained] or owners)[-1].gradients[name] = leaf.grad
        else:
            parts = leaf.grad.split([len(call.outputs[name]) for call in owners])
            for call, part in zip(owners, parts, strict=True):
                call.gradients[name] = part


def _tensors(chunk: Any) -> list[Tensor]:
    if isinstance(chunk, Tensor):
        return [chunk]
    parts = vars(chunk) if _is_packed(chunk) else chunk
    values = parts.values() if isinstance(parts, dict) else parts if isinstance(parts, (tuple, list)) else ()
    return [x for value in values for x in _tensors(value)]


def _moved(chunk: Any, device: torch.device) -> Any:
    if isinstance(chunk, (tuple, list)):
        return type(chunk)(_moved(part, device) for part in chunk)
    if isinstance(chunk, dict):
        return {name: _moved(part, device) for name, part in chunk.items()}
    return chunk.to(device, non_blocking=True) if isinstance(chunk, Tensor) or _is_packed(chunk) else chunk


def _set_random_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    for device, state in states[1].items():
        torch.cuda.set_rng_state(state, device)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's small collectives take place."""
    on_cpu = "gloo" in dist.get_backend(group) or not torch.cuda.is_available()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _no_autocast(leaves: Outputs) -> Any:
    kind = next(iter(leaves.values())).device.type if leaves else "cpu"
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
