"""The Transformer both towers share: pre-norm residual blocks with one QKV product.

Tokens are (B, N, W) for B sequences of equal length, or packed (T, W) with `cu_seqlens` and `max_seqlen`: LayerNorm,
MLP and the products then run on real tokens alone. Every parameter is read in the forward of the module that owns it,
so that ZeRO-3 gathers it in time. State-dict names are OpenAI's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastclip.ops.activation import KINDS, activation
from fastclip.ops.attention import attention, pooled_attention
from fastclip.ops.attention.packing import gather_rows

ACTIVATIONS = KINDS


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear as it is at this call: ZeRO-3 has one in its place that does not hold the gathered weight."""
    return F.linear(x, weight, bias)


class LayerNorm(nn.LayerNorm):
    """In the dtype of x, as open_clip's: autocast on a GPU returns fp32, and so would every sum behind ln_pre be."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype."""
        return super().forward(x).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention` and one product for Q, K and V.

    recomputes: backward runs the LayerNorm in front of the product and the attention again instead of keeping what
    came out of them.
    product: computes x @ weight.T + bias; see `fastclip.models.fp8`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.recomputes = False
        self.product: Callable[[Tensor, Tensor, Tensor], Tensor] = linear
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,  # (B, N, W) or (T, W)
        norm: nn.Module,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        pool_rows: Tensor | None = None,  # (B,)
        mask: Tensor | None = None,  # (B, N, N) bool
    ) -> Tensor:
        """Attention on norm(x) for all tokens, or (B, W) for the rows `pool_rows` of the flattened tokens.

        Those are one a sequence, and look at all of it; under a causal mask each must therefore be its last.
        mask: the keys that each query sees, instead of `causal`.
        """
        width = x.shape[-1]
        if pool_rows is None:
            weight, bias = self.in_proj_weight, self.in_proj_bias
            qkv = recomputing(self.recomputes, lambda x: self.product(norm(x), weight, bias), x)
            return recomputing(self.recomputes, self._attend, qkv, cu_seqlens, max_seqlen, causal, mask)
        weight_q, weight_kv = self.in_proj_weight.split((width, 2 * width))
        bias_q, bias_kv = self.in_proj_bias.split((width, 2 * width))
        q = self.product(norm(_rows(x, pool_rows)), weight_q, bias_q).unflatten(-1, (self.heads, -1))
        kv = recomputing(self.recomputes, lambda x: self.product(norm(x), weight_kv, bias_kv), x)
        out = pooled_attention(q, kv.unflatten(-1, (2, self.heads, -1)), cu_seqlens, max_seqlen)
        return self.out_proj(out.flatten(-2))

    def _attend(
        self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, causal: bool, mask: Tensor | None
    ) -> Tensor:
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        if mask is None:
            out = attention(qkv, cu_seqlens, max_seqlen, causal=causal)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)
        return self.out_proj(out.flatten(-2))


class Activation(nn.Module):
    """One of ACTIVATIONS, of which backward keeps the input alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return activation(x, kind=self.kind)

    def extra_repr(self) -> str:
        return self.kind


class LayerScale(nn.Module):
    """x * gamma (Touvron et al. 2021)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """(..., W) -> (..., W)."""
        return x * self.gamma


class MLP(nn.Module):
    """c_proj(activation(c_fc(norm(x)))).

    recomputes: backward runs norm and activation again instead of keeping what came out of them.
    """

    def __init__(self, width: int, hidden: int, act: str) -> None:
        super().__init__()
        self.recomputes = False
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = Activation(act)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """(..., W) -> (..., W)."""
        hidden = recomputing(self.recomputes, lambda x: self.c_fc(norm(x)), x)
        return recomputing(self.recomputes, lambda x: self.c_proj(self.gelu(x)), hidden)


class Block(nn.Module):
    """x + ls_1(attn(ln_1(x))), then x + ls_2(mlp(ln_2(x))); without `ls_init_value` there are no scales."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, act: str, norm_eps: float, ls_init_value: float | None
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width, norm_eps)
        self.attn = Attention(width, heads)
        self.ls_1 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)
        self.ln_2 = LayerNorm(width, norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), act)
        self.ls_2 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)

    def forward(
        self,
        x: Tensor,  # (B, N, W) or (T, W)
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        causal: bool = False,
        pool_rows: Tensor | None = None,  # (B,)
        mask: Tensor | None = None,  # (B, N, N) bool
    ) -> Tensor:
        """The block's output for all tokens, or (B, W) for `pool_rows` alone: exact, and an MLP on B rows only."""
        attended = self.attn(x, self.ln_1, cu_seqlens, max_seqlen, causal, pool_rows, mask)
        x = self.ls_1(attended) + (x if pool_rows is None else _rows(x, pool_rows))
        return x + self.ls_2(self.mlp(x, self.ln_2))


class Transformer(nn.Module):
    """A stack of blocks; with `pool_rows` the last one is computed for those rows only.

    act: one of ACTIVATIONS.
    ls_init_value: LayerScale's initial value; None for blocks without it.
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
        self.reruns_blocks = False
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, act, norm_eps, ls_init_value) for _ in range(layers)
        )

    def set_recompute(self, mode: str) -> None:
        """What backward recomputes instead of keeping: "none"; "selective": what LayerNorm, attention and activation
        return, at no product with a weight more (56 % of the bytes of open_clip's block, 45 % with QuickGELU); "full":
        the blocks, of which it keeps the inputs alone."""
        self.reruns_blocks = mode == "full"
        for module in self.modules():
            if isinstance(module, (Attention, MLP)):
                module.recomputes = mode == "selective"

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
        mask: Tensor | None = None,  # (B, N, N) bool: the keys that each query sees, instead of `causal`
    ) -> Tensor:
        """(B, N, W) or (T, W), or (B, W) with `pool_rows`."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            arguments = (x, cu_seqlens, max_seqlen, causal, pool_rows if i == last else None, mask)
            x = recomputing(self.reruns_blocks, block, *arguments)
        return x


def blocks_of(model: nn.Module) -> list[Block]:
    """All blocks in it."""
    return [module for module in model.modules() if isinstance(module, Block)]


def recomputing(recomputes: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """function(*arguments), which backward runs again, but for what comes behind the last tensor it needs.

    So a product that ends the function is not run again.
    """
    if not recomputes or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of the flattened tokens: (B, N, W) or (T, W) -> (B, W)."""
    return gather_rows(x.flatten(0, -2), rows)
