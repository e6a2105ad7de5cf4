"""Training batches whose content depends on (seed, step) only.

Sample order belongs to (seed, epoch): the global batch of a step is a slice of the epoch's permutation, and a rank
takes its contiguous part of it, so any number of ranks sees the same global batches and a run resumes at any step by
starting there. Crop and caption belong to (seed, epoch, key), never to a worker. Samples are read by place, so there
may be more workers or ranks than shards. The last `num_samples % global_batch` samples of an epoch's order are left
out, other ones each epoch.
"""

import signal
from collections import Counter
from collections.abc import Generator, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fastclip.data.edits import CaptionEdits
from fastclip.data.shards import Sample, ShardIndex, ShardSpec
from fastclip.data.streams import Stream, hash64, permutation
from fastclip.data.tokenizer import Tokenizer
from fastclip.data.transforms import decode_image, train_pixels

Batch = dict[str, Any]
MAX_REPLACEMENTS = 100
EDITS_LEARN_FROM = 2000  # samples


class BrokenSample(ValueError):
    """A sample that cannot be used; the argument is the cause it is counted under."""


def captions_of(sample: Sample) -> list[str]:
    """The usable captions: the list `captions` of the JSON if there is one, else the text.

    Errors: `BrokenSample`, "missing_caption" or "empty_caption".
    """
    listed = sample.meta.get("captions")
    found = listed if isinstance(listed, list) and listed else [sample.text]
    texts = [caption for caption in found if isinstance(caption, str)]
    if not texts:
        raise BrokenSample("missing_caption")
    if not (usable := [caption for caption in texts if caption.strip()]):
        raise BrokenSample("empty_caption")
    return usable


