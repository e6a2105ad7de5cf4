"""What the tests of the models share: small configs, captions, and open_clip as a peer."""

from __future__ import annotations

import torch
from peers import open_clip_module
from torch import Tensor, nn

from fastclip.models import CLIPConfig, TextConfig, VisionConfig

TEXT = TextConfig(context_length=12, vocab_size=50, width=48, heads=3, layers=2)
VIT = CLIPConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=24, patch_size=8, layers=2, width=32, head_width=16),
    text=TEXT,
)
RESNET = CLIPConfig(
    embed_dim=24, vision=VisionConfig(image_size=64, layers=(1, 2, 1, 1), width=8, head_width=32), text=TEXT
)


def captions(config: CLIPConfig, lengths: tuple[int, ...] = (3, 12, 7, 1, 5)) -> Tensor:
    """Token ids that end with the largest id of the vocabulary, zeros behind it."""
    ids = torch.zeros(len(lengths), config.text.context_length, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, config.text.vocab_size - 1, (length,))
        row[length - 1] = config.text.vocab_size - 1
    return ids


def images(config: CLIPConfig, batch: int = 5) -> Tensor:
    return torch.randn(batch, 3, config.vision.image_size, config.vision.image_size)


def perturbed(model: nn.Module) -> nn.Module:
    """Every parameter moved away from zeros and ones, so that a forgotten bias or gain cannot hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def gradients(model: nn.Module, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradient of a fixed random combination of the outputs for every parameter they depend on, by name."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in outputs)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    used = {name: value for name, value in zip(names, found, strict=True) if value is not None}
    return {name: value.reshape(()) if name == "logit_scale" else value for name, value in used.items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Same names, and every entry within `tolerance` of the other in relative norm.

    The bias of a key has no effect on a softmax: what rounding makes of its zero gradient is held against 1 % of the
    largest entry.
    """
    assert ours.keys() == theirs.keys()
    floor = 0.01 * max(value.norm() for value in theirs.values())
    for name, value in ours.items():
        error = (value - theirs[name]).norm() / theirs[name].norm().clamp(min=floor)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def open_clip_model(config: CLIPConfig) -> nn.Module:
    """open_clip's CLIP of the same config, with random weights."""
    return open_clip_module("open_clip.model").CLIP(**config.to_dict()["model_cfg"])
