"""Towers that are not ours: a trunk of timm, a text model of transformers, or any module with a width.

`CLIP` takes them as `visual` and `text`; they train under GradCache and ZeRO and are saved as its other weights are.
Names in the state dict are those of open_clip's adapters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastclip.models.clip import CLIP
from fastclip.models.config import CLIPConfig, TextConfig, VisionConfig

POOLERS = ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler")


def wrap(
    config: CLIPConfig,
    *,
    visual: nn.Module | None = None,
    visual_width: int | None = None,
    text: nn.Module | None = None,
    text_width: int | None = None,
) -> CLIP:
    """A `CLIP` whose image or text tower is a module of one's own, with a projection to `config.embed_dim` behind it.

    visual: takes images (B, 3, S, S) and returns (B, visual_width); S is `config.vision.image_size`.
    text: takes token ids (B, L) and returns (B, text_width); L and the vocabulary are those of `config.text`.
    A tower that is not given is the config's. The saved config names the module; a checkpoint of such a model is loaded
    by `load_weights` into a model made by this function.
    """
    image_tower = text_tower = None
    if visual is not None:
        image_tower = WrappedTower(visual, _width("visual_width", visual_width), config.embed_dim)
        config = replace(config, vision=replace(config.vision, module=_name(visual)))
    if text is not None:
        text_tower = WrappedTower(text, _width("text_width", text_width), config.embed_dim)
        config = replace(config, text=replace(config.text, module=_name(text)))
    return CLIP(config, visual=image_tower, text=text_tower)


class WrappedTower(nn.Module):
    """`trunk`, and a matrix from its width to `embed_dim`."""

    def __init__(self, trunk: nn.Module, width: int, embed_dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = width
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(width, embed_dim, bias=False)))

    def forward(self, x: Tensor) -> Tensor:
        """What the trunk takes -> (B, embed_dim). ValueError when the trunk does not return (B, width)."""
        pooled = self.trunk(x)
        if not isinstance(pooled, Tensor) or pooled.shape != (x.shape[0], self.width):
            shape = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(f"{_name(self.trunk)} must return ({x.shape[0]}, {self.width}), returned {shape}")
        return self.head(pooled)


class TimmTower(nn.Module):
    """A model of timm as image tower, by open_clip's options (`timm_model_name`, `timm_pool`, `timm_proj`, ...)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        timm = _package("timm", config.timm_model_name)
        pool, proj = config.timm_pool, config.timm_proj
        is_attention = pool in ("abs_attn", "rot_attn")
        options: dict[str, Any] = {}
        if config.timm_drop_path is not None:
            options["drop_path_rate"] = config.timm_drop_path
        if config.patch_dropout:
            options["patch_drop_rate"] = config.patch_dropout
        if not is_attention and proj in ("", "none"):  # the classifier of the model, if any, projects
            options |= {"num_classes": 0 if proj == "none" else embed_dim, "global_pool": pool}
        try:
            self.trunk: Any = timm.create_model(
                config.timm_model_name, pretrained=config.timm_model_pretrained, **options
            )
        except RuntimeError as error:
            raise ValueError(f"timm_model_name: timm has no model {config.timm_model_name!r} ({error})") from error
        head: OrderedDict[str, nn.Module] = OrderedDict()
        if "num_classes" not in options:
            width = self._without_classifier(pool, is_attention)
            if is_attention:
                head["pool"] = self._attention_pool(timm, pool, width, embed_dim)
                width = embed_dim
            if proj == "linear":
                head["drop"] = nn.Dropout(config.timm_drop)
                head["proj"] = nn.Linear(width, embed_dim, bias=config.timm_proj_bias)
            elif proj == "mlp":
                head["mlp"] = timm.layers.Mlp(
                    width, 2 * embed_dim, embed_dim, drop=(config.timm_drop, 0), bias=(True, config.timm_proj_bias)
                )
        self.head = nn.Sequential(head)
        self._take_size(config.image_size)

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, embed_dim), not L2-normalised."""
        return self.head(self.trunk(image))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)

    def _without_classifier(self, pool: str, is_attention: bool) -> int:
        reset = {"global_pool": "" if is_attention else pool} if pool else {}
        self.trunk.reset_classifier(0, **reset)
        return self.trunk.num_features

    def _attention_pool(self, timm: Any, pool: str, width: int, embed_dim: int) -> nn.Module:
        size = self.trunk.default_cfg.get("pool_size")
        if not size:
            raise ValueError(f"timm_pool {pool!r} needs a feature map, {type(self.trunk).__name__} has none")
        if pool == "abs_attn":
            return timm.layers.AttentionPool2d(width, feat_size=size, out_features=embed_dim)
        return timm.layers.RotAttentionPool2d(width, out_features=embed_dim)

    def _take_size(self, image_size: int) -> None:
        """Tell a model whose positions depend on it that its images have another size than it was made for."""
        own = self.trunk.default_cfg.get("input_size", (3, image_size, image_size))[-1]
        if own != image_size and hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(img_size=(image_size, image_size))


class HFTextTower(nn.Module):
    """A text model of transformers as text tower, by open_clip's options (`hf_model_name`, `hf_pooler_type`, ...).

    model: the module itself; default made by its name, from the local cache where the hub cannot be reached.
    """

    def __init__(self, config: TextConfig, embed_dim: int, model: nn.Module | None = None) -> None:
        super().__init__()
        if config.hf_pooler_type not in POOLERS:
            raise ValueError(f"hf_pooler_type must be one of {', '.join(POOLERS)}, was {config.hf_pooler_type!r}")
        self.pooler = config.hf_pooler_type
        self.transformer: Any = model or _hf_model(config)
        own: Any = self.transformer.config
        width = int(getattr(own, "hidden_size", None) or own.d_model)
        self.pad_token_id = int(own.pad_token_id or 0)
        self.proj: nn.Module
        if config.hf_proj_type == "linear":
            self.proj = nn.Linear(width, embed_dim, bias=False)
        elif config.hf_proj_type == "mlp":
            hidden = (width + embed_dim) // 2
            self.proj = nn.Sequential(
                nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
            )
        elif width == embed_dim:
            self.proj = nn.Identity()
        else:
            raise ValueError(f'hf_proj_type must be "linear" or "mlp": the width {width} is not embed_dim {embed_dim}')

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), padded with the model's own padding id -> (B, embed_dim), not L2-normalised."""
        mask = ids.ne(self.pad_token_id).long()
        output = self.transformer(input_ids=ids, attention_mask=mask)
        return self.proj(self._pooled(output, mask))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            self.transformer.gradient_checkpointing_enable()
        else:
            self.transformer.gradient_checkpointing_disable()

    def _pooled(self, output: Any, mask: Tensor) -> Tensor:
        hidden = output.last_hidden_state
        if self.pooler == "mean_pooler":
            return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(-1, keepdim=True)
        if self.pooler == "max_pooler":
            return hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
        own = getattr(output, "pooler_output", None)
        return own if self.pooler == "cls_pooler" and own is not None else hidden[:, 0]


