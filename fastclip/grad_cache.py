"""Gradient caching: the gradient of one huge batch, in the memory of one chunk (Gao et al. 2021, arXiv 2101.06983).

    pass 1   embeddings of every chunk without a graph          e_k = f(x_k)
    loss     once, on all embeddings as leaves                  L(e_1 .. e_n),  g_k = dL / de_k
    pass 2   every chunk again, with the surrogate              d/dw sum_k <f(x_k; w), g_k> = dL / dw

The last chunk keeps its graph from pass 1 and is not computed again: with n chunks (n - 1) / n of the batch is
forwarded twice instead of all of it, at the same peak memory, and a batch of one chunk costs what a plain step costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Outputs = dict[str, Tensor]


class GradCache:
    """One optimizer step's gradient, exactly that of the whole batch, chunk by chunk.

    Args:
        towers: callables by name. A tower takes its chunk (a tensor, a tuple as *args, a dict as **kwargs) and returns
            a tensor (B, ...), which the loss receives under the tower's name, or a dict of tensors, which it receives
            under their own names. A 0-dim output (such as the exponentiated `logit_scale`) is shared: the loss gets the
            first chunk's, and its gradient is applied once.
        loss_fn: called once a step as loss_fn(**outputs, **loss_inputs) on fp32 leaves outside autocast; a scalar.
            Parameters it uses itself receive their gradient from it directly.
        chunk_size: samples a chunk, or one figure for each tower.
        group: process group whose ranks must make the same number of chunks (ZeRO counts forwards and backwards).
        backward: called with each fp32 scalar surrogate instead of surrogate.backward(); an engine's.
        boundary: called with is_last before each backward; where an engine learns which one ends the step.

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
    ) -> None:
        sizes = dict(chunk_size) if isinstance(chunk_size, Mapping) else dict.fromkeys(towers, chunk_size)
        if sizes.keys() != towers.keys():
            raise ValueError(f"chunk_size names {sorted(sizes)}, towers are {sorted(towers)}: they must be the same")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"chunk_size of {name} must be at least 1, was {size}")
        self.towers, self.loss_fn, self.chunk_sizes, self.group = dict(towers), loss_fn, sizes, group
        self._backward = backward or torch.Tensor.backward
        self._boundary = boundary or (lambda is_last: None)

    def step(self, inputs: Mapping[str, Any], **loss_inputs: Any) -> Tensor:
        """Accumulates the gradient of the batch in the parameters and returns the loss, detached.

        Args:
            inputs: by tower name: a tensor (B, ...), or a tuple or dict of them.
            loss_inputs: further keyword arguments of the loss.

        Raises:
            ValueError: inputs that do not name the towers, are empty, or make unequal numbers of chunks across ranks.
        """
        if inputs.keys() != self.towers.keys():
            raise ValueError(f"inputs name {sorted(inputs)}, towers are {sorted(self.towers)}: they must be the same")
        calls = [
            _Call(name, tower, chunk)
            for name, tower in self.towers.items()
            for chunk in _split(inputs[name], self.chunk_sizes[name], name)
        ]
        self._check_chunk_count(len(calls), _tensors(calls[0].chunk)[0].device)
        for call in calls[:-1]:
            call.forward_without_graph()
        calls[-1].forward()
        leaves = {name: leaf.requires_grad_() for name, leaf in _joined(calls).items()}
        with _no_autocast(leaves):
            loss = self.loss_fn(**leaves, **loss_inputs)
            loss.backward()
        _hand_out_gradients(calls, leaves)
        # The kept graph is freed first, so that never more than one chunk's activations are alive.
        for position, call in enumerate((calls[-1], *calls[:-1])):
            if call.results is None:
                call.forward_again()
            self._boundary(position == len(calls) - 1)
            self._backward(call.surrogate())
        return loss.detach()

    def _check_chunk_count(self, count: int, device: torch.device) -> None:
        if self.group is None:
            return
        counts = torch.tensor([count, -count], device=device)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=self.group)
        most, least = counts[0].item(), -counts[1].item()
        if most != least:
            raise ValueError(
                f"every rank must make the same number of chunks, this one makes {count}, others {least} to {most}: "
                "give each rank the same number of samples"
            )


