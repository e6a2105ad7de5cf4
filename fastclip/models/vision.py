"""CLIP's Vision Transformer (Dosovitskiy et al. 2021; Radford et al. 2021), with an optional convolutional stem."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.config import VisionConfig
from fastclip.models.transformer import Transformer


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches times one matrix: a convolution whose stride is its kernel, without bias."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__(in_channels, width, patch_size, stride=patch_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, width), patches row by row.

        Contiguous images go through one large product; channels-last maps through the convolution, which reads them
        in place.
        """
        if not x.is_contiguous():
            return super().forward(x).flatten(2).transpose(1, 2)
        batch, channels, height, width = x.shape
        p = self.kernel_size[0]
        patches = x.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(batch, -1, channels * p * p), self.weight.flatten(1))


class ConvStem(nn.Sequential):
    """Stride-2 3x3 convolutions with ReLU ("Early Convolutions Help Transformers See Better", Xiao et al. 2021).

    Without the paper's batch norm: chunks of a cached batch must not see each other's statistics.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for inner, outer in pairwise((3, *widths)):
            conv = nn.Conv2d(inner, outer, 3, stride=2, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.ReLU()]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, widths[-1], H / 2^n, W / 2^n), channels last."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class VisionTransformer(nn.Module):
    """Images to features: patches, class token, positions, ln_pre, blocks, ln_post, projection.

    With pool_type "tok" the last block and ln_post run on the class token alone, which is exact.
    """

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        assert isinstance(config.layers, int)
        self.config = config
        width, scale = config.width, config.width**-0.5
        if config.conv_stem:
            self.conv_stem = ConvStem(config.conv_stem)
        stride = 2 ** len(config.conv_stem)
        self.conv1 = PatchEmbed((3, *config.conv_stem)[-1], width, config.patch_size // stride)
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, config.layers, width // config.head_width, config.mlp_ratio, "quick_gelu" if quick_gelu else "gelu"
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> features (B, embed_dim), not L2-normalised."""
        x = self.conv1(self.conv_stem(image) if self.config.conv_stem else image)
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat((class_token, x), dim=1) + self.positional_embedding.to(x.dtype)
        if self.training and self.config.patch_dropout:
            x = self._drop_patches(x)
        x = self.ln_pre(x)
        if self.config.pool_type == "tok":
            class_rows = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
            pooled = self.ln_post(self.transformer(x, pool_rows=class_rows))
        else:
            pooled = self.ln_post(self.transformer(x))[:, 1:].mean(1)
        return pooled @ self.proj

    def _drop_patches(self, x: Tensor) -> Tensor:
        """Keep the class token and a random subset of the patches, drawn on the device for each image."""
        batch, patches = x.shape[0], x.shape[1] - 1
        kept = max(1, int(patches * (1 - self.config.patch_dropout)))
        chosen = torch.rand(batch, patches, device=x.device).topk(kept, dim=1).indices + 1
        index = torch.cat((chosen.new_zeros(batch, 1), chosen), dim=1)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
