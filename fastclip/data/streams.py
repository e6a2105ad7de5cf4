"""Random numbers that depend on names, not on processes: the same everywhere, for ever.

Every draw of this room (order of an epoch, crop, caption, rendered scene) is a pure function of a few names such as
`(seed, epoch, key)`. Neither Python nor NumPy promises that its samplers stay the same between versions, and a frozen
data set needs that promise, so the twenty lines are here: BLAKE2b for the names, SplitMix64 (Steele et al. 2014,
"Fast splittable pseudorandom number generators") for the numbers.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash64(*names: int | str) -> int:
    """A 64-bit number for a tuple of integers and strings, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little")


class Stream:
    """A stream of random numbers that belongs to `names`, for example `Stream(seed, epoch, key)`."""

    def __init__(self, *names: int | str) -> None:
        self.state = hash64(*names)

    def bits(self) -> int:
        """The next 64 bits."""
        self.state = (self.state + _GAMMA) & _MASK
        z = self.state
        z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
        z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
        return z ^ (z >> 31)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A float in [low, high)."""
        return low + (high - low) * (self.bits() >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return (self.bits() * n) >> 64

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` different ones of `items`, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


def permutation(n: int, *names: int | str) -> np.ndarray:
    """The random order of `range(n)` that belongs to `names`: int64 (n,), SplitMix64 keys sorted."""
    return np.argsort(_mixed(np.arange(n), *names), kind="stable")


def uniforms(places: np.ndarray, *names: int | str) -> np.ndarray:
    """Numbers `places` of the uniform float64 in [0, 1) that belong to `names`."""
    return (_mixed(places, *names) >> np.uint64(11)) * 2.0**-53


def _mixed(places: np.ndarray, *names: int | str) -> np.ndarray:
    """Numbers `places` (0, 1, ...) of the stream of `names`, in the order of `Stream.bits`: uint64."""
    z = np.uint64(hash64(*names)) + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))
