"""What is wrong with the data: counted by cause, named in the log once, and an error where there is too much of it."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("fastclip.data")

# Counted beside what is skipped, but used: they are no reason to stop, not even a strict run.
USED = frozenset({"truncated_caption", "mislabelled_image", "concatenated_shard", "cpu_decoded_image"})
BUDGET_FROM = 1000  # samples read before a share of broken ones means anything


class BrokenSample(ValueError):
    """A sample that cannot be used; the argument is the cause it is counted under, `detail` says more."""

    def __init__(self, cause: str, detail: object = "") -> None:
        super().__init__(cause)
        self.detail = str(detail)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return BrokenSample, (str(self), self.detail)


@dataclass
class Tally:
    """What was wrong in a batch: by cause, one example of each, and how many of its own samples were replaced."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    replaced: int = 0

    def add(self, cause: str, example: str) -> None:
        """One more."""
        self.counts[cause] += 1
        self.examples.setdefault(cause, example)

    def in_batch(self) -> dict[str, Any]:
        """As a batch carries it; a plain dict, since pinning memory updates what it copies, which doubles a Counter."""
        return {"skipped": dict(+self.counts), "examples": self.examples, "replaced": self.replaced}

    @staticmethod
    def of(batch: Mapping[str, Any]) -> "Tally":
        """What `batch` carries."""
        return Tally(Counter(batch["skipped"]), dict(batch["examples"]), batch["replaced"])


class Faults:
    """The counts of a run, `counts[cause]`.

    Args:
        strict: the first sample that cannot be used is an error.
        max_broken: the largest share of samples that may be broken, from `BUDGET_FROM` samples on; more is an error.
    """

    def __init__(self, strict: bool = False, max_broken: float = 1.0) -> None:
        self.counts: Counter[str] = Counter()
        self.strict, self.max_broken = strict, max_broken
        self._read, self._broken = 0, 0
        self._named: set[str] = set()

    def add(self, counts: Mapping[str, int], examples: Mapping[str, str], broken: int = 0, read: int = 0) -> None:
        """`counts` by cause; `examples` names one of each cause. Of `read` further samples `broken` were replaced.

        Errors: `ValueError`, see the class.
        """
        self.counts.update(counts)
        for cause in sorted(set(examples) - self._named):
            self._named.add(cause)
            log.warning("%s: %s; later ones are counted only", cause.replace("_", " "), examples[cause])
        if self.strict and (fatal := set(counts) - USED):
            cause = min(fatal)
            raise ValueError(f"data: {cause.replace('_', ' ')}: {examples.get(cause, '')} (a strict run stops here)")
        self._read, self._broken = self._read + read, self._broken + broken
        if self._read >= BUDGET_FROM and self._broken > self.max_broken * self._read:
            raise ValueError(
                f"data: {self._broken} of {self._read} samples are broken, more than the share of "
                f"{self.max_broken:g} that --max-broken allows: {in_words(self.counts)}"
            )


def in_words(counts: Mapping[str, int]) -> str:
    """`12 unreadable image, 3 truncated caption`."""
    return ", ".join(f"{count:,} {cause.replace('_', ' ')}" for cause, count in sorted(counts.items()))
