"""The model of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from fastclip.models import CLIP, CLIPConfig, get_config
from fastclip.models.checkpoint import empty_model
from fastclip.training.config import TrainConfig

SIGMOID_SCALE, SIGMOID_BIAS = math.log(10), -10.0  # Zhai et al. 2023, section 3.2


def model_of(config: TrainConfig) -> CLIPConfig:
    """The named model, with what `config` changes of it."""
    model = get_config(config.model)
    image_size, dropout = config.image_size or model.vision.image_size, config.patch_dropout
    dropout = model.vision.patch_dropout if dropout < 0 else dropout
    vision = replace(model.vision, image_size=image_size, patch_dropout=dropout)
    text = replace(model.text, context_length=config.context_length or model.text.context_length)
    model = replace(model, vision=vision, text=text)
    if config.sigmoid_weight and model.init_logit_bias is None:
        return replace(model, init_logit_scale=SIGMOID_SCALE, init_logit_bias=SIGMOID_BIAS)
    return model


def model_without_memory(config: CLIPConfig) -> CLIP:
    """A model on the CPU whose weights have their shapes and one number each."""
    model = empty_model(config)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty((), dtype=p.dtype).expand(p.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    return model
