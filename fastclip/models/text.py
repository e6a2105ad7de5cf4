"""CLIP's causal text Transformer on padded or packed captions, and SigLIP's bidirectional one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.config import TextConfig
from fastclip.models.transformer import LayerNorm, Transformer
from fastclip.ops.attention.packing import PackedText, caption_ends, pack_text


class TextTower(nn.Module):
    """Token ids to features. A base class of `CLIP`, whose state dict holds these parameters at its top level."""

    def __init__(self, config: TextConfig, embed_dim: int, act: str = "gelu") -> None:
        super().__init__()
        width = config.width
        self.text_config = config
        self.context_length = config.context_length
        self.vocab_size = config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length + config.embed_cls, width))
        if config.embed_cls:
            self.cls_emb = nn.Parameter(0.01 * torch.randn(width))
        self.transformer = Transformer(
            width, config.layers, config.heads, config.mlp_ratio, act, config.norm_eps, config.ls_init_value
        )
        self.ln_final = LayerNorm(width, config.norm_eps)
        self.text_projection: nn.Linear | nn.Parameter
        if config.proj_bias:
            self.text_projection = nn.Linear(width, embed_dim)
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        else:
            self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer.init_scaled()

    def text_features(self, text: Tensor | PackedText, packed: bool) -> Tensor:
        """Captions -> (B, embed_dim), not L2-normalised; `packed` packs padded ids (B, L) where that is exact.

        Raises ValueError for ids that do not fit, and for packed captions where packing changes the features.
        """
        reason = self.text_config.why_not_packed
        if isinstance(text, Tensor):
            self._check_ids(text)
            text = pack_text(text, eos_id=self._eos_id) if packed and reason is None else text
        elif reason is not None:
            raise ValueError(f"text must be padded ids (B, L), was packed: {reason}")
        if isinstance(text, PackedText):
            return self._projected(self._pooled_packed(text))
        if self.text_config.embed_cls:
            return self.text_features_and_tokens(text)[0]
        return self._projected(self._pooled_padded(text))

    def text_features_and_tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of a tower with embed_cls: ids (B, L) -> (B, embed_dim), and its tokens (B, L, width) without ln_final."""
        self._check_ids(ids)
        batch, length = ids.shape
        x = torch.cat((self.token_embedding(ids), self.cls_emb.expand(batch, 1, -1)), dim=1)
        x = self.transformer(x + self.positional_embedding[: length + 1], mask=self._class_token_mask(ids))
        return self._projected(x[:, -1]), x[:, :-1]

    def _class_token_mask(self, ids: Tensor) -> Tensor:
        """Causal, and without padding, but shifted by one: what open_clip's CoCa weights were trained with.

        So the class token sees the first token of the padding, and itself where there is none.
        """
        seen = F.pad(ids != self.text_config.pad_id, (1, 0), value=True)  # (B, L + 1)
        return seen[:, None] & seen.new_ones(seen.shape[1], seen.shape[1]).tril()

    def _projected(self, pooled: Tensor) -> Tensor:
        pooled = self.ln_final(pooled)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled)
        return pooled @ self.text_projection

    @property
    def _eos_id(self) -> int | None:
        return self.text_config.eos_id if self.text_config.pool_type == "eos" else None

    def _pooled_packed(self, text: PackedText) -> Tensor:
        if text.max_seqlen > self.context_length:
            raise ValueError(f"text must hold captions of at most {self.context_length} tokens, was {text.max_seqlen}")
        x = self.token_embedding(text.tokens) + F.embedding(text.positions(), self.positional_embedding)  # (T, W)
        ends = text.cu_seqlens[1:].long() - 1
        pooled = self.transformer(x, text.cu_seqlens, text.max_seqlen, causal=True, pool_rows=ends)
        return pooled[: len(text)]  # the fillers of a bucket are sequences too

    def _pooled_padded(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.token_embedding(ids) + self.positional_embedding[:length]  # (B, L, W)
        is_last = self.text_config.pool_type == "last"
        ends = torch.full_like(ids[:, 0], length - 1) if is_last else caption_ends(ids, self._eos_id)
        rows = torch.arange(0, batch * length, length, device=ids.device) + ends
        is_causal = not self.text_config.no_causal_mask
        if is_causal and not is_last:  # the pooled row does not see what is behind it
            return self.transformer(x, causal=True).flatten(0, 1)[rows]
        return self.transformer(x, causal=is_causal, pool_rows=rows)

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point() or not 1 <= ids.shape[1] <= self.context_length:
            raise ValueError(
                f"text must be integer token ids of shape (B, L) with L from 1 to {self.context_length}, "
                f"was {ids.dtype} {tuple(ids.shape)}"
            )