class _Call:
    """One tower on one chunk: its inputs, random state, outputs and their gradients."""

    def __init__(self, name: str, tower: Callable[..., Any], chunk: Any) -> None:
        self.name, self.tower, self.chunk = name, tower, chunk
        self.random: list[Any] = []
        self.outputs: Outputs = {}
        self.results: Outputs | None = None
        self.gradients: Outputs = {}

    def forward(self) -> None:
        """With a graph."""
        self.results = self._run()
        self.outputs = {name: _at_least_fp32(value.detach()) for name, value in self.results.items()}

    def forward_without_graph(self) -> None:
        self.random = _random_states(self.chunk)
        with torch.no_grad():
            self.outputs = {name: _at_least_fp32(value) for name, value in self._run().items()}

    def forward_again(self) -> None:
        """With a graph and the random numbers of the first time; the generators then go on where they were."""
        now = _random_states(self.chunk)
        _set_random_states(self.random)
        self.results = self._run()
        _set_random_states(now)

    def surrogate(self) -> Tensor:
        """sum over the outputs of <output, gradient>, in fp32; frees the graph's last reference but its own."""
        assert self.results is not None
        terms = [(_at_least_fp32(value) * self.gradients[name]).sum() for name, value in self.results.items()]
        self.results = None
        return torch.stack(terms).sum()

    def _run(self) -> Outputs:
        if isinstance(self.chunk, tuple):
            result = self.tower(*self.chunk)
        elif isinstance(self.chunk, dict):
            result = self.tower(**self.chunk)
        else:
            result = self.tower(self.chunk)
        return dict(result) if isinstance(result, Mapping) else {self.name: result}


def _split(batch: Any, size: int, name: str) -> list[Any]:
    """A tensor, or a tuple or dict of tensors, in chunks along the first dimension."""
    if isinstance(batch, Tensor):
        if len(batch) == 0:
            raise ValueError(f"the inputs of {name} are empty")
        return list(batch.split(size))
    if isinstance(batch, tuple):
        return list(zip(*(_split(part, size, name) for part in batch), strict=True))
    if isinstance(batch, dict):
        columns = {key: _split(part, size, name) for key, part in batch.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    raise ValueError(
        f"the inputs of {name} must be a tensor, or a tuple or dict of tensors, was {type(batch).__name__}"
    )


def _joined(calls: list[_Call]) -> Outputs:
    """The outputs of all chunks as one tensor a name; a shared (0-dim) output is the first chunk's."""
    names = dict.fromkeys(name for call in calls for name in call.outputs)
    joined = {}
    for name in names:
        parts = [call.outputs[name] for call in calls if name in call.outputs]
        joined[name] = parts[0].clone() if parts[0].dim() == 0 else torch.cat(parts)
    return joined


def _hand_out_gradients(calls: list[_Call], leaves: Outputs) -> None:
    """Each chunk gets its rows of the leaves' gradients; a shared output's goes to the last chunk alone."""
    for name, leaf in leaves.items():
        owners = [call for call in calls if name in call.outputs]
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if leaf.dim() == 0:
            for call in owners:
                call.gradients[name] = gradient if call is owners[-1] else torch.zeros_like(gradient)
        else:
            parts = gradient.split([len(call.outputs[name]) for call in owners])
            for call, part in zip(owners, parts, strict=True):
                call.gradients[name] = part


def _tensors(chunk: Any) -> list[Tensor]:
    parts = chunk.values() if isinstance(chunk, dict) else chunk if isinstance(chunk, tuple) else (chunk,)
    return [part for part in parts if isinstance(part, Tensor)]


def _random_states(chunk: Any) -> list[Any]:
    """The random state of the CPU and of every GPU the chunk lies on."""
    devices = {x.device for x in _tensors(chunk) if x.is_cuda}
    return [torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}]


def _set_random_states(states: list[Any]) -> None:
    torch.set_rng_state(states[0])
    for device, state in states[1].items():
        torch.cuda.set_rng_state(state, device)


def _no_autocast(leaves: Outputs) -> Any:
    kind = next(iter(leaves.values())).device.type if leaves else "cpu"
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
