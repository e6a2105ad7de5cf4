"""Held-out data in its own order, for evaluation: every image once, every caption of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.data.loader import BrokenSample, captions_of
from fastclip.data.shards import ShardIndex, ShardSpec
from fastclip.data.tokenizer import Tokenizer
from fastclip.data.transforms import decode_image, eval_pixels


def eval_batch(
    numbers: Sequence[int], image_file: Callable[[int], bytes], image_size: int, skipped: Counter[str]
) -> Tensor:
    """Images that `image_file` reads: uint8 (n, 3, S, S). One that cannot be decoded is mid-gray and counted."""
    out = torch.full((len(numbers), 3, image_size, image_size), 128, dtype=torch.uint8)
    for row, number in zip(out.numpy(), numbers, strict=True):
        try:
            row[:] = eval_pixels(decode_image(image_file(number)), image_size)
        except (ValueError, OSError):
            skipped["unreadable_image"] += 1
    return out


class EvalSet:
    """Images and captions of some shards, by number, the same on every rank; a rank asks for the range it wants.

    `len(eval_set)` images; `captions` (all texts in image order), `caption_image` int64 (texts,): the image of each;
    `keys`, `records` (the JSON of each image), `labels` int64 (images,) or None where a record has no "label".
    Samples without a caption are left out and counted in `skipped`. An image that cannot be decoded becomes mid-gray,
    and is counted, when it is read: the figures of an evaluation can only fall, and all ranks keep the same numbering.
    """

    def __init__(self, shards: ShardSpec, tokenizer: Tokenizer, image_size: int) -> None:
        self._index = ShardIndex(shards)
        self._tokenizer, self._image_size = tokenizer, image_size
        self.skipped: Counter[str] = Counter(self._index.skipped)
        self.keys: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.captions: list[str] = []
        self._numbers: list[int] = []
        owners: list[int] = []
        for number in range(len(self._index)):
            sample = self._index.read(number)
            try:
                captions = captions_of(sample)
            except BrokenSample as error:
                self.skipped[str(error)] += 1
                continue
            owners += [len(self._numbers)] * len(captions)
            self._numbers.append(number)
            self.keys.append(sample.key)
            self.records.append(sample.meta)
            self.captions += captions
        if not self._numbers:
            raise ValueError(f"shards: no usable sample in {self._index.paths[0]!r} ...; {dict(self.skipped)}")
        self.caption_image = torch.tensor(owners)
        labels = [record.get("label") for record in self.records]
        self.labels = torch.tensor(labels) if all(isinstance(label, int) for label in labels) else None

    def __len__(self) -> int:
        return len(self._numbers)

    def images(self, start: int, stop: int) -> Tensor:
        """Images start..stop - 1: uint8 (n, 3, S, S), shorter side resized, centre cut out."""
        return eval_batch(
            self._numbers[start:stop], lambda number: self._index.read(number).image, self._image_size, self.skipped
        )

    def texts(self, start: int, stop: int) -> Tensor:
        """Captions start..stop - 1: int64 (n, context_length)."""
        return self._tokenizer(self.captions[start:stop])

    def image_file(self, number: int) -> bytes:
        """The image file of image `number` as it lies in its shard, for a gallery."""
        return self._index.read(self._numbers[number]).image
