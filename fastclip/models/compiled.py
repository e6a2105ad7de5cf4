"""The blocks by torch.compile: what lies between their products becomes few kernels."""

from __future__ import annotations

import torch

from fastclip.models.clip import CLIP
from fastclip.models.transformer import blocks_of

MOST_GRAPHS = (
    64  # of a block: both towers, all tokens or the pooled one, with and without a gradient, ever other lengths
)


def compile_blocks(model: CLIP) -> int:
    """Has torch.compile run the blocks of both towers from now on; the number of blocks.

    All blocks of a tower share one graph, which the first forward compiles, but for the last, which is of the pooled
    tokens alone. From the second length on tokens are compiled as a number that varies. Parameters and the files keep
    their names. Call it behind `use_fp8`. Wrapped towers and ModifiedResNets have no blocks of ours and stay as they
    are.

    Raises ValueError where there is nothing to compile.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError("it compiles the blocks of this package's Transformers, of which this model has none")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    for block in blocks:
        block.compile()
    return len(blocks)
