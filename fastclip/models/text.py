"""CLIP's causal text Transformer, pooled at the end-of-text token; on padded or packed captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.config import TextConfig
from fastclip.models.transformer import Transformer
from fastclip.ops.attention.packing import PackedText, pack_text


class TextTower(nn.Module):
    """Token ids to features. A base class of `CLIP`, whose state dict holds these parameters at its top level."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        width = config.width
        self.context_length = config.context_length
        self.vocab_size = config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, "quick_gelu" if quick_gelu else "gelu"
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer.init_scaled()

    def text_features(self, text: Tensor | PackedText, packed: bool) -> Tensor:
        """Captions -> (B, embed_dim), not L2-normalised; `packed` packs padded ids (B, L) first."""
        if isinstance(text, Tensor):
            self._check_ids(text)
            text = pack_text(text) if packed else text
        pooled = self._pooled_packed(text) if isinstance(text, PackedText) else self._pooled_padded(text)
        return self.ln_final(pooled) @ self.text_projection

    def _pooled_packed(self, text: PackedText) -> Tensor:
        x = self.token_embedding(text.tokens) + F.embedding(text.positions(), self.positional_embedding)  # (T, W)
        ends = text.cu_seqlens[1:].long() - 1
        return self.transformer(x, text.cu_seqlens, text.max_seqlen, causal=True, pool_rows=ends)

    def _pooled_padded(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]  # (B, L, W)
        x = self.transformer(x, causal=True)
        return x[torch.arange(x.shape[0], device=x.device), ids.argmax(dim=1)]

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point() or not 1 <= ids.shape[1] <= self.context_length:
            raise ValueError(
                f"text must be integer token ids of shape (B, L) with L from 1 to {self.context_length}, "
                f"was {ids.dtype} {tuple(ids.shape)}"
            )
