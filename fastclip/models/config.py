"""What a CLIP model is made of: frozen dataclasses that read and write open_clip's JSON (`open_clip_config.json`).

Field names are open_clip's where it has the field, so that its model configs load here and ours load there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """An image tower: a Vision Transformer, CLIP's ModifiedResNet when `layers` is a tuple, or a wrapped model."""

    image_size: int = 224
    """Height and width of the input in pixels."""
    layers: int | tuple[int, ...] = 12
    """Number of Transformer blocks, or the number of bottlenecks in each of the four stages of a ModifiedResNet."""
    width: int = 768
    """Channels of a token; for a ModifiedResNet the channels behind its stem."""
    head_width: int = 64
    """Channels of one attention head."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of `width` (rounded down)."""
    patch_size: int = 16
    """Pixels along the edge of a patch; not used by a ModifiedResNet."""
    pool_type: str = "tok"
    """"tok": the class token; "avg": the mean of the patch tokens; "map": SigLIP's attention with one learned query,
    without class token and ln_pre; "flatten": all patch tokens, each with a projection of its own,
    without class token."""
    patch_dropout: float = 0.0
    """Share of patch tokens left out of each training image (FLIP, Li et al. 2023)."""
    ls_init_value: float | None = None
    """Initial value of LayerScale; None for blocks without it."""
    no_ln_pre: bool = False
    """No LayerNorm in front of the blocks (CLIPA)."""
    final_ln_after_pool: bool = False
    """ln_post on the pooled token instead of on all of them; changes the result of "avg" alone (CLIPA)."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm; `norm_kwargs` in open_clip's JSON."""
    gelu_tanh: bool = False
    """GELU's tanh approximation; `act_kwargs` in open_clip's JSON."""
    conv_stem: tuple[int, ...] = ()
    """Channels of stride-2 3x3 convolutions in front of the patch product (Xiao et al. 2021); not in open_clip."""
    attentional_pool: bool = False
    """Learned queries over all tokens behind the blocks (CoCa); the first is the image's feature."""
    attn_pooler_queries: int = 256
    """How many of them."""
    attn_pooler_heads: int = 8
    """Heads of their attention."""
    timm_model_name: str = ""
    """A model of timm to wrap; the fields above but `image_size` and `patch_dropout` are then not used."""
    timm_model_pretrained: bool = False
    """Start from timm's weights, which it downloads."""
    timm_pool: str = "avg"
    """Pooling of the timm model; "" for its own, "abs_attn" or "rot_attn" for an attention pool that projects."""
    timm_proj: str = "linear"
    """Projection to `embed_dim`: "linear", "mlp", "none", or "" for the classifier of the timm model."""
    timm_proj_bias: bool = False
    """Whether that projection has a bias."""
    timm_drop: float = 0.0
    """Dropout in front of that projection."""
    timm_drop_path: float | None = None
    """Stochastic depth of the timm model; None for its default."""
    module: str = ""
    """Name of an own module that is the image tower; such a model is built in code, not from its config."""

    def __post_init__(self) -> None:
        check_positive(self, "image_size", "width", "head_width", "mlp_ratio", "patch_size", "norm_eps")
        object.__setattr__(self, "layers", tuple(self.layers) if isinstance(self.layers, list) else self.layers)
        object.__setattr__(self, "conv_stem", tuple(self.conv_stem))
        if not 0.0 <= self.patch_dropout < 1.0:
            raise ValueError(f"patch_dropout must be in [0, 1), was {self.patch_dropout}")
        check_choice("pool_type", self.pool_type, ("tok", "avg", "map", "flatten"))
        check_choice("timm_proj", self.timm_proj, ("linear", "mlp", "none", ""))
        if self.is_wrapped:
            return
        if self.is_resnet:
            self._check_resnet()
        else:
            self._check_transformer()

    def _check_transformer(self) -> None:
        if self.width % self.head_width:
            raise ValueError(f"width must be a multiple of head_width ({self.head_width}), was {self.width}")
        # SigLIP's So400m was published with 384 pixels and patches of 14: it does not see the last 6
        if self.image_size % self.patch_size and self.pool_type != "map":
            raise ValueError(f"image_size must be a multiple of patch_size ({self.patch_size}), was {self.image_size}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size must be at least patch_size ({self.patch_size}), was {self.image_size}")
        if self.attentional_pool and self.pool_type != "tok":
            raise ValueError(f'pool_type must be "tok" with attentional_pool, was {self.pool_type!r}')
        if self.patch_dropout and self.pool_type == "flatten":
            raise ValueError('patch_dropout must be 0 with pool_type "flatten", which has a weight for every patch')
        if self.patch_size % 2 ** len(self.conv_stem):
            raise ValueError(
                f"patch_size must be a multiple of {2 ** len(self.conv_stem)}, the stride of conv_stem "
                f"{self.conv_stem}, was {self.patch_size}"
            )

    def _check_resnet(self) -> None:
        assert isinstance(self.layers, tuple)
        if len(self.layers) != 4:
            raise ValueError(f"layers of a ModifiedResNet must name its four stages, was {self.layers}")
        if self.image_size % 32:
            raise ValueError(f"image_size of a ModifiedResNet must be a multiple of 32, was {self.image_size}")
        if self.width * 32 % self.head_width:
            raise ValueError(f"32 * width must be a multiple of head_width ({self.head_width}), was {32 * self.width}")
        has_option = self.conv_stem or self.patch_dropout or self.pool_type != "tok" or self.attentional_pool
        if has_option or self.ls_init_value is not None:
            raise ValueError(
                "conv_stem, patch_dropout, pool_type, attentional_pool and ls_init_value are options of a Vision "
                "Transformer alone"
            )

    @property
    def is_resnet(self) -> bool:
        return isinstance(self.layers, tuple) and not self.is_wrapped

    @property
    def is_wrapped(self) -> bool:
        return bool(self.timm_model_name or self.module)

    @property
    def grid(self) -> int:
        """Patches along the edge of an image; places along the edge of a ModifiedResNet's last map."""
        return self.image_size // (32 if self.is_resnet else self.patch_size)


