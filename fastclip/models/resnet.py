"""CLIP's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling (Radford et al. 2021)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastclip.models.config import VisionConfig
from fastclip.ops.attention import pooled_attention

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a residual; a stride is an average pool in front of the last one."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, planes * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * EXPANSION)
        nn.init.zeros_(self.bn3.weight)
        self.downsample: nn.Module | None = None
        if stride > 1 or inplanes != planes * EXPANSION:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(inplanes, planes * EXPANSION, 1, bias=False)),
                        ("1", nn.BatchNorm2d(planes * EXPANSION)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inplanes, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Attention with one query, the mean token, over the mean token and every place of the map."""

    def __init__(self, places: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, embed_dim)."""
        places = x.flatten(2).transpose(1, 2)  # (B, H * W, C)
        tokens = torch.cat((places.mean(1, keepdim=True), places), dim=1) + self.positional_embedding
        q = self.q_proj(tokens[:, 0]).unflatten(-1, (self.heads, -1))
        kv = torch.stack((self.k_proj(tokens), self.v_proj(tokens)), dim=2).unflatten(-1, (self.heads, -1))
        return self.c_proj(pooled_attention(q, kv).flatten(-2))


class ModifiedResNet(nn.Module):
    """Images to features. Names and initialisation are OpenAI's (biases of the attention pool keep PyTorch's)."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        assert isinstance(config.layers, tuple)
        width = config.width
        self._reruns_blocks = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = _stage(width, width, config.layers[0], stride=1)
        self.layer2 = _stage(width * 4, width * 2, config.layers[1], stride=2)
        self.layer3 = _stage(width * 8, width * 4, config.layers[2], stride=2)
        self.layer4 = _stage(width * 16, width * 8, config.layers[3], stride=2)
        channels = width * 8 * EXPANSION
        self.attnpool = AttentionPool(config.grid**2, channels, channels // config.head_width, embed_dim)

    def set_recompute(self, mode: str) -> None:
        """With "full" backward keeps the input of each bottleneck and runs it again; running statistics move once."""
        self._reruns_blocks = mode == "full"

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, embed_dim), not L2-normalised."""
        x = F.relu(self.bn1(self.conv1(image)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = _checkpointed(block, x) if self._reruns_blocks and torch.is_grad_enabled() else block(x)
        return self.attnpool(x)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_held(block)

    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _statistics_held(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise with the batch but do not count it again."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _stage(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inplanes, planes, stride)
    return nn.Sequential(first, *(Bottleneck(planes * EXPANSION, planes) for _ in range(blocks - 1)))
