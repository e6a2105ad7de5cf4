"""The two encoders of CLIP, their configurations and their files."""

from fastclip.models.checkpoint import LoadedModel, load_checkpoint, load_weights, save_model
from fastclip.models.clip import CLIP
from fastclip.models.config import CLIPConfig, DecoderConfig, TextConfig, VisionConfig
from fastclip.models.factory import create_model
from fastclip.models.files import resolve_checkpoint
from fastclip.models.presets import PRESETS, get_config
from fastclip.models.wrapped import wrap

__all__ = [
    "CLIP",
    "PRESETS",
    "CLIPConfig",
    "DecoderConfig",
    "LoadedModel",
    "TextConfig",
    "VisionConfig",
    "create_model",
    "get_config",
    "load_checkpoint",
    "load_weights",
    "resolve_checkpoint",
    "save_model",
    "wrap",
]