def _hf_model(config: TextConfig) -> nn.Module:
    transformers = _package("transformers", config.hf_model_name)
    try:
        own = transformers.AutoConfig.from_pretrained(config.hf_model_name)
        if own.is_encoder_decoder:
            kind = transformers.AutoModel
            model = kind.from_pretrained(config.hf_model_name) if config.hf_model_pretrained else kind.from_config(own)
            return model.encoder
        pooled = {"add_pooling_layer": config.hf_pooler_type == "cls_pooler"}
        if config.hf_model_pretrained:
            return transformers.AutoModel.from_pretrained(config.hf_model_name, **pooled)
        return transformers.AutoModel.from_config(own, **pooled)
    except OSError as error:
        raise FileNotFoundError(
            f"hf_model_name {config.hf_model_name!r} is neither a folder, nor in the local Hugging Face cache, nor can "
            f"it be downloaded: {str(error).splitlines()[0]}"
        ) from error


def _package(name: str, model: str) -> Any:
    import importlib

    try:
        importlib.import_module(f"{name}.layers" if name == "timm" else name)
    except ImportError as error:
        raise ModuleNotFoundError(f"the tower {model!r} needs {name}: pip install {name} ({error})") from error
    return importlib.import_module(name)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _width(argument: str, width: int | None) -> int:
    if width is None or width < 1:
        raise ValueError(f"{argument} must be the channels that the module returns, was {width}")
    return width