@dataclass(frozen=True)
class TextConfig:
    """A text tower: CLIP's causal Transformer, SigLIP's bidirectional one, or a wrapped model."""

    context_length: int = 77
    """Most tokens of a caption, start and end of text included."""
    vocab_size: int = 49408
    """Number of token ids; end-of-text is the largest id a caption holds."""
    width: int = 512
    """Channels of a token."""
    heads: int = 8
    """Number of attention heads."""
    layers: int = 12
    """Number of Transformer blocks."""
    mlp_ratio: float = 4.0
    """Hidden channels of the MLP, as a multiple of `width` (rounded down)."""
    pool_type: str = "argmax"
    """"argmax": the token with the largest id (CLIP's end-of-text); "eos": the first `eos_id`; "last": the last one."""
    eos_id: int = 2
    """The id that pool_type "eos" looks for."""
    embed_cls: bool = False
    """A learned class token behind the caption, which is the text's feature (CoCa)."""
    pad_id: int = 0
    """The id of padding, which that class token does not look at and no caption loss counts."""
    no_causal_mask: bool = False
    """Every token sees every other, padding included (SigLIP, CLIPA)."""
    proj_bias: bool = False
    """Whether the projection to `embed_dim` has a bias."""
    ls_init_value: float | None = None
    """Initial value of LayerScale; None for blocks without it."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm; `norm_kwargs` in open_clip's JSON."""
    gelu_tanh: bool = False
    """GELU's tanh approximation; `act_kwargs` in open_clip's JSON."""
    hf_tokenizer_name: str = ""
    """The tokenizer on the Hugging Face hub that belongs to the model; "" for CLIP's BPE."""
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    """Options of that tokenizer."""
    hf_model_name: str = ""
    """A text model of transformers to wrap; the fields above but the tokenizer's are then not used."""
    hf_model_pretrained: bool = True
    """Start from its weights on the hub, which transformers downloads."""
    hf_proj_type: str = "mlp"
    """Projection to `embed_dim`: "linear", "mlp", or "" for none."""
    hf_pooler_type: str = "mean_pooler"
    """"mean_pooler", "max_pooler", "cls_pooler" (the model's own) or "cls_last_hidden_state_pooler"."""
    module: str = ""
    """Name of an own module that is the text tower; such a model is built in code, not from its config."""

    def __post_init__(self) -> None:
        check_positive(self, "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_eps")
        check_choice("pool_type", self.pool_type, ("argmax", "eos", "last"))
        check_choice("hf_proj_type", self.hf_proj_type, ("linear", "mlp", ""))
        if self.embed_cls and (self.no_causal_mask or self.is_wrapped):
            raise ValueError("embed_cls is an option of the causal text tower alone")
        if self.width % self.heads and not self.is_wrapped:
            raise ValueError(f"width must be a multiple of heads ({self.heads}), was {self.width}")

    @property
    def is_wrapped(self) -> bool:
        return bool(self.hf_model_name or self.module)

    @property
    def why_not_packed(self) -> str | None:
        """Why captions cannot be cut to their true length without changing the features, or None."""
        if self.is_wrapped:
            return "the text tower is a wrapped model, which takes padded ids"
        if self.embed_cls:
            return "embed_cls puts a class token behind the padding"
        if self.no_causal_mask:
            return "no_causal_mask lets every token see the padding"
        if self.pool_type == "last":
            return 'pool_type "last" pools the padding'
        return None