class _Steps:
    """The sampler: step numbers from `start` on, for ever."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return count(self.start)


class Loader(Dataset[Batch]):
    """Batches of one rank, by step: `loader[step]`, or a prefetched stream of them, `loader.batches(start_step)`.

    A batch is {"image": uint8 (B, 3, S, S), "text": int64 (B, context_length), "keys": list[str], "epoch": int} with
    B = global_batch / world_size; with `hard_negatives` also "negative_text", like "text": captions that are false for
    their image (see `edits`). A sample that cannot be used is replaced by one of the same epoch from outside the global
    batch, and counted by cause in `skipped` (unreadable_image, empty_caption, missing_caption, unreadable_shard;
    truncated_caption counts captions cut to the context length, which are used). Rank 0 also counts what the shards'
    scan left out, so the sum over ranks is right.

    Errors: `FileNotFoundError`; `ValueError` for shards without data, fewer samples than `global_batch`, or arguments
    out of range.
    """

    def __init__(
        self,
        shards: ShardSpec,
        tokenizer: Tokenizer,
        image_size: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 1,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        hard_negatives: bool = False,
    ) -> None:
        least = {"image_size": (image_size, 1), "global_batch": (global_batch, 1), "workers": (workers, 0)}
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name}: must be at least {low}, was {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: must be in [0, world_size = {world_size}), was {rank}")
        if global_batch % world_size:
            raise ValueError(f"global_batch: must be a multiple of world_size = {world_size}, was {global_batch}")
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: must be 0 < low <= high <= 1, was {crop_scale}")
        self.index = ShardIndex(shards, split="train")
        if len(self.index) < global_batch:
            raise ValueError(
                f"global_batch: was {global_batch}; it must be at most {len(self.index)}, "
                f"the number of samples in {len(self.index.paths)} shard(s)"
            )
        self.tokenizer = tokenizer
        self.image_size, self.global_batch, self.crop_scale = image_size, global_batch, crop_scale
        self.rank, self.world_size, self.seed, self.workers = rank, world_size, seed, workers
        self.skipped: Counter[str] = Counter(self.index.skipped if rank == 0 else {})
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._edits = CaptionEdits(self._some_captions()) if hard_negatives else None

    @property
    def num_samples(self) -> int:
        """Samples in the shards."""
        return len(self.index)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_samples // self.global_batch

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of step `start_step` and all later ones, without end; closing the generator ends the workers."""
        stream = DataLoader(
            self,
            batch_size=None,
            sampler=_Steps(start_step),
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in stream:
            if "error" in batch:
                raise ValueError(batch["error"])
            self.skipped.update(batch.pop("skipped"))
            yield batch

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps so that the run goes on with the batch of `step`, JSON-ready."""
        return {
            "step": step,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "num_samples": self.num_samples,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """The step to go on with; `ValueError` if seed, global batch or data are not those of `state`."""
        for name in ("seed", "global_batch", "num_samples"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: was {getattr(self, name)}; it must be {state[name]}, as in the checkpoint")
        self.skipped = Counter(state["skipped"] if self.rank == 0 else {})
        return state["step"]

    def __getitem__(self, step: int) -> Batch:
        """This rank's batch of `step` with its own "skipped" counts, or {"error": message} where none can be made."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        first, local = place * self.global_batch, self.global_batch // self.world_size
        mine = order[first + self.rank * local : first + (self.rank + 1) * local]
        images = torch.empty(local, 3, self.image_size, self.image_size, dtype=torch.uint8)
        rows = images.numpy()
        keys: list[str] = []
        captions: list[str] = []
        skipped: Counter[str] = Counter()
        for row, number in enumerate(mine.tolist()):
            try:
                key, rows[row], caption = self._usable(number, epoch, first, skipped)
            except BrokenSample as error:
                return {"error": str(error)}
            keys.append(key)
            captions.append(caption)
        text, cut = self.tokenizer.batch(captions)
        skipped["truncated_caption"] += cut
        batch = {"image": images, "text": text, "keys": keys, "epoch": epoch, "skipped": +skipped}
        if self._edits:
            streams = (Stream("edit", self.seed, epoch, key) for key in keys)
            edited = [self._edits.edited(*pair) for pair in zip(captions, streams, strict=True)]
            batch["negative_text"] = self.tokenizer(edited)
        return batch

    def _some_captions(self) -> Iterator[str]:
        """Captions of some samples at even distances."""
        count = min(self.num_samples, EDITS_LEARN_FROM)
        for place in range(count):
            try:
                yield from captions_of(self.index.read(place * self.num_samples // count))
            except (BrokenSample, OSError):
                continue

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch_order[0] != epoch:
            self._epoch_order = epoch, permutation(self.num_samples, "order", self.seed, epoch)
        return self._epoch_order[1]

    def _usable(self, number: int, epoch: int, first: int, skipped: Counter[str]) -> tuple[str, np.ndarray, str]:
        """Sample `number`, or the first usable one of its replacements."""
        rest = self.num_samples - self.global_batch
        broken = number
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self._load(number, epoch)
            except BrokenSample as error:
                skipped[str(error)] += 1
            draw = hash64("replace", self.seed, epoch, broken, attempt)
            number = int(self._order(epoch)[(first - 1 - draw % max(rest, 1)) % self.num_samples])
        raise BrokenSample(
            f"shards: sample {self.index.key(broken)!r} in {self.index.path(broken)!r} cannot be used, "
            f"nor can {MAX_REPLACEMENTS - 1} others drawn for it: {dict(skipped)}"
        )

    def _load(self, number: int, epoch: int) -> tuple[str, np.ndarray, str]:
        try:
            sample = self.index.read(number)
        except OSError as error:
            raise BrokenSample("unreadable_shard") from error
        stream = Stream(self.seed, epoch, sample.key)
        caption = stream.choice(captions_of(sample))
        try:
            image = decode_image(sample.image)
        except ValueError as error:
            raise BrokenSample("unreadable_image") from error
        return sample.key, train_pixels(image, self.image_size, self.crop_scale, stream), caption


def _leave_signals_to_parent(worker: int) -> None:
    """A signal to the whole process group stops the trainer in order, and that one still wants a batch or ends us."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch
