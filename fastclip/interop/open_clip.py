"""open_clip's way in: one call for a model and the transforms that belong to it, one for its tokenizer."""

from __future__ import annotations

import html
import os
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastclip.data import get_tokenizer as data_tokenizer
from fastclip.data.tokenizer import CLIP_VOCAB_SIZE
from fastclip.data.transforms import Preprocess
from fastclip.models import CLIP, CLIPConfig, create_model, get_config
from fastclip.models.config import TextConfig
from fastclip.models.factory import find_model
from fastclip.models.files import HUB, LOCAL, locate, tokenizer_files
from fastclip.models.presets import is_named

if TYPE_CHECKING:
    from fastclip.data import Tokenizer

TRAIN_CROP_SCALE = (0.9, 1.0)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def create_model_and_transforms(
    name: str | CLIPConfig,
    *,
    checkpoint: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    packed_text: bool = True,
    force_image_size: int | None = None,
    force_context_length: int | None = None,
) -> tuple[CLIP, Preprocess, Preprocess]:
    """(model, preprocess_train, preprocess_val), as open_clip returns them.

    A transform takes a PIL image and gives a normalised float32 (3, S, S): a random crop of 90 to 100 % of the area for
    training; for evaluation what the model's `preprocess_cfg` says (by default the shorter side to S, then the centre).
    Arguments and errors are those of `create_model`.
    """
    model = create_model(
        name,
        checkpoint=checkpoint,
        dtype=dtype,
        device=device,
        packed_text=packed_text,
        force_image_size=force_image_size,
        force_context_length=force_context_length,
    )
    evaluate = preprocess_of(model.config)
    train = Preprocess(evaluate.image_size, evaluate.mean, evaluate.std, crop_scale=TRAIN_CROP_SCALE)
    return model, train, evaluate


def preprocess_of(config: CLIPConfig) -> Preprocess:
    """The evaluation transform that a config describes."""
    return Preprocess(
        config.vision.image_size,
        config.image_mean,
        config.image_std,
        interpolation=config.interpolation,  # type: ignore[arg-type]
        resize_mode=config.resize_mode,  # type: ignore[arg-type]
        fill_color=config.fill_color,
    )


def get_tokenizer(name: str | os.PathLike[str], context_length: int | None = None) -> Tokenizer | HFTokenizer:
    """The tokenizer of a model: `tokenizer(texts, context_length=None) -> int64 (B, L)`.

    name: a model ("ViT-B-16", "ViT-B-16-SigLIP"), `hf-hub:ORG/NAME`, `local-dir:PATH`, or what
        `fastclip.data.get_tokenizer` takes: a file or folder with a tokenizer, or "clip".
    context_length: instead of the model's.
    A model whose config names a tokenizer of the Hugging Face hub has that one (transformers), others CLIP's BPE.
    Raises ValueError for an unknown name, FileNotFoundError for files that are not there or cannot be downloaded.
    """
    text = os.fspath(name)
    if text.startswith((HUB, LOCAL)):
        folder = locate(text)
        assert folder is not None
        config = find_model(text)[0].text
        return _of_model(config, context_length or config.context_length, folder)
    if is_named(text):
        config = get_config(text).text
        return _of_model(config, context_length or config.context_length, None)
    return data_tokenizer(name, context_length)


class HFTokenizer:
    """A tokenizer of transformers with the call of ours: padded or cut to `context_length`."""

    def __init__(self, source: str, context_length: int, options: dict[str, Any]) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModuleNotFoundError(f"the tokenizer {source} needs transformers: pip install transformers") from error
        options = dict(options)
        self._clean = options.pop("clean", "whitespace")
        self._strips_separator = options.pop("strip_sep_token", False)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"tokenizer {source!r} is neither a folder, nor in the local Hugging Face cache, nor can it be "
                f"downloaded: {str(error).splitlines()[0]}"
            ) from error
        self.context_length = context_length
        self.vocab_size = len(self.tokenizer)

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        cleaned = [_cleaned(text, self._clean) for text in ([texts] if isinstance(texts, str) else texts)]
        ids = self.tokenizer(
            cleaned,
            return_tensors="pt",
            max_length=context_length or self.context_length,
            padding="max_length",
            truncation=True,
        ).input_ids
        if self._strips_separator:
            ids = torch.where(ids == self.tokenizer.sep_token_id, torch.zeros_like(ids), ids)
        return ids


def _of_model(config: TextConfig, context_length: int, folder: Path | None) -> Tokenizer | HFTokenizer:
    if folder is not None and tokenizer_files(folder):
        if "tokenizer.json" in tokenizer_files(folder) and not config.hf_tokenizer_name:
            return data_tokenizer(folder, context_length)
        return HFTokenizer(str(folder), context_length, config.tokenizer_kwargs)
    if config.hf_tokenizer_name:
        return HFTokenizer(config.hf_tokenizer_name, context_length, config.tokenizer_kwargs)
    if config.vocab_size != CLIP_VOCAB_SIZE:
        where = folder or "the model's config"
        raise FileNotFoundError(
            f"tokenizer: there is none in {where}, and a vocabulary of {config.vocab_size} is not CLIP's: "
            "give the path of its tokenizer.json"
        )
    return data_tokenizer("clip", context_length)


def _cleaned(text: str, way: str) -> str:
    """open_clip's cleaning: HTML escapes undone, one space; "canonicalize" (SigLIP's): lower case, no punctuation."""
    text = html.unescape(html.unescape(text))
    if way == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION).lower()
    return " ".join(text.split())
