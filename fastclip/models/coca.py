"""What CoCa adds to two towers (Yu et al. 2022, arXiv 2205.01917): the image tower's attention pool, and a decoder that
predicts each caption's next tokens from the image. State-dict names are open_clip's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.config import DecoderConfig
from fastclip.models.transformer import MLP, LayerNorm, LayerScale, Transformer, linear, recomputing
from fastclip.ops.attention.packing import PackedText, gather_rows, padded_rows, scatter_rows

LOGITS_AT_ONCE = 1 << 25  # 134 MB in fp32


class CrossAttention(nn.Module):
    """Attention of one sequence to another, with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.is_joint = context_width == width
        if self.is_joint:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(width, width))
            self.k_proj_weight = nn.Parameter(torch.empty(width, context_width))
            self.v_proj_weight = nn.Parameter(torch.empty(width, context_width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        for weight in self.parameters(recurse=False):
            if weight.dim() == 2:
                nn.init.xavier_uniform_(weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, context: Tensor, rows: Tensor | None = None, length: int = 0) -> Tensor:
        """x (L, W), the same for every context (B, M, C): (B, L, W); or packed x (T, W), which goes to the `rows` of
        (B * length) and comes back as (T, W)."""
        width, batch = x.shape[-1], context.shape[0]
        weight_q, weight_kv = self._weights(width)
        bias_q, bias_kv = self.in_proj_bias.split((width, 2 * width))
        q = linear(x, weight_q, bias_q)
        if rows is not None:
            q = scatter_rows(q, rows, batch * length).view(batch, length, width)
        q = q.expand(batch, -1, -1)
        k, v = linear(context, weight_kv, bias_kv).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q.unflatten(-1, (self.heads, -1)).transpose(1, 2), k, v)
        out = out.transpose(1, 2).flatten(2)  # (B, L, W)
        return self.out_proj(out if rows is None else gather_rows(out.flatten(0, 1), rows))

    def _weights(self, width: int) -> tuple[Tensor, Tensor]:
        if not self.is_joint:
            return self.q_proj_weight, torch.cat((self.k_proj_weight, self.v_proj_weight))
        weight_q, weight_kv = self.in_proj_weight.split((width, 2 * width))
        return weight_q, weight_kv


class AttentionalPooler(nn.Module):
    """Learned queries over all tokens: the first is the image's feature, the others are what captions look at."""

    def __init__(self, width: int, heads: int, context_width: int, queries: int, norm_eps: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width))
        self.attn = CrossAttention(width, heads, context_width)
        self.ln_q = LayerNorm(width, norm_eps)
        self.ln_k = LayerNorm(context_width, norm_eps)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """(B, N, context_width) -> (B, queries, width); `queries`: the first ones alone."""
        return self.attn(self.ln_q(self.query[:queries]), self.ln_k(x))


class CrossBlock(nn.Module):
    """x + ls_1(attn(ln_1(x), ln_1_kv(image))), then x + ls_2(mlp(ln_2(x)))."""

    def __init__(self, width: int, heads: int, act: str, ls_init_value: float | None) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = CrossAttention(width, heads, width)
        self.ls_1 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)
        self.ln_1_kv = LayerNorm(width)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, 4 * width, act)
        self.ls_2 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)

    def forward(self, x: Tensor, image: Tensor, rows: Tensor, length: int) -> Tensor:
        """Packed captions (T, W) that look at their images (B, M, W); rows, length: as `CrossAttention`."""
        x = x + self.ls_1(self.attn(self.ln_1(x), self.ln_1_kv(image), rows, length))
        return x + self.ls_2(self.mlp(x, self.ln_2))


class CaptionDecoder(Transformer):
    """Causal blocks over the text tower's tokens, each with one that looks at the image behind it."""

    def __init__(self, config: DecoderConfig, vocab_size: int, act: str) -> None:
        super().__init__(config.width, config.layers, config.heads, 4.0, act, ls_init_value=config.ls_init_value)
        self.cross_attn = nn.ModuleList(
            CrossBlock(config.width, config.heads, act, config.ls_init_value) for _ in range(config.layers)
        )
        self.ln_final = LayerNorm(config.width)
        self.text_projection = nn.Parameter(config.width**-0.5 * torch.randn(config.width, vocab_size))
        self.init_scaled()

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # (T, W)
        targets: PackedText,  # T tokens of B captions
        image: Tensor,  # (B, M, W)
        pad_id: int,
    ) -> Tensor:
        """-log p(target | x up to it, image), summed over each caption, `pad_id` left out: (B,) in fp32 or fp64.

        The logits of the whole batch are never there: those of a few rows at a time, made again in backward.
        """
        batch, length = len(targets), targets.max_seqlen
        rows = padded_rows(targets.cu_seqlens, length, len(x))
        for block, cross in zip(self.resblocks, self.cross_attn, strict=True):
            x = recomputing(self.reruns_blocks, block, x, targets.cu_seqlens, length, True)
            x = recomputing(self.reruns_blocks, cross, x, image, rows, length)
        losses = self._losses(self.ln_final(x), targets.tokens, pad_id)
        return scatter_rows(losses, rows, batch * length).view(batch, length).sum(1)

    def _losses(self, x: Tensor, targets: Tensor, pad_id: int) -> Tensor:
        def losses(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            logits = x @ weight
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(logits, targets, ignore_index=pad_id, reduction="none")

        weight = self.text_projection
        at_once = max(1, LOGITS_AT_ONCE // weight.shape[1])
        parts = zip(x.split(at_once), targets.split(at_once), strict=True)
        return torch.cat([recomputing(True, losses, part, weight, wanted) for part, wanted in parts])


def next_tokens(ids: Tensor, pad_id: int) -> tuple[PackedText, Tensor]:
    """What a decoder shall predict from ids (B, L): each caption's tokens but the first, up to its last that is not
    padding, packed; and which of the tokens (B, L - 1) it predicts them from."""
    targets = ids[:, 1:]
    place = torch.arange(1, ids.shape[1], device=ids.device)
    lengths = F.pad(place * (targets != pad_id), (1, 0)).amax(1)  # (B,)
    kept = place <= lengths[:, None]
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    return PackedText(targets[kept], bounds, int(lengths.max())), kept
