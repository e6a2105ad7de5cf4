"""Captions at their true length: packing, and the moves between packed and padded rows.

A causal tower that pools at `text.argmax(-1)` never looks past that position, so a caption's length is argmax + 1 and
the tokens behind it can be left out. Outputs and gradients stay exactly those of the padded batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class PackedText:
    """Captions laid end to end: row b is `tokens[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    A dataclass and not a tuple, so that code that splats tuples into arguments hands it on whole.
    """

    tokens: Tensor  # (T,) token ids
    cu_seqlens: Tensor  # (B + 1,) int32, starts at 0, ends at T
    max_seqlen: int  # the longest caption, or what it may be
    fillers: int = 0  # sequences behind the captions that fill a bucket

    def __len__(self) -> int:
        """Captions, without the fillers."""
        return self.cu_seqlens.numel() - 1 - self.fillers

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedText:
        """The same captions on `device`."""
        return PackedText(
            self.tokens.to(device, non_blocking=non_blocking),
            self.cu_seqlens.to(device, non_blocking=non_blocking),
            self.max_seqlen,
            self.fillers,
        )

    def positions(self) -> Tensor:
        """Position of each token in its own caption: (T,) int64."""
        return offset_in_sequence(self.cu_seqlens, self.tokens.numel())


def caption_ends(ids: Tensor, eos_id: int | None = None) -> Tensor:
    """Where each row of ids (B, L) ends: at its first `eos_id`, or at its first largest id (CLIP's end-of-text)."""
    return (ids if eos_id is None else (ids == eos_id).int()).argmax(dim=1)


def pack_text(ids: Tensor, *, eos_id: int | None = None, bucket: int = 0) -> PackedText:
    """Cut each row behind its end-of-text (see `caption_ends`) and lay the rows end to end.

    ids: (B, L) integer token ids, anything behind end-of-text.
    eos_id: the id of end-of-text; None for the largest of each row. A row without it is cut where such a tower pools.
    bucket: with a size, T is a multiple of it and `max_seqlen` is L, so that a few shapes serve all batches (compiled
        graphs, CUDA graphs). Sequences of zeros fill it up, at least one token each; always the same number of them.
    Costs one device synchronisation on an accelerator; pack in the loader to avoid it.
    """
    if ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(f"ids must be integer token ids of shape (B, L), was {ids.dtype} {tuple(ids.shape)}")
    if bucket < 0:
        raise ValueError(f"bucket must be 0 (none) or a number of tokens, was {bucket}")
    batch, width = ids.shape
    lengths = caption_ends(ids, eos_id) + 1 if width else ids.new_zeros(batch)  # (B,)
    kept = torch.arange(width, device=ids.device) < lengths[:, None]
    tokens = ids[kept]
    if not bucket:
        return PackedText(tokens, _bounds(lengths), int(lengths.max()) if lengths.numel() else 0)
    fillers = max(1, -(-(bucket - 1) // max(1, width - 1)))  # as many as the largest gap takes
    gap = -(tokens.numel() + fillers) % bucket + fillers
    filled = torch.full((fillers,), gap // fillers, device=ids.device)
    filled[: gap % fillers] += 1
    zeros = tokens.new_zeros(gap)
    return PackedText(torch.cat((tokens, zeros)), _bounds(torch.cat((lengths, filled))), width, fillers)


def _bounds(lengths: Tensor) -> Tensor:
    cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return cu_seqlens


def offset_in_sequence(cu_seqlens: Tensor, total: int) -> Tensor:
    """For each packed row, how far it lies behind the start of its sequence: (total,) int64."""
    starts = cu_seqlens[:-1].long()
    repeated = torch.repeat_interleave(starts, cu_seqlens.diff().long(), output_size=total)
    return torch.arange(total, device=cu_seqlens.device) - repeated


def padded_rows(cu_seqlens: Tensor, max_seqlen: int, total: int) -> Tensor:
    """For each packed row, its row in the flattened padded (B * max_seqlen) layout: (total,) int64."""
    num_sequences = cu_seqlens.numel() - 1
    shift = torch.arange(num_sequences, device=cu_seqlens.device) * max_seqlen - cu_seqlens[:-1]
    repeated = torch.repeat_interleave(shift, cu_seqlens.diff().long(), output_size=total)
    return torch.arange(total, device=cu_seqlens.device) + repeated


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows)
        out = x.new_zeros(size, *x.shape[1:])
        # Dynamo of torch 2.11 loses the gradient behind index_copy_; in a graph the two are one.
        return out.index_copy(0, rows, x) if torch.compiler.is_compiling() else out.index_copy_(0, rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        (rows,) = ctx.saved_tensors
        return d_out.index_select(0, rows), None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        (rows,) = ctx.saved_tensors
        return d_out.new_zeros(ctx.size, *d_out.shape[1:]).index_copy_(0, rows, d_out), None


def scatter_rows(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """`out[rows] = x` on zeros with `size` rows: (T, ...) -> (size, ...). `rows` holds no row twice."""
    return _ScatterRows.apply(x, rows, size)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, the adjoint of `scatter_rows`; `rows` holds no row twice, so its backward is a copy, not a sum."""
    return _GatherRows.apply(x, rows)
