"""The Transformer both towers share: pre-norm residual blocks with one QKV product.

Tokens are (B, N, W) for B sequences of equal length, or packed (T, W) with `cu_seqlens` and `max_seqlen`: LayerNorm,
MLP and the products then run on real tokens alone. Every parameter is read in the forward of the module that owns it,
so that ZeRO-3 gathers it in time. State-dict names are OpenAI's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastclip.ops.attention import attention, pooled_attention
from fastclip.ops.attention.packing import gather_rows

QUICK_GELU_SLOPE = 1.702


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), written with SiLU so that backward keeps one tensor and not two."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(QUICK_GELU_SLOPE * x) / QUICK_GELU_SLOPE


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention` and one product for Q, K and V."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,  # (B, N, W) or (T, W)
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        pool_rows: Tensor | None = None,  # (B,)
    ) -> Tensor:
        """Attention for all tokens, or (B, W) for the rows `pool_rows` of the flattened tokens, one a sequence.

        A pooled row looks at its whole sequence; under a causal mask it must therefore be the last of it.
        """
        width = x.shape[-1]
        if pool_rows is None:
            qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
            out = attention(qkv, cu_seqlens, max_seqlen, causal=causal)
        else:
            weight_q, weight_kv = self.in_proj_weight.split((width, 2 * width))
            bias_q, bias_kv = self.in_proj_bias.split((width, 2 * width))
            q = F.linear(_rows(x, pool_rows), weight_q, bias_q).unflatten(-1, (self.heads, -1))
            kv = F.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.heads, -1))
            out = pooled_attention(q, kv, cu_seqlens, max_seqlen)
        return self.out_proj(out.flatten(-2))


ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def activation(name: str) -> nn.Module:
    """GELU (with erf), its tanh approximation, or x * sigmoid(1.702 x)."""
    if name == "quick_gelu":
        return QuickGELU()
    return nn.GELU(approximate="tanh" if name == "gelu_tanh" else "none")


class LayerScale(nn.Module):
    """x * gamma (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        return x * self.gamma


class MLP(nn.Module):
    """c_proj(activation(c_fc(x)))."""

    def __init__(self, width: int, hidden: int, act: str) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = activation(act)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """x + ls_1(attn(ln_1(x))), then x + ls_2(mlp(ln_2(x))); without `ls_init_value` there are no scales."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, act: str, norm_eps: float, ls_init_value: float | None
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, norm_eps)
        self.attn = Attention(width, heads)
        self.ls_1 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)
        self.ln_2 = nn.LayerNorm(width, norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), act)
        self.ls_2 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)

    def forward(
        self,
        x: Tensor,  # (B, N, W) or (T, W)
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        pool_rows: Tensor | None = None,  # (B,)
    ) -> Tensor:
        """The block's output for all tokens, or (B, W) for `pool_rows` alone: exact, and an MLP on B rows only."""
        attended = self.attn(self.ln_1(x), cu_seqlens, max_seqlen, causal, pool_rows)
        x = self.ls_1(attended) + (x if pool_rows is None else _rows(x, pool_rows))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """A stack of blocks; with `pool_rows` the last one is computed for those rows only.

    act: one of ACTIVATIONS.
    ls_init_value: LayerScale's initial value; None for blocks without it.
    recompute: "none", or "full": backward keeps the input of each block and runs the block again.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float,
        act: str = "gelu",
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
    ) -> None:
        super().__init__()
        self.recompute = "none"
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, act, norm_eps, ls_init_value) for _ in range(layers)
        )

    def init_scaled(self) -> None:
        """OpenAI's initialisation of the text tower: products into the residual shrink with the depth."""
        for block in self.resblocks:
            assert isinstance(block, Block)
            width = block.ln_1.weight.shape[0]
            into_residual = width**-0.5 * (2 * len(self.resblocks)) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=into_residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=into_residual)

    def forward(
        self,
        x: Tensor,  # (B, N, W) or (T, W)
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        pool_rows: Tensor | None = None,  # (B,)
    ) -> Tensor:
        """(B, N, W) or (T, W), or (B, W) with `pool_rows`."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            arguments = (x, cu_seqlens, max_seqlen, causal, pool_rows if i == last else None)
            if self.recompute == "full" and self.training:
                x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*arguments)
        return x


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of the flattened tokens: (B, N, W) or (T, W) -> (B, W)."""
    return gather_rows(x.flatten(0, -2), rows)
