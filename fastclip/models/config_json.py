"""`CLIPConfig` as the JSON of open_clip's model configs and of its `open_clip_config.json`, both ways."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from fastclip.models.config import CLIPConfig, DecoderConfig, TextConfig, VisionConfig, nearest

_T = TypeVar("_T", VisionConfig, TextConfig, DecoderConfig)

# Options of open_clip's towers that are not here, with the value that leaves them out.
_ABSENT: dict[str, Any] = {
    "pos_embed_type": "learnable", "output_tokens": False, "block_type": None, "qk_norm": False,
    "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
    "proj_type": "linear", "tokenizer_mode": None, "act_kwargs": {}, "norm_kwargs": {},
}  # fmt: skip
_ALWAYS = {
    VisionConfig: ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "pool_type"),
    TextConfig: ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
    DecoderConfig: ("width", "heads", "layers"),
}
_MODEL = (
    "embed_dim", "quick_gelu", "init_logit_scale", "init_logit_bias", "custom_text", "vision_cfg", "text_cfg",
    "multimodal_cfg",
)  # fmt: skip
_DECODER = "multimodal_cfg"
_TOKENS = "output_tokens"  # what open_clip's towers return beside their features, for that decoder
_NOT_THE_DECODERS = ("context_length", "vocab_size", "mlp_ratio", "dim_head", "n_queries", "attn_pooler_heads")
_PREPROCESS = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
    "fill_color": "fill_color",
}

# timm's SigLIP towers: (width, layers, head_width, mlp_ratio, gelu_tanh), and the image sizes that have a name
_SIGLIP: dict[str, tuple[Any, ...]] = {
    "base_patch32": (768, 12, 64, 4.0, True),
    "base_patch16": (768, 12, 64, 4.0, False),
    "large_patch16": (1024, 24, 64, 4.0, False),
    "so400m_patch14": (1152, 27, 72, 3.7362, False),
    "so400m_patch16": (1152, 27, 72, 3.7362, True),
    "giantopt_patch16": (1536, 40, 96, 4.0, True),
}
_SIGLIP_SIZES = {
    "base_patch32": (256,),
    "base_patch16": (224, 256, 384, 512),
    "large_patch16": (256, 384, 512),
    "so400m_patch14": (224, 378, 384),
    "so400m_patch16": (256, 384, 512),
    "giantopt_patch16": (256, 384),
}
_SIGLIP_FIELDS = ("width", "layers", "head_width", "mlp_ratio", "gelu_tanh")
_SIGLIP_NAME = re.compile(r"vit_((?:base|large|so400m|giantopt)_patch(\d+))_siglip_(\d+)")
_SIGLIP_EPS = 1e-6


def siglip_vision(timm_name: str, image_size: int | None = None) -> VisionConfig:
    """The native tower that timm calls `timm_name` ("vit_base_patch16_siglip_224")."""
    match = _SIGLIP_NAME.fullmatch(timm_name)
    assert match is not None, timm_name
    values = dict(zip(_SIGLIP_FIELDS, _SIGLIP[match[1]], strict=True))
    size = image_size or int(match[3])
    return VisionConfig(image_size=size, patch_size=int(match[2]), pool_type="map", norm_eps=_SIGLIP_EPS, **values)


def written(config: CLIPConfig) -> dict[str, Any]:
    """See `CLIPConfig.to_dict`."""
    text_cfg = _tower_written(config.text)
    model_cfg: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "init_logit_scale": config.init_logit_scale,
        **({} if config.init_logit_bias is None else {"init_logit_bias": config.init_logit_bias}),
        **({"custom_text": True} if config.custom_text else {}),
        "vision_cfg": _siglip_written(config.vision) or _tower_written(config.vision),
        "text_cfg": text_cfg,
    }
    if config.decoder is not None:
        shared = {name: text_cfg[name] for name in ("context_length", "vocab_size")}
        model_cfg[_DECODER] = _tower_written(config.decoder) | shared
        model_cfg["vision_cfg"][_TOKENS] = text_cfg[_TOKENS] = True
    preprocess_cfg = {
        "size": config.vision.image_size,
        "mean": list(config.image_mean),
        "std": list(config.image_std),
        "interpolation": config.interpolation,
        "resize_mode": config.resize_mode,
        **({"fill_color": config.fill_color} if config.fill_color else {}),
    }
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def read(data: dict[str, Any]) -> CLIPConfig:
    """See `CLIPConfig.from_dict`."""
    model_cfg = dict(data.get("model_cfg", data))
    preprocess = data.get("preprocess_cfg", {})
    towers = {name: dict(model_cfg.pop(name, {})) for name in ("vision_cfg", "text_cfg")}
    decoder = None
    if _DECODER in model_cfg:
        own = {k: v for k, v in model_cfg.pop(_DECODER).items() if k not in _NOT_THE_DECODERS}
        decoder = _tower_read(DecoderConfig, own, _DECODER)
        for tower in towers.values():
            tower.pop(_TOKENS, None)
    vision = _vision_read(towers["vision_cfg"])
    text = _tower_read(TextConfig, towers["text_cfg"], "text_cfg")
    for key in model_cfg:
        if key not in _MODEL:
            raise ValueError(f"unknown key {key!r} in model_cfg{nearest(key, _MODEL)}")
    prepared: dict[str, Any] = {}
    if vision.pool_type == "map" and not vision.is_wrapped:
        prepared = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "resize_mode": "squash"}
    prepared |= {ours: preprocess[theirs] for theirs, ours in _PREPROCESS.items() if theirs in preprocess}
    return CLIPConfig(vision=vision, text=text, decoder=decoder, **prepared, **model_cfg)


def _vision_read(data: dict[str, Any]) -> VisionConfig:
    name = data.get("timm_model_name") or ""
    head = (data.get("timm_pool", "avg"), data.get("timm_proj", "linear"))
    if _SIGLIP_NAME.fullmatch(name) and head == ("map", "none") and not data.get("timm_model_pretrained"):
        rest = {k: v for k, v in data.items() if not k.startswith("timm_") and k != "image_size"}
        native = siglip_vision(name, data.get("image_size"))
        known = {f.name: getattr(native, f.name) for f in fields(native)}
        return _tower_read(VisionConfig, known | rest, "vision_cfg")
    return _tower_read(VisionConfig, data, "vision_cfg")


def _siglip_written(vision: VisionConfig) -> dict[str, Any] | None:
    """A native SigLIP tower of published shape in timm's terms, as open_clip builds it; None for others."""
    for name, sizes in _SIGLIP_SIZES.items():
        timm_name = f"vit_{name}_siglip_{vision.image_size}"
        if vision.image_size in sizes and vision == siglip_vision(timm_name):
            head = {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
            return {"image_size": vision.image_size, "timm_model_name": timm_name, **head}
    return None


def _tower_written(config: VisionConfig | TextConfig | DecoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default is not MISSING else {}
        if f.name in _ALWAYS[type(config)] or value != default:
            values[f.name] = list(value) if isinstance(value, tuple) else value
    if "norm_eps" in values:
        values["norm_kwargs"] = {"eps": values.pop("norm_eps")}
    if values.pop("gelu_tanh", False):
        values["act_kwargs"] = {"approximate": "tanh"}
    return values


def _tower_read(kind: type[_T], data: dict[str, Any], where: str) -> _T:
    norm, act = data.get("norm_kwargs") or {}, data.get("act_kwargs") or {}
    if norm.keys() == {"eps"}:
        data = data | {"norm_eps": norm["eps"], "norm_kwargs": {}}
    if act == {"approximate": "tanh"}:
        data = data | {"gelu_tanh": True, "act_kwargs": {}}
    defaults = {f.name: f.default if f.default is not MISSING else {} for f in fields(kind)}
    values = {}
    for key, value in data.items():
        if key in defaults:
            values[key] = _plain(key, value, defaults[key], where)
        elif key not in _ABSENT:
            raise ValueError(f"unknown key {key!r} in {where}{nearest(key, defaults)}")
        elif value != _ABSENT[key] and value is not None:
            raise ValueError(f"{key} in {where} must be {_ABSENT[key]!r} (nothing else is supported), was {value!r}")
    return kind(**values)


def _plain(key: str, value: Any, default: Any, where: str) -> Any:
    """open_clip writes null for what does not apply, and a square as two sides."""
    if key == "image_size" and isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"image_size in {where} must be a square, was {tuple(value)}")
        return int(value[0])
    if value is None and key in ("timm_proj", "timm_pool", "hf_proj_type"):
        return ""
    return default if value is None else value
