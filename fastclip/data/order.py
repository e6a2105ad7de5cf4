"""The order of an epoch: a pure function of (seed, epoch), looked up by position, in memory that a window bounds.

An epoch is a list of shards (each once; or drawn with replacement; more often where it is up-sampled), cut into windows
of about `window` samples; the samples of a window are permuted together. Whatever fits in one window is permuted as a
whole. Position p of an epoch is therefore a (shard, number) that no rank, worker or restart has a say in.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fastclip.data.streams import permutation, uniforms

WINDOW = 1 << 18


class Places(NamedTuple):
    """Samples by shard and number within the shard: int64 (n,) each."""

    shard: np.ndarray
    number: np.ndarray


class _Epoch(NamedTuple):
    """Which shards an epoch reads: `take[i]` samples of `shard[i]`, at positions `start[i]` on before windows are
    permuted; `window` holds the first position of each window, and the end."""

    shard: np.ndarray
    take: np.ndarray
    start: np.ndarray
    window: np.ndarray


class Order:
    """Positions of epochs to places of samples.

    Args:
        counts: int64 (shards,), the samples of each shard.
        factors: float64 (shards,) or None, how often an epoch holds each sample of a shard (2.5: twice, and half of
            them once more); with `resampled` the relative chance of its samples.
        seed: of all epochs.
        window: samples that are shuffled together, at least; whole shards.
        resampled: 0, or the length of an epoch that is drawn with replacement: samples where all of them fit in one
            window, else shards, as open_clip does.
    """

    def __init__(
        self,
        counts: np.ndarray,
        seed: int,
        factors: np.ndarray | None = None,
        window: int = WINDOW,
        resampled: int = 0,
    ) -> None:
        self._counts, self._seed, self._window, self._resampled = np.asarray(counts, np.int64), seed, window, resampled
        self._factors = np.ones(len(counts)) if factors is None else np.asarray(factors, np.float64)
        self.is_whole = int(self._counts.sum()) <= window  # one window holds all samples
        whole = np.floor(self._factors).astype(np.int64)
        part = np.rint((self._factors - whole) * self._counts).astype(np.int64)
        self._shard = np.concatenate([np.repeat(np.arange(len(counts)), whole), np.flatnonzero(part)])
        self._take = np.concatenate([np.repeat(self._counts, whole), part[part > 0]])
        self.num_samples = resampled or int(self._take.sum())
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)
        self._permuted = lru_cache(maxsize=2)(self._make_permutation)
        self._weights = np.cumsum(self._counts * self._factors) if resampled else np.empty(0)

    def places(self, epoch: int, positions: np.ndarray) -> Places:
        """Where the samples at `positions` (int64 (n,), below `num_samples`) of `epoch` lie."""
        if self._resampled and self.is_whole:
            return self._drawn(epoch, positions)
        plan = self._epoch(epoch)
        where = np.empty_like(positions)
        windows = np.searchsorted(plan.window, positions, side="right") - 1
        for window in np.unique(windows).tolist():
            inside = windows == window
            first = plan.window[window]
            where[inside] = first + self._permuted(epoch, window)[positions[inside] - first]
        entry = np.searchsorted(plan.start, where, side="right") - 1
        shard, number = plan.shard[entry], where - plan.start[entry]
        for partial in np.unique(entry[plan.take[entry] < self._counts[shard]]).tolist():
            inside = entry == partial
            own = int(plan.shard[partial])
            number[inside] = permutation(int(self._counts[own]), "part", self._seed, epoch, own)[number[inside]]
        return Places(shard, number)

    def _drawn(self, epoch: int, positions: np.ndarray) -> Places:
        """Samples drawn one by one."""
        at = uniforms(positions, "draw", self._seed, epoch) * self._weights[-1]
        shard = np.minimum(np.searchsorted(self._weights, at, side="right"), len(self._counts) - 1)
        before = self._weights[shard] - self._counts[shard] * self._factors[shard]
        number = ((at - before) / self._factors[shard]).astype(np.int64)
        return Places(shard, np.clip(number, 0, self._counts[shard] - 1))

    def _make_epoch(self, epoch: int) -> _Epoch:
        if self._resampled:
            shard = self._drawn_shards(epoch)
            take = self._counts[shard]
        else:
            order = slice(None) if self.is_whole else permutation(len(self._shard), "shards", self._seed, epoch)
            shard, take = self._shard[order], self._take[order]
        start = np.cumsum(take) - take
        end = int(start[-1] + take[-1])
        if self.is_whole:
            return _Epoch(shard, take, start, np.array([0, end]))
        firsts = np.flatnonzero(np.diff(start // self._window, prepend=-1))
        return _Epoch(shard, take, start, np.append(start[firsts], end))

    def _drawn_shards(self, epoch: int) -> np.ndarray:
        """Enough shards, each with a chance in proportion to its factor, for an epoch."""
        chances = np.cumsum(self._factors * (self._counts > 0))
        shards, samples, drawn = [], 0, 0
        while samples < self._resampled:
            more = 1 + (self._resampled - samples) * len(self._counts) // max(int(self._counts.sum()), 1)
            at = uniforms(np.arange(drawn, drawn + more), "shards", self._seed, epoch) * chances[-1]
            shards.append(np.minimum(np.searchsorted(chances, at, side="right"), len(self._counts) - 1))
            drawn, samples = drawn + more, samples + int(self._counts[shards[-1]].sum())
        return np.concatenate(shards)

    def _make_permutation(self, epoch: int, window: int) -> np.ndarray:
        plan = self._epoch(epoch)
        size = int(plan.window[window + 1] - plan.window[window])
        return permutation(size, "order", self._seed, epoch, *([] if self.is_whole else [window]))

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_epoch", "_permuted")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)
        self._permuted = lru_cache(maxsize=2)(self._make_permutation)