@dataclass(frozen=True)
class DecoderConfig:
    """CoCa's decoder of captions: causal blocks over the text tower's tokens, each with one that looks at the image."""

    width: int = 512
    """Channels of a token; the text tower's, and those of the image's tokens."""
    heads: int = 8
    """Number of attention heads."""
    layers: int = 12
    """Number of blocks of each kind."""
    ls_init_value: float | None = None
    """Initial value of LayerScale; None for blocks without it."""

    def __post_init__(self) -> None:
        check_positive(self, "width", "heads", "layers")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads ({self.heads}), was {self.width}")


@dataclass(frozen=True)
class CLIPConfig:
    """Two towers, the space they share, and how images are prepared for them."""

    embed_dim: int = 512
    """Dimension of the shared space of image and text features."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The image tower."""
    text: TextConfig = field(default_factory=TextConfig)
    """The text tower."""
    decoder: DecoderConfig | None = None
    """A decoder of captions behind both towers (CoCa); `multimodal_cfg` in open_clip's JSON."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) instead of GELU: what OpenAI's weights were trained with."""
    init_logit_scale: float = math.log(1 / 0.07)
    """Initial value of the logit_scale parameter, a natural logarithm."""
    init_logit_bias: float | None = None
    """Initial value of the logit_bias parameter of a sigmoid loss; None for a model without one."""
    custom_text: bool = False
    """Files hold the text tower's entries under "text.", as open_clip's CustomTextCLIP does."""
    image_mean: tuple[float, ...] = OPENAI_MEAN
    """Per-channel mean subtracted from images in [0, 1]."""
    image_std: tuple[float, ...] = OPENAI_STD
    """Per-channel standard deviation images are divided by."""
    interpolation: str = "bicubic"
    """How images are resized: "bicubic" or "bilinear"."""
    resize_mode: str = "shortest"
    """"shortest": the shorter side to the size, then the centre; "longest": the longer, filled up; "squash": both."""
    fill_color: int = 0
    """What "longest" fills up with."""

    def __post_init__(self) -> None:
        check_positive(self, "embed_dim")
        for name in ("image_mean", "image_std"):
            value = tuple(float(x) for x in getattr(self, name))
            if len(value) != 3 or (name == "image_std" and min(value) <= 0):
                raise ValueError(f"{name} must be three numbers (positive for image_std), was {value}")
            object.__setattr__(self, name, value)
        check_choice("interpolation", self.interpolation, ("bicubic", "bilinear"))
        check_choice("resize_mode", self.resize_mode, ("shortest", "longest", "squash"))
        if self.vision.pool_type == "map" and not self.vision.is_wrapped and self.vision.width != self.embed_dim:
            raise ValueError(
                f'embed_dim must be the width of a "map" tower ({self.vision.width}), was {self.embed_dim}'
            )

        if self.decoder is not None:
            self._check_decoder(self.decoder)

    def _check_decoder(self, decoder: DecoderConfig) -> None:
        vision, text = self.vision, self.text
        if vision.is_wrapped or vision.is_resnet or vision.pool_type != "tok" or not text.embed_cls:
            raise ValueError('a decoder needs a Vision Transformer of pool_type "tok" and a text tower with embed_cls')
        image_width = self.embed_dim if vision.attentional_pool else vision.width
        if not decoder.width == text.width == image_width:
            raise ValueError(
                f"width of the decoder must be that of text and of the image's tokens ({text.width}, {image_width}), "
                f"was {decoder.width}"
            )

    def act(self, tower: VisionConfig | TextConfig) -> str:
        """The activation of a tower, one of `transformer.ACTIVATIONS`."""
        return "quick_gelu" if self.quick_gelu else "gelu_tanh" if tower.gelu_tanh else "gelu"

    def to_dict(self) -> dict[str, Any]:
        """The content of `open_clip_config.json`: {"model_cfg": ..., "preprocess_cfg": ...}.

        Options are written only where they differ from their default, SigLIP's image towers under timm's names.
        """
        from fastclip.models.config_json import written

        return written(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CLIPConfig:
        """Read what `to_dict` writes, or a bare open_clip model config.

        Raises ValueError naming the nearest key for an unknown one.
        """
        from fastclip.models.config_json import read

        return read(data)


def nearest(name: str, known: Any) -> str:
    """The end of an error message about an unknown name: the nearest known one, or all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"


def check_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, was {getattr(config, name)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices[:-1]) + f' or "{choices[-1]}"'
        raise ValueError(f"{name} must be {listed}, was {value!r}")
