"""How other packages name a CLIP model's weights: open_clip, OpenAI and Hugging Face, in and out, bit for bit.

Inside, a model has the names of OpenAI's CLIP and of open_clip's `CLIP` class, for SigLIP as well. Only names change
between layouts, matrices that are kept transposed, and Q, K and V, which Hugging Face keeps apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastclip.models.config import CLIPConfig

LAYOUTS = ("open_clip", "openai", "hf")
OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size")

_WRAPPERS = ("module.", "_orig_mod.")
_NOT_WEIGHTS = frozenset({*OPENAI_MARKS, "attn_mask", "position_ids"})
_TEXT = "text."  # open_clip's CustomTextCLIP
_TEXT_OWN = ("positional_embedding", "text_projection", "token_embedding", "transformer.", "ln_final", "cls_emb")
_IS_TRUNK = "visual.trunk.attn_pool.latent"

# Our name, timm's: beginnings of a name, then parts of a block's
_TIMM = {
    "visual.conv1.": "visual.trunk.patch_embed.proj.",
    "visual.positional_embedding": "visual.trunk.pos_embed",
    "visual.transformer.resblocks.": "visual.trunk.blocks.",
    "visual.ln_post.": "visual.trunk.norm.",
    "visual.attn_pool.": "visual.trunk.attn_pool.",
}
_TIMM_PARTS = {
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".ls_1.": ".ls1.",
    ".ls_2.": ".ls2.",
}

# Our name, Hugging Face's
_HF = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "visual.attn_pool.latent": "vision_model.head.probe",
    "visual.attn_pool.proj.": "vision_model.head.attention.out_proj.",
    "visual.attn_pool.norm.": "vision_model.head.layernorm.",
    "visual.attn_pool.mlp.": "vision_model.head.mlp.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
}
_HF_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_HF_QKV = re.compile(r"(.*\.layers\.\d+\.self_attn\.)[qkv]_proj\.(weight|bias)")
_OUR_QKV = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")
_HF_POOL = "vision_model.head.attention.in_proj_"
_HF_HEAD = "text_model.head."
_POOL = "visual.attn_pool."
_TRANSPOSED = ("visual.proj", "text_projection")


def to_native(state: Mapping[str, Any], config: CLIPConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint in any layout under the names of `CLIP(config)`.

    Unwraps {"state_dict": ...}, drops the prefixes of DDP, torch.compile and open_clip's CustomTextCLIP, and entries
    that are no weights. What it does not know keeps its name.
    """
    found = plain(state)
    if any(name.startswith("vision_model.") for name in found):
        return _from_hf(found)
    if not config.text.is_wrapped:
        found = {name.removeprefix(_TEXT): value for name, value in found.items()}
    if _IS_TRUNK in found and not config.vision.is_wrapped:
        found = {_renamed(name, _swapped(_TIMM), _swapped(_TIMM_PARTS)): value for name, value in found.items()}
        positions = found.get("visual.positional_embedding")
        if positions is not None and positions.dim() == 3:
            found["visual.positional_embedding"] = positions[0]
    return found


def from_native(state: Mapping[str, Tensor], config: CLIPConfig, layout: str = "open_clip") -> dict[str, Tensor]:
    """The weights of `CLIP(config)` in a layout of another package, one of LAYOUTS.

    Raises ValueError where that package has no such model, with the reason.
    """
    reason = why_not(config, layout)
    if reason is not None:
        raise ValueError(f"a model of this config cannot be written for {layout}: {reason}")
    own = plain(state)
    for name in ("logit_scale", "logit_bias"):
        if name in own:
            own[name] = own[name].reshape(())
    if layout == "hf":
        return _to_hf(own, config)
    if layout == "openai":
        sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
        return own | {name: torch.tensor(size) for name, size in zip(OPENAI_MARKS, sizes, strict=True)}
    if config.vision.pool_type == "map" and not config.vision.is_wrapped:
        own = {_renamed(name, _TIMM, _TIMM_PARTS): value for name, value in own.items()}
        own["visual.trunk.pos_embed"] = own["visual.trunk.pos_embed"][None]
    if config.custom_text and not config.text.is_wrapped:
        own = {f"{_TEXT}{name}" if name.startswith(_TEXT_OWN) else name: value for name, value in own.items()}
    return own


def why_not(config: CLIPConfig, layout: str) -> str | None:
    """Why `layout` cannot hold a model of this config, or None."""
    vision, text = config.vision, config.text
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, was {layout!r}")
    if layout == "open_clip":
        return None
    is_siglip = vision.pool_type == "map"
    if vision.is_wrapped or text.is_wrapped:
        return "it has a wrapped tower"
    if config.decoder is not None or text.embed_cls or vision.attentional_pool:
        return "it has CoCa's pooling or decoder"
    if vision.conv_stem:
        return "it has a conv_stem"
    if vision.ls_init_value is not None or text.ls_init_value is not None:
        return "it has LayerScale (ls_init_value)"
    if vision.pool_type == "flatten":
        return 'it projects every patch token by itself (pool_type "flatten")'
    if vision.pool_type == "avg" or vision.no_ln_pre:
        return 'it has average pooling or no ln_pre (pool_type "avg", no_ln_pre)'
    if layout == "openai":
        if is_siglip or text.no_causal_mask or text.proj_bias or text.pool_type != "argmax":
            return "OpenAI's CLIP has a class token, a causal text tower and pools at the largest token id"
        if not config.quick_gelu:
            return "OpenAI's CLIP computes QuickGELU, which this model was not trained with"
        if vision.head_width != 64 or text.width != 64 * text.heads:
            return "the heads of OpenAI's CLIP are 64 wide"
        return None
    if vision.is_resnet:
        return "transformers has no ModifiedResNet"
    if is_siglip != (text.pool_type == "last" and text.no_causal_mask and text.proj_bias):
        return "transformers has a SigLIP tower only beside another"
    if not is_siglip and (text.no_causal_mask or text.proj_bias or text.pool_type == "last"):
        return "the text tower of CLIPModel is causal and has no bias in its projection"
    return None


def plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint without wrappers, prefixes of wrappers, and entries that are no weights."""
    inner = state.get("state_dict", state)
    result: dict[str, Tensor] = {}
    for name, value in inner.items():
        for prefix in _WRAPPERS:
            name = name.removeprefix(prefix)
        if name.rpartition(".")[2] not in _NOT_WEIGHTS:
            result[name] = value
    return result


def is_openai(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds the entries that only OpenAI's files have."""
    return all(name in state for name in OPENAI_MARKS)


def _renamed(name: str, beginnings: Mapping[str, str], parts: Mapping[str, str]) -> str:
    longest = max((old for old in beginnings if name.startswith(old) and _ends(name, old)), key=len, default=None)
    if longest is None:
        return name
    name = beginnings[longest] + name[len(longest) :]
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def _ends(name: str, beginning: str) -> bool:
    """Whether `beginning` ends at a dot or at the end of the name."""
    return beginning.endswith(".") or name == beginning


def _swapped(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _HF_QKV.fullmatch(name)
        parts = [f"{match[1]}{part}_proj.{match[2]}" for part in "qkv"] if match else []
        if match and all(part in state for part in parts):
            whole = f"{match[1].removesuffix('self_attn.')}attn.in_proj_{match[2]}"
            if whole not in merged:
                merged[whole] = torch.cat([state[part] for part in parts])
        elif name.startswith(_HF_POOL):
            kind, width = name.removeprefix(_HF_POOL), len(value) // 3
            merged[f"{_POOL}q.{kind}"], merged[f"{_POOL}kv.{kind}"] = value[:width], value[width:]
        else:
            merged[name] = value
    names, parts_of = _swapped(_HF), _swapped(_HF_PARTS)
    found = {_renamed(name, names, parts_of): value for name, value in merged.items()}
    for ours, theirs in (
        ("text_projection.weight", "text_model.head.weight"),
        ("text_projection.bias", "text_model.head.bias"),
    ):
        if theirs in found:
            found[ours] = found.pop(theirs)
    is_siglip = f"{_POOL}latent" in found
    if not is_siglip and "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight")
    return {name: value.T if name in _TRANSPOSED else value for name, value in found.items()}


def _to_hf(state: Mapping[str, Tensor], config: CLIPConfig) -> dict[str, Tensor]:
    is_siglip = config.vision.pool_type == "map"
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        match = _OUR_QKV.fullmatch(name)
        if match:
            block = _renamed(f"{match[1]}.", _HF, _HF_PARTS)
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                result[f"{block}self_attn.{part}_proj.{match[2]}"] = chunk
        elif name.startswith(f"{_POOL}q."):
            kind = name.removeprefix(f"{_POOL}q.")
            result[f"{_HF_POOL}{kind}"] = torch.cat((value, state[f"{_POOL}kv.{kind}"]))
        elif name in _TRANSPOSED:
            result[_HF.get(name, "text_projection.weight")] = value.T
        elif name.startswith("text_projection."):
            result[name.replace("text_projection.", _HF_HEAD)] = value
        elif name in ("logit_scale", "logit_bias"):
            result[name] = value.reshape(1) if is_siglip else value
        elif not name.startswith(f"{_POOL}kv."):
            result[_renamed(name, _HF, _HF_PARTS)] = value
    return result
