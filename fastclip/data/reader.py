"""A job of places to a batch: what a worker process does, and all that it knows."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from fastclip.data.captions import CaptionChoice
from fastclip.data.device_decode import JpegCrop, jpeg_crop, packed
from fastclip.data.edits import CaptionEdits
from fastclip.data.faults import BrokenSample, Tally
from fastclip.data.scan import Sample
from fastclip.data.sources import SampleReader
from fastclip.data.streams import Stream
from fastclip.data.tokenizer import Tokenizer
from fastclip.data.transforms import TrainTransform

Batch = dict[str, Any]
MAX_REPLACEMENTS = 100


@dataclass(frozen=True)
class Job:
    """The samples of one rank's batch, and what may stand in for those that are broken.

    `shard` and `number` are int64 (1 + spares, B): row 0 the batch, the others its replacements; a shard is a place in
    `names`, `sources` and `firsts`, the number that its first sample has in all of the data. `occurrence` int64 (B,)
    tells apart the occurrences of one sample in an epoch, None where there is only one.
    """

    step: int
    epoch: int
    names: list[str]
    sources: list[int]
    firsts: list[int]
    shard: np.ndarray
    number: np.ndarray
    occurrence: np.ndarray | None


class _Loaded(NamedTuple):
    key: str
    image: np.ndarray | JpegCrop
    caption: str
    arrays: list[np.ndarray]
    number: int = 0  # in all of the data


@dataclass
class BatchReader:
    """Makes batches; one per process.

    `arrays`: the stored arrays that a batch holds, suffix and shape. `leaves_jpegs`: plain JPEGs are handed over
    as "encoded" with their crops, and "image" holds the others alone; see `device_decode`.
    """

    readers: list[SampleReader]
    tokenizer: Tokenizer
    transform: TrainTransform
    captions: CaptionChoice
    seed: int
    arrays: dict[str, tuple[int, ...]] = field(default_factory=dict)
    edits: CaptionEdits | None = None
    leaves_jpegs: bool = False

    def __getitem__(self, job: Job) -> Batch:
        """The batch with "skipped" counts, "examples" of them and how many were "replaced"; {"error": message} where
        none can be made."""
        size, image_size = job.shard.shape[1], self.transform.size
        images = torch.empty(size, 3, image_size, image_size, dtype=torch.uint8)
        rows = images.numpy()
        loaded: list[_Loaded] = []
        crops: dict[int, JpegCrop] = {}
        tally = Tally()
        for place in range(size):
            try:
                sample = self._usable(job, place, tally)
            except BrokenSample as error:
                return {"error": str(error)}
            if isinstance(sample.image, JpegCrop):
                crops[place] = sample.image
            else:
                row = place - len(crops)
                rows[row] = sample.image
                sample = sample._replace(image=rows[row])
            loaded.append(sample)
        keys, captions = [sample.key for sample in loaded], [sample.caption for sample in loaded]
        text, cut = self.tokenizer.batch(captions)
        tally.counts["truncated_caption"] += cut
        index = torch.tensor([sample.number for sample in loaded])
        batch = {"image": images, "text": text, "index": index, "keys": keys, "epoch": job.epoch}
        if self.leaves_jpegs:  # a view would travel with all of its memory
            batch |= {"image": images[: size - len(crops)].clone(), "encoded": packed(crops)}
        for number, suffix in enumerate(self.arrays):
            stacked = np.stack([sample.arrays[number] for sample in loaded])
            batch[suffix.removesuffix(".npy")] = torch.from_numpy(stacked)
        if self.edits:
            streams = (Stream("edit", self.seed, job.epoch, key) for key in keys)
            edited = [self.edits.edited(*pair) for pair in zip(captions, streams, strict=True)]
            batch["negative_text"] = self.tokenizer(edited)
        return batch | tally.in_batch()

    def _usable(self, job: Job, place: int, tally: Tally) -> _Loaded:
        """Sample `place` of the batch, or the first usable one of its replacements."""
        spares, size = job.shard.shape
        tried: set[tuple[int, int]] = set()
        for attempt in range(min(MAX_REPLACEMENTS, 1 + (spares - 1) * size)):
            # its own replacements first, then those of its neighbours
            across, row = divmod(attempt - 1, spares - 1) if attempt else (0, -1)
            row, column = row + 1, (place + across) % size
            shard, number = int(job.shard[row, column]), int(job.number[row, column])
            if (shard, number) in tried:
                continue
            tried.add((shard, number))
            occurrence = None if job.occurrence is None else int(job.occurrence[place])
            try:
                sample = self._load(job.sources[shard], job.names[shard], number, job.epoch, occurrence, tally)
                return sample._replace(number=job.firsts[shard] + number)
            except BrokenSample as error:
                tally.replaced += attempt == 0
                detail = f" ({error.detail})" if error.detail else ""
                tally.add(str(error), f"{number} of {job.names[shard]!r}{detail}")
        first = f"sample {int(job.number[0, place])} of {job.names[job.shard[0, place]]!r}"
        raise BrokenSample(f"shards: {first} cannot be used, nor can {len(tried) - 1} others: {dict(tally.counts)}")

    def _load(self, source: int, shard: str, number: int, epoch: int, occurrence: int | None, tally: Tally) -> _Loaded:
        try:
            sample = self.readers[source].read(shard, number)
        except OSError as error:
            raise BrokenSample("unreadable_shard", error) from error
        try:
            return self._prepare(sample, epoch, occurrence, tally)
        except BrokenSample as error:
            raise BrokenSample(str(error), f"{sample.key!r} {error.detail}".strip()) from error

    def _prepare(self, sample: Sample, epoch: int, occurrence: int | None, tally: Tally) -> _Loaded:
        names = (self.seed, epoch, sample.key) if occurrence is None else (self.seed, epoch, sample.key, occurrence)
        stream = Stream(*names)
        caption = self.captions.of(sample, stream)
        arrays = [stored_array(sample, suffix, shape) for suffix, shape in self.arrays.items()]
        image = jpeg_crop(sample.image, self.transform, stream) if self.leaves_jpegs else None
        return _Loaded(sample.key, self.transform(sample.image, stream) if image is None else image, caption, arrays)


def stored_array(sample: Sample, suffix: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A stored `.npy` of floats as float32, never a pickle. Errors: `BrokenSample`, missing_array, unreadable_array."""
    if suffix not in sample.arrays:
        raise BrokenSample("missing_array", suffix)
    try:
        array = np.load(io.BytesIO(sample.arrays[suffix]), allow_pickle=False)
        if array.dtype.kind != "f" or (shape is not None and array.shape != shape):
            raise ValueError(f"{suffix} holds {array.dtype} {array.shape}, must be float {shape}")
        return array.astype(np.float32)
    except Exception as error:  # on hostile bytes NumPy may raise anything
        raise BrokenSample("unreadable_array", error) from error


def array_shapes(samples: Iterable[Sample], suffixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each stored array, as the first sample has it that has them all. Errors: `ValueError`."""
    offered: set[str] = set()
    for sample in samples:
        try:
            return {suffix: stored_array(sample, suffix).shape for suffix in suffixes}
        except BrokenSample:
            offered |= set(sample.arrays)
    raise ValueError(f"arrays: no sample holds {' and '.join(suffixes)}; there are {sorted(offered) or 'none'}")
