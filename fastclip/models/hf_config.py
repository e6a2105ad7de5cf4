"""Hugging Face's `config.json` and `preprocessor_config.json` of CLIPModel and SiglipModel, both ways."""

from __future__ import annotations

import math
from typing import Any

from fastclip.models.config import OPENAI_MEAN, OPENAI_STD, CLIPConfig, TextConfig, VisionConfig

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_ACTS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_LEGACY_EOS = 2  # CLIPTextConfig's default; transformers then pools at the largest id
_WIDTH = {  # transformers' defaults for what a config leaves out
    "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
               "image_size": 224, "patch_size": 32},
    "text": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
             "vocab_size": 49408, "max_position_embeddings": 77},
}  # fmt: skip
_SIGLIP = {
    "vision": _WIDTH["vision"] | {"patch_size": 16},
    "text": _WIDTH["text"] | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                              "vocab_size": 32000, "max_position_embeddings": 64},
}  # fmt: skip


def from_hf(data: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> CLIPConfig:
    """The config of a CLIPModel or SiglipModel from its `config.json` and, where there is one, its preprocessor's.

    Raises ValueError for a model of another kind.
    """
    kind = data.get("model_type")
    if kind not in ("clip", "siglip"):
        raise ValueError(f'model_type must be "clip" or "siglip", was {kind!r}')
    is_siglip = kind == "siglip"
    defaults = _SIGLIP if is_siglip else _WIDTH
    vision = defaults["vision"] | (data.get("vision_config") or {})
    text = defaults["text"] | (data.get("text_config") or {})
    default_act, default_eps = ("gelu_pytorch_tanh", 1e-6) if is_siglip else ("quick_gelu", 1e-5)
    acts = [_ACTS.get(tower.get("hidden_act", default_act)) for tower in (vision, text)]
    if None in acts or (acts[0] == "quick_gelu") != (acts[1] == "quick_gelu"):
        raise ValueError(f"hidden_act must be one of {', '.join(_ACTS)}, quick_gelu in both towers or none")
    eos, vocab = text.get("eos_token_id", 49407), text["vocab_size"]
    is_argmax = eos in (_LEGACY_EOS, vocab - 1)
    siglip_text: dict[str, Any] = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
    clip_text: dict[str, Any] = {"pool_type": "argmax"} if is_argmax else {"pool_type": "eos", "eos_id": eos}
    return CLIPConfig(
        embed_dim=vision["hidden_size"] if is_siglip else data.get("projection_dim", 512),
        vision=VisionConfig(
            image_size=vision["image_size"],
            layers=vision["num_hidden_layers"],
            width=vision["hidden_size"],
            head_width=vision["hidden_size"] // vision["num_attention_heads"],
            mlp_ratio=_ratio(vision),
            patch_size=vision["patch_size"],
            pool_type="map" if is_siglip else "tok",
            norm_eps=vision.get("layer_norm_eps", default_eps),
            gelu_tanh=acts[0] == "gelu_tanh",
        ),
        text=TextConfig(
            context_length=text["max_position_embeddings"],
            vocab_size=vocab,
            width=text["hidden_size"],
            heads=text["num_attention_heads"],
            layers=text["num_hidden_layers"],
            mlp_ratio=_ratio(text),
            norm_eps=text.get("layer_norm_eps", default_eps),
            gelu_tanh=acts[1] == "gelu_tanh",
            **(siglip_text if is_siglip else clip_text),
        ),
        quick_gelu=acts[0] == "quick_gelu",
        init_logit_scale=math.log(10) if is_siglip else data.get("logit_scale_init_value", math.log(1 / 0.07)),
        init_logit_bias=-10.0 if is_siglip else None,
        custom_text=is_siglip,
        **_prepared(preprocessor or {}, is_siglip),
    )


def to_hf(config: CLIPConfig) -> dict[str, Any]:
    """The `config.json` of a CLIPModel or SiglipModel; `layouts.why_not(config, "hf")` says which configs have one."""
    vision, text, is_siglip = config.vision, config.text, config.vision.pool_type == "map"
    kind = "siglip" if is_siglip else "clip"
    acts = {ours: theirs for theirs, ours in _ACTS.items()}
    data: dict[str, Any] = {
        "architectures": ["SiglipModel" if is_siglip else "CLIPModel"],
        "model_type": kind,
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": acts[config.act(vision)],
            "layer_norm_eps": vision.norm_eps,
        },
        "text_config": {
            "model_type": f"{kind}_text_model",
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "hidden_act": acts[config.act(text)],
            "layer_norm_eps": text.norm_eps,
        },
    }
    if is_siglip:
        data["text_config"]["projection_size"] = config.embed_dim
        return data
    data["text_config"] |= {
        "eos_token_id": text.eos_id if text.pool_type == "eos" else text.vocab_size - 1,
        "bos_token_id": text.vocab_size - 2,
        "projection_dim": config.embed_dim,
    }
    data["vision_config"]["projection_dim"] = config.embed_dim
    return data | {"projection_dim": config.embed_dim, "logit_scale_init_value": config.init_logit_scale}


def to_hf_preprocessor(config: CLIPConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` that prepares images as `config` says."""
    size, is_squash = config.vision.image_size, config.resize_mode == "squash"
    numbers = {name: number for number, name in _RESAMPLE.items()}
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "SiglipImageProcessor" if config.vision.pool_type == "map" else "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if is_squash else {f"{config.resize_mode}_edge": size},
        "resample": numbers[config.interpolation],
        **({} if is_squash else {"do_center_crop": True, "crop_size": square}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def _prepared(preprocessor: dict[str, Any], is_siglip: bool) -> dict[str, Any]:
    size = preprocessor.get("size")
    is_squash = isinstance(size, dict) and "height" in size if size else is_siglip
    half = (0.5, 0.5, 0.5)
    return {
        "image_mean": preprocessor.get("image_mean") or (half if is_siglip else OPENAI_MEAN),
        "image_std": preprocessor.get("image_std") or (half if is_siglip else OPENAI_STD),
        "interpolation": _RESAMPLE.get(preprocessor.get("resample", 3), "bicubic"),
        "resize_mode": "squash" if is_squash else "shortest",
    }


def _ratio(tower: dict[str, Any]) -> float:
    """intermediate / width to four digits, rounded up as the published ratios are, so that it gives the same size."""
    return math.ceil(tower["intermediate_size"] / tower["hidden_size"] * 1e4 - 1e-6) / 1e4
