"""Training batches whose content depends on (seed, step) only.

Sample order belongs to (seed, epoch): the global batch of a step is a slice of the epoch's order (see `order`), and a
rank takes its contiguous part of it, so any number of ranks sees the same global batches and a run resumes at any step
by starting there. Crop and caption belong to (seed, epoch, key), never to a worker. Samples are read by place, so there
may be more workers or ranks than shards. The last `num_samples % global_batch` samples of an epoch's order are left
out, other ones each epoch.
"""

import hashlib
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fastclip.data.captions import CaptionChoice, captions_of
from fastclip.data.edits import CaptionEdits
from fastclip.data.faults import BrokenSample, Faults
from fastclip.data.options import DataOptions
from fastclip.data.order import Order, Places
from fastclip.data.reader import Batch, BatchReader, Job, array_shapes
from fastclip.data.scan import Sample
from fastclip.data.shards import ShardSpec
from fastclip.data.sources import make_sources
from fastclip.data.tokenizer import Tokenizer
from fastclip.data.transforms import TrainTransform

__all__ = ["Batch", "BrokenSample", "Loader", "captions_of"]

SPARES = 8  # replacements that belong to each sample of a batch
EDITS_LEARN_FROM = 2000  # samples


class Loader:
    """Batches of one rank, by step: `loader[step]`, or a prefetched stream of them, `loader.batches(start_step)`.

    A batch is {"image": uint8 (B, 3, S, S), "text": int64 (B, context_length), "index": int64 (B,), "keys": list[str],
    "epoch": int} with B = global_batch / world_size and index the number of each sample in all of the data, below
    `data_size`; with `hard_negatives` also "negative_text", like "text": captions that are false for their image (see
    `edits`); with `options.arrays` also those. A sample that cannot be used is replaced by the next of its stream, the
    same place of the next global batch (or by one that the epoch leaves out), and counted by cause in `skipped`
    (truncated_caption counts captions cut to the context length, which are used). `seen` counts samples by source. Rank
    0 also counts what the shards' scan left out, so the sum over ranks is right. With `options.decoder` "image" lies on
    its device.

    `data`: see `sources.make_sources`. Errors: `FileNotFoundError`; `ValueError` for data without samples, fewer of
    them than `global_batch`, or arguments out of range.
    """

    def __init__(
        self,
        data: ShardSpec,
        tokenizer: Tokenizer,
        image_size: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        workers: int = 1,
        crop_scale: tuple[float, float] | None = None,
        hard_negatives: bool = False,
        options: DataOptions | None = None,
    ) -> None:
        options = options or DataOptions()
        if crop_scale is not None:
            options = replace(options, crop_scale=crop_scale)
        least = {"image_size": (image_size, 1), "global_batch": (global_batch, 1), "workers": (workers, 0)}
        for name, (value, low) in least.items():
            if value < low:
                raise ValueError(f"{name}: must be at least {low}, was {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: must be in [0, world_size = {world_size}), was {rank}")
        if global_batch % world_size:
            raise ValueError(f"global_batch: must be a multiple of world_size = {world_size}, was {global_batch}")
        self.sources = make_sources(data, "train", options.fetcher, options.image_key, options.caption_key)
        self.image_size, self.global_batch, self.options = image_size, global_batch, options
        self.rank, self.world_size, self.seed, self.workers = rank, world_size, seed, workers
        self._counts = np.concatenate([source.counts for source in self.sources])
        self._starts = np.cumsum(self._counts) - self._counts  # the first sample of each shard
        self._firsts = np.cumsum([0] + [len(source.counts) for source in self.sources])  # shard of each source
        self.order = self._make_order()
        self.faults = Faults(options.strict, options.max_broken)
        self.seen: Counter[str] = Counter()
        if rank == 0:
            for source in self.sources:
                self.faults.add(source.skipped, source.examples)
        self._reader = BatchReader(
            [source.reader for source in self.sources],
            tokenizer,
            TrainTransform(
                image_size, options.crop_scale, options.crop_ratio, options.color, options.erase, options.fast_decode
            ),
            CaptionChoice(options.text_keys),
            seed,
        )
        self._reader.leaves_jpegs = options.decoder is not None
        if options.arrays:
            self._reader.arrays = array_shapes(self._some_samples(), options.arrays)
        if hard_negatives:
            self._reader.edits = CaptionEdits(self._some_captions())

    def _make_order(self) -> Order:
        """The order of the epochs. Errors: `ValueError` where no epoch can be made."""
        options, samples, shards = self.options, int(self._counts.sum()), len(self._counts)
        factors = None
        if options.upsampling:
            if len(options.upsampling) != len(self.sources):
                raise ValueError(
                    f"upsampling: must be {len(self.sources)} numbers, one for each source, was {options.upsampling}"
                )
            factors = np.repeat(options.upsampling, np.diff(self._firsts))
        if not samples or (factors is not None and not (factors * self._counts).any()):
            left_out = dict(sum((source.skipped for source in self.sources), Counter[str]()))
            raise ValueError(
                f"shards: no sample in {shards} file(s), the first is {self.sources[0].name(0)!r}, left out: "
                f"{left_out}; a shard is an uncompressed tar of key.png|jpg, key.txt and key.json members"
            )
        order = Order(self._counts, self.seed, factors, options.window, options.resampled)
        if order.num_samples < self.global_batch:
            raise ValueError(
                f"global_batch: was {self.global_batch}; it must be at most {order.num_samples}, "
                f"the number of samples in {shards} shard(s)"
            )
        return order

    @property
    def skipped(self) -> Counter[str]:
        """Samples skipped or changed, by cause."""
        return self.faults.counts

    @skipped.setter
    def skipped(self, counts: Counter[str]) -> None:
        self.faults.counts = counts

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return self.order.num_samples

    @property
    def data_size(self) -> int:
        """Samples in all of the data, of which an epoch may hold more or fewer."""
        return int(self._counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_samples // self.global_batch

    def describe(self) -> str:
        """The arithmetic of an epoch, for a person."""
        local, left = self.global_batch // self.world_size, self.num_samples % self.global_batch
        parts = ", ".join(
            f"{source.title}: {int(source.counts.sum()):,} in {len(source.counts):,}" for source in self.sources[:4]
        )
        decoder = self.options.decoder
        drawn = " drawn with replacement" if self.options.resampled else ""
        return (
            f"{self.num_samples:,} pairs{drawn} in {len(self._counts):,} shards ({parts}), {self.steps_per_epoch:,} "
            f"steps an epoch of {self.global_batch:,} = {self.world_size} ranks x {local:,}, {self.workers} workers"
            + (f", JPEGs decoded on {decoder.device}" if decoder else "")
            + (f"; {left:,} pairs are left out each epoch, other ones each time" if left else "")
        )

    def fingerprint(self) -> str:
        """Changes with what the order depends on: counts, seed, and how samples are drawn. The same on every rank."""
        options = self.options
        digest = hashlib.sha256(self._counts.tobytes())
        digest.update(repr((self.seed, options.upsampling, options.resampled, options.window)).encode())
        return digest.hexdigest()[:16]

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of step `start_step` and all later ones, without end; closing the generator ends the workers.

        Errors: `ValueError` where no batch can be made, or too much is broken (`strict`, `max_broken`).
        """
        stream: DataLoader[Batch] = DataLoader(
            self._reader,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Jobs(self, start_step),
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            collate_fn=_unchanged,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=torch.cuda.is_available(),
        )
        for step, batch in zip(count(start_step), stream):
            if "error" in batch:
                raise ValueError(batch["error"])
            batch = self._decoded(batch)
            self.seen.update(self._sources_of(step))
            self.faults.add(batch.pop("skipped"), batch.pop("examples"), batch.pop("replaced"), read=len(batch["keys"]))
            yield batch

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps so that the run goes on with the batch of `step`, JSON-ready.

        "skipped" and "seen" are this rank's; what loads them takes them for the sum over ranks.
        """
        return {
            "step": step,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "num_samples": self.num_samples,
            "fingerprint": self.fingerprint(),
            "skipped": dict(self.skipped),
            "seen": dict(self.seen),
        }

    def load_state_dict(self, state: dict[str, Any]) -> int:
        """The step to go on with; `ValueError` if seed, global batch or data are not those of `state`."""
        for name in ("seed", "global_batch", "num_samples"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name}: was {getattr(self, name)}; it must be {state[name]}, as in the checkpoint")
        if state.get("fingerprint", self.fingerprint()) != self.fingerprint():
            raise ValueError("data: its shards, upsampling, resampling or window are not those of the checkpoint")
        self.skipped = Counter(state["skipped"] if self.rank == 0 else {})
        self.seen = Counter(state.get("seen", {}) if self.rank == 0 else {})
        return state["step"]

    def __getitem__(self, step: int) -> Batch:
        """This rank's batch of `step` with its own "skipped" counts, or {"error": message} where none can be made."""
        return self._decoded(self._reader[self.job(step)])

    def _decoded(self, batch: Batch) -> Batch:
        """The batch with the pixels of all its images."""
        decoder = self.options.decoder
        return batch if decoder is None or "error" in batch else decoder(batch)

    def job(self, step: int) -> Job:
        """The places of this rank's batch of `step`, and of what may stand in for broken samples."""
        epoch, place = divmod(step, self.steps_per_epoch)
        local = self.global_batch // self.world_size
        positions = place * self.global_batch + np.arange(self.global_batch)
        slots = np.arange(self.rank * local, (self.rank + 1) * local)
        if not self.order.is_whole:
            # neighbours in shard order to one rank: a machine reads its part of the shards, not all of them
            slots = np.argsort(self.order.places(epoch, positions).shard, kind="stable")[slots]
        wanted = np.stack([positions, *islice(self._spares(epoch, positions), SPARES)])[:, slots]
        places = self.order.places(epoch, wanted.ravel())
        shards, inverse = np.unique(places.shard, return_inverse=True)
        owners = np.searchsorted(self._firsts, shards, side="right") - 1
        names = [
            self.sources[s].name(i - self._firsts[s]) for s, i in zip(owners.tolist(), shards.tolist(), strict=True)
        ]
        return Job(
            step,
            epoch,
            names,
            owners.tolist(),
            self._starts[shards].tolist(),
            inverse.reshape(wanted.shape),
            places.number.reshape(wanted.shape),
            wanted[0] if self.options.resampled or self.options.upsampling else None,
        )

    def _spares(self, epoch: int, positions: np.ndarray) -> Iterator[np.ndarray]:
        """Positions to replace those of a global batch, in turn.

        First, where that is no other part of the data, the samples that the epoch leaves out; then the same place of
        the next global batches. No two places of a batch are given the same one while there are enough batches.
        """
        used = self.steps_per_epoch * self.global_batch
        left_out = self.num_samples - used
        turned = (positions + positions // self.global_batch) % self.global_batch
        following = (positions[0] + self.global_batch + np.arange(self.global_batch)) % used
        has_own = (turned < left_out) & self.order.is_whole
        yield np.where(has_own, used + turned, following)
        for turn in count(1 if self.steps_per_epoch > 1 else 0):
            yield (positions + turn * self.global_batch + (turn + 1) * (self.steps_per_epoch == 1)) % used

    def _places(self, places: Places) -> Iterator[tuple[int, str, int]]:
        """(source, shard name, number) of each place."""
        for shard, number in zip(places.shard.tolist(), places.number.tolist(), strict=True):
            source = int(np.searchsorted(self._firsts, shard, side="right")) - 1
            yield source, self.sources[source].name(shard - int(self._firsts[source])), number

    def places_of(self, step: int) -> Iterator[tuple[int, str, int]]:
        """(source, shard name, number) of the samples of `step` and later ones, as their order has them."""
        for later in count(step):
            job = self.job(later)
            for shard, number in zip(job.shard[0].tolist(), job.number[0].tolist(), strict=True):
                yield job.sources[shard], job.names[shard], number

    def _sources_of(self, step: int) -> dict[str, int]:
        """How many samples of this rank's batch are of each source."""
        local = self.global_batch // self.world_size
        if len(self.sources) == 1:
            return {self.sources[0].title: local}
        job = self.job(step)
        found = Counter(np.array(job.sources)[job.shard[0]].tolist())
        return {self.sources[source].title: number for source, number in found.items()}

    def _some_samples(self) -> Iterator[Sample]:
        """Some samples at even distances, in the order of the data."""
        ends = np.cumsum(self._counts)
        total = int(ends[-1])
        numbers = np.arange(min(total, EDITS_LEARN_FROM)) * total // min(total, EDITS_LEARN_FROM)
        shard = np.searchsorted(ends, numbers, side="right")
        for source, name, number in self._places(Places(shard, numbers - ends[shard] + self._counts[shard])):
            try:
                yield self.sources[source].reader.read(name, number)
            except (BrokenSample, OSError):
                continue

    def _some_captions(self) -> Iterator[str]:
        for sample in self._some_samples():
            try:
                yield from captions_of(sample)
            except BrokenSample:
                continue


class _Jobs:
    """The sampler: the jobs of step `start` and all later ones, drawn by the process that knows the listing."""

    def __init__(self, loader: Loader, start: int) -> None:
        self._loader, self._start = loader, start

    def __iter__(self) -> Iterator[Job]:
        return map(self._loader.job, count(self._start))


def _leave_signals_to_parent(worker: int) -> None:
    """A signal to the whole process group stops the trainer in order, and that one still wants a batch or ends us."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(batch: Any) -> Any:
    return batch
