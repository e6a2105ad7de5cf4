"""open_clip's own towers with our attention, and captions at their true length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.errors import UserError
from fastclip.interop.attention import Captions, attention_replacements, dropout
from fastclip.interop.drop_in import DropIn, Replacement
from fastclip.ops.attention.packing import PackedText, pack_text


def open_clip_encoders(model: nn.Module, packed_text: bool = True, impl: str = "auto") -> DropIn:
    """A drop-in for the towers of an open_clip model: `fastclip.attention`, and captions without their padding.

    Same features and gradients. Captions are packed in `encode_text` and in the model's call where the tower is causal
    and pools at the largest id, as all of OpenAI's and LAION's do: no token behind that can matter. Other text towers
    (SigLIP's, CLIPA's, CoCa's) keep their padding and open_clip's masked attention.

    Args:
        model: of open_clip's `create_model`; its parameters and its state dict stay as they are.
        packed_text: False keeps the padding of all text towers, for `torch.compile(fullgraph=True)`: how long captions
            are depends on the data. Captions that the loader has packed (`fastclip.ops.attention.pack_text`) are taken
            too; packing in the model costs a GPU one synchronisation a call.
        impl: as `fastclip.attention`.

    Raises:
        UserError: on `enable`, when there is nothing in it that could be replaced.
    """

    def find() -> list[Replacement]:
        found = attention_replacements(model, impl)
        if not found:
            raise UserError(f"{type(model).__name__} has no attention of open_clip's that can be replaced")
        is_replaced = {id(replacement.owner) for replacement in found}
        for module in model.modules():
            if packed_text and _packs(module, is_replaced):
                is_tower = hasattr(module, "output_tokens")
                names = ("forward",) if is_tower else ("encode_text", "_encode_text")
                make = (lambda theirs: _features) if is_tower else (lambda theirs: _encode_text)
                found += [Replacement(module, name, make) for name in names if hasattr(module, name)]
        return found

    return DropIn("open_clip_encoders", find)


def _packs(module: Any, is_replaced: set[int]) -> bool:
    """Whether the module is a text tower whose features depend on no token behind the largest id."""
    mask, blocks = getattr(module, "attn_mask", None), getattr(getattr(module, "transformer", None), "resblocks", ())
    pools = getattr(module, "text_pool_type", getattr(module, "pool_type", None))
    return (
        isinstance(mask, Tensor)
        and hasattr(module, "token_embedding")
        and pools == "argmax"
        and getattr(module, "cls_emb", None) is None
        and not getattr(module, "output_tokens", False)
        and _is_causal(mask)
        and len(blocks) > 0
        and all(id(block.attn) in is_replaced and not dropout(block.attn) for block in blocks)
    )


def _is_causal(mask: Tensor) -> bool:
    """Whether the additive mask hides exactly what comes later."""
    return mask.dim() == 2 and torch.equal(mask, torch.full_like(mask, -torch.inf).triu_(1))


def _encode_text(module: Any, text: Tensor | PackedText, normalize: bool = False) -> Tensor:
    """Of `CLIP`, which holds the text tower's parameters itself."""
    features = _features(module, text)
    return F.normalize(features, dim=-1) if normalize else features


def _features(module: Any, text: Tensor | PackedText) -> Tensor:
    """Token ids (B, L), or captions packed already -> (B, D), not normalised."""
    packed = text if isinstance(text, PackedText) else pack_text(text)
    dtype = module.transformer.get_cast_dtype()
    x = module.token_embedding(packed.tokens).to(dtype)
    x = x + F.embedding(packed.positions(), module.positional_embedding.to(dtype))  # (T, W)
    x = module.transformer(x[None], attn_mask=Captions(packed.cu_seqlens, packed.max_seqlen))[0]
    pooled = module.ln_final(x[packed.cu_seqlens[1:].long() - 1])  # a row at a time: pooling before it is exact
    projection = module.text_projection
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
