"""Which caption of a sample is used: one of its list, or one of several kinds of caption by weight."""

import re

from fastclip.data.faults import BrokenSample
from fastclip.data.scan import Sample
from fastclip.data.streams import Stream

TEXT = "txt"  # the key that means the text member
_KEY = re.compile(r"[^][]+(\[\d+\])?")


def captions_of(sample: Sample) -> list[str]:
    """The usable captions: the list `captions` of the JSON if there is one, else the text.

    Errors: `BrokenSample` with the sample's fault, "missing_caption" or "empty_caption".
    """
    listed = sample.meta.get("captions")
    return _usable(sample, listed if isinstance(listed, list) and listed else [sample.text])


def _usable(sample: Sample, found: list[object]) -> list[str]:
    if sample.fault:
        raise BrokenSample(sample.fault)
    texts = [caption for caption in found if isinstance(caption, str)]
    if not texts:
        raise BrokenSample("missing_caption")
    if not (usable := [caption for caption in texts if caption.strip()]):
        raise BrokenSample("empty_caption")
    return usable


class CaptionChoice:
    """One caption of a sample, by `spec`: "" for any of `captions_of`, else keys with weights, `txt=1::synthetic=3`.

    A key is `txt` (the text member) or a key of the JSON, whose value is a caption or a list of them, or one place in
    such a list (`captions[5]`, counted from 0); a key without a weight has 1. Of the keys that a sample has, one is
    drawn by weight, and of its captions one evenly.
    Errors: `ValueError` for a weight that is not a positive number, and for a key that is none of these.
    """

    def __init__(self, spec: str = "") -> None:
        self._weights: dict[str, float] = {}
        for part in filter(None, spec.split("::")):
            key, has_weight, weight = part.partition("=")
            if not _KEY.fullmatch(key):
                raise ValueError(f"text_keys: a key is a name or name[place], was {key!r} in {spec!r}")
            try:
                self._weights[key] = float(weight) if has_weight else 1.0
            except ValueError:
                self._weights[key] = 0.0
            if not 0 < self._weights[key] < float("inf"):
                raise ValueError(f"text_keys: the weight of {key!r} in {spec!r} must be a positive number")

    def of(self, sample: Sample, stream: Stream) -> str:
        """The caption of `sample` that `stream` draws. Errors: those of `captions_of`."""
        if not self._weights:
            return stream.choice(captions_of(sample))
        offered: list[tuple[float, list[str]]] = []
        problem = BrokenSample("missing_caption")
        for key, weight in self._weights.items():
            try:
                offered.append((weight, _usable(sample, _values(sample, key))))
            except BrokenSample as error:
                problem = error
        if not offered:
            raise problem
        at = stream.uniform(0, sum(weight for weight, _ in offered))
        for weight, captions in offered[:-1]:
            if at < weight:
                return stream.choice(captions)
            at -= weight
        return stream.choice(offered[-1][1])


def _values(sample: Sample, key: str) -> list[object]:
    """What the sample has under a key of `CaptionChoice`."""
    if key == TEXT:
        return [sample.text]
    name, is_place, place = key.removesuffix("]").partition("[")
    value = sample.meta.get(name)
    values = value if isinstance(value, list) else [value]
    return values[int(place) : int(place) + 1] if is_place else values
