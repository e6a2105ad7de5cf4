"""Position embeddings for another image size or context length."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

_IMAGE = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
_TEXT = "positional_embedding"


def resize_positions(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`state` with its position embeddings interpolated to the shapes `wanted`; other entries are left alone.

    Images: bicubic with antialiasing over the grid, in fp32, the class token (where both have one) as it is. Text:
    linear along the positions. As open_clip does.
    """
    resized = dict(state)
    for name in (*_IMAGE, _TEXT):
        old, shape = state.get(name), wanted.get(name)
        if old is None or shape is None or tuple(old.shape) == shape or old.shape[1:] != shape[1:]:
            continue
        resized[name] = _resize_text(old, shape[0]) if name == _TEXT else _resize_grid(old, shape[0])
    return resized


def _resize_grid(old: Tensor, count: int) -> Tensor:
    extra = next((e for e in (0, 1) if _is_square(len(old) - e) and _is_square(count - e)), None)
    if extra is None:
        return old
    side, target = round((len(old) - extra) ** 0.5), round((count - extra) ** 0.5)
    grid = old[extra:].float().T.reshape(1, -1, side, side)
    new = F.interpolate(grid, size=(target, target), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((old[:extra], new.flatten(2)[0].T.to(old.dtype)))


def _resize_text(old: Tensor, count: int) -> Tensor:
    new = F.interpolate(old.float().T[None], size=count, mode="linear", align_corners=False)
    return new[0].T.to(old.dtype)


def _is_square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n
