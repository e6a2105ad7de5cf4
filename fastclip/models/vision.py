"""CLIP's Vision Transformer (Dosovitskiy et al. 2021; Radford et al. 2021), CLIPA's and SigLIP's."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastclip.models.coca import AttentionalPooler
from fastclip.models.config import VisionConfig
from fastclip.models.transformer import MLP, LayerNorm, Transformer
from fastclip.ops.attention import pooled_attention


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches times one matrix: a convolution whose stride is its kernel."""

    def __init__(self, in_channels: int, width: int, patch_size: int, bias: bool = False) -> None:
        super().__init__(in_channels, width, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, N, width), patches row by row; pixels behind the last whole patch are not seen.

        kept: (B, K) patches to compute, the others are left out before the product: (B, K, width).
        Contiguous images go through one large product; channels-last maps through the convolution, which reads them
        in place.
        """
        if not x.is_contiguous() and kept is None:
            return super().forward(x).flatten(2).transpose(1, 2)
        p = self.kernel_size[0]
        batch, channels, rows, columns = x.shape[0], x.shape[1], x.shape[2] // p, x.shape[3] // p
        patches = x[:, :, : rows * p, : columns * p].reshape(batch, channels, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
        if kept is not None:
            patches = patches[torch.arange(batch, device=x.device)[:, None], kept // columns, kept % columns]
        return F.linear(patches.reshape(batch, -1, channels * p * p), self.weight.flatten(1), self.bias)


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


class LatentPool(nn.Module):
    """SigLIP's pooling ("MAP"): attention of one learned query over all tokens, then a residual MLP.

    Names are timm's (`AttentionPoolLatent`).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, act: str, norm_eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = LayerNorm(width, norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), act)
        nn.init.trunc_normal_(self.latent, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) -> (B, W)."""
        q = self.q(self.latent[0]).expand(x.shape[0], -1).unflatten(-1, (self.heads, -1))
        kv = self.kv(x).unflatten(-1, (2, self.heads, -1))
        pooled = self.proj(pooled_attention(q, kv).flatten(-2))
        return pooled + self.mlp(pooled, self.norm)


class VisionTransformer(nn.Module):
    """Images to features: patches, class token, positions, ln_pre, blocks, ln_post, projection.

    With pool_type "tok" the last block and ln_post run on the class token alone, which is exact; with an attentional
    pool behind the blocks they run on all. With "map" there is no class token, no ln_pre and no projection; with
    "flatten" no class token, and a projection of its own for each of the N patches, summed and divided by sqrt(N).
    """

    def __init__(self, config: VisionConfig, embed_dim: int, act: str = "gelu") -> None:
        super().__init__()
        assert isinstance(config.layers, int)
        self.config = config
        width, scale, heads = config.width, config.width**-0.5, config.width // config.head_width
        self.has_class_token = config.pool_type not in ("map", "flatten")
        if config.conv_stem:
            self.conv_stem = ConvStem(config.conv_stem)
        stride = 2 ** len(config.conv_stem)
        patch = config.patch_size // stride
        self.conv1 = PatchEmbed((3, *config.conv_stem)[-1], width, patch, bias=not self.has_class_token)
        if self.has_class_token:
            self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(config.grid**2 + self.has_class_token, width))
        has_ln_pre = config.pool_type != "map" and not config.no_ln_pre
        self.ln_pre = LayerNorm(width, config.norm_eps) if has_ln_pre else nn.Identity()
        self.transformer = Transformer(
            width, config.layers, heads, config.mlp_ratio, act, config.norm_eps, config.ls_init_value
        )
        pooled = embed_dim if config.attentional_pool else width
        self.attn_pool: AttentionalPooler | LatentPool
        if config.attentional_pool:
            queries = config.attn_pooler_queries
            self.attn_pool = AttentionalPooler(embed_dim, config.attn_pooler_heads, width, queries, config.norm_eps)
        self.ln_post = LayerNorm(pooled, config.norm_eps)
        if config.pool_type == "flatten":
            self.proj = nn.Parameter(scale * torch.randn(config.grid**2 * pooled, embed_dim))
        elif self.has_class_token:
            self.proj = nn.Parameter(scale * torch.randn(pooled, embed_dim))
        else:
            self.attn_pool = LatentPool(width, heads, config.mlp_ratio, act, config.norm_eps)

    def forward(self, image: Tensor, with_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised images (B, 3, S, S) -> features (B, embed_dim), not L2-normalised.

        with_tokens: also what a decoder of captions looks at, (B, M, embed_dim) of an attentional pool, else
            (B, M, width); for pool_type "tok".
        """
        x = self.ln_pre(self._tokens(image))
        if self.config.attentional_pool or with_tokens:
            x = self.transformer(x)
            if self.config.attentional_pool:
                x = self.attn_pool(x, None if with_tokens else 1)
            x = self.ln_post(x)
            features = x[:, 0] @ self.proj
            return (features, x[:, 1:]) if with_tokens else features
        if self.config.pool_type == "tok":
            class_rows = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
            return self.ln_post(self.transformer(x, pool_rows=class_rows)) @ self.proj
        x = self.transformer(x)
        if self.config.pool_type == "flatten":
            return (self.ln_post(x) / self.config.grid).flatten(1) @ self.proj
        if not self.has_class_token:
            return self.attn_pool(self.ln_post(x))
        if self.config.final_ln_after_pool:
            pooled = self.ln_post(x[:, 1:].mean(1))
        else:
            pooled = self.ln_post(x)[:, 1:].mean(1)
        return pooled @ self.proj

    def _tokens(self, image: Tensor) -> Tensor:
        """Patches with their positions behind the class token: (B, N, W); in training without the dropped ones."""
        kept = self._kept_patches(image) if self.training and self.config.patch_dropout else None
        x = self.conv1(self.conv_stem(image) if self.config.conv_stem else image, kept)
        positions = self.positional_embedding.to(x.dtype)
        if not self.has_class_token:
            return x + (positions if kept is None else positions[kept])
        class_token = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        if kept is None:
            return torch.cat((class_token, x), dim=1) + positions
        return torch.cat((class_token + positions[0], x + positions[1:][kept]), dim=1)

    def _kept_patches(self, image: Tensor) -> Tensor:
        """A random subset of the patches of each image, drawn on its device: (B, K) int64."""
        patches = self.config.grid**2
        kept = max(1, int(patches * (1 - self.config.patch_dropout)))
        return torch.rand(image.shape[0], patches, device=image.device).topk(kept, dim=1).indices
