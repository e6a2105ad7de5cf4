"""Features of held-out data: every rank encodes its share of the batches and gets all the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.data import Tokenizer, normalize_image
from fastclip.data.transforms import eval_pixels
from fastclip.models import CLIP, CLIPConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastclip.evaluation.sets import ImageSource

Forward = Callable[[Tensor | None, Tensor | None], dict[str, Tensor]]


class Encoder:
    """Turns images and texts into features (N, embed_dim), fp32, of unit length, on the CPU, the same on every rank.

    Batches are cut the same way whatever the number of ranks, so that the features do not depend on it; each rank makes
    the same number of forwards, as ZeRO-3 needs.

    Args:
        forward: CLIP.forward(image, text, output_dict=True), or an engine's; None stands for the absent side.
        config: of the model; gives the image size and normalisation.
        device, dtype: of the pixels that `forward` takes.
        group: process group to share the work with.
        batch_size: images or texts a forward.
    """

    def __init__(
        self,
        forward: Forward,
        config: CLIPConfig,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
        batch_size: int = 256,
    ) -> None:
        self.forward, self.config, self.tokenizer = forward, config, tokenizer
        self.model: CLIP | None = None  # where there is one beside the function
        self.device, self.dtype, self.group, self.batch_size = torch.device(device), dtype, group, batch_size

    @classmethod
    def of_model(
        cls,
        model: CLIP,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 256,
    ) -> Encoder:
        """An encoder of one process: moves `model` to `device` and `dtype` and puts it in eval mode."""
        model = model.to(device=device, dtype=dtype).eval()

        def forward(image: Tensor | None, text: Tensor | None) -> dict[str, Tensor]:
            outputs = model(image, text, output_dict=True)
            assert isinstance(outputs, dict)
            return outputs

        encoder = cls(forward, model.config, tokenizer, device=device, dtype=dtype, batch_size=batch_size)
        encoder.model = model
        return encoder

    def images(self, source: ImageSource) -> Tensor:
        """Features of all images of a held-out set (images, embed_dim)."""
        return self._encode(len(source), lambda start, stop: self._image_batch(source.images(start, stop)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts (texts, embed_dim)."""
        return self._encode(len(texts), lambda start, stop: self._text_batch(list(texts[start:stop])))

    def image(self, image: Image) -> Tensor:
        """Features of one picture (embed_dim,)."""
        pixels = torch.from_numpy(eval_pixels(image.convert("RGB"), self.config.vision.image_size).copy())
        return self._encode(1, lambda start, stop: self._image_batch(pixels[None]))[0]

    @torch.no_grad()
    def logit_scale(self) -> float:
        """The factor itself, not its logarithm."""
        return float(self._forward_of_texts(["a"])["logit_scale"])

    def _image_batch(self, pixels: Tensor) -> Tensor:
        config = self.config
        image = normalize_image(pixels.to(self.device), config.image_mean, config.image_std, self.dtype)
        return self.forward(image, None)["image_features"]

    def _text_batch(self, texts: list[str]) -> Tensor:
        return self._forward_of_texts(texts)["text_features"]

    def _forward_of_texts(self, texts: list[str]) -> dict[str, Tensor]:
        ids = self.tokenizer(texts, self.config.text.context_length)
        return self.forward(None, ids.to(self.device))

    @torch.no_grad()
    def _encode(self, count: int, encode: Callable[[int, int], Tensor]) -> Tensor:
        rank = 0 if self.group is None else dist.get_rank(self.group)
        world_size = 1 if self.group is None else dist.get_world_size(self.group)
        features = torch.zeros(count, self.config.embed_dim, device=self.device)
        starts = range(0, count, self.batch_size)
        for place in range(rank, -(-len(starts) // world_size) * world_size, world_size):
            is_real = place < len(starts)  # else a forward that only keeps the ranks in step
            start = starts[place] if is_real else 0
            batch = encode(start, min(start + self.batch_size, count)).float()
            if is_real:
                features[start : start + len(batch)] = batch
        if self.group is not None:
            dist.all_reduce(features, group=self.group)  # every row is one rank's, zero on the others
        return features.cpu()
