"""The picture of `fastclip data stats`: how long captions are, and how many are cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastclip.data import ShardIndex, Tokenizer

MOST_BARS = 120  # longer captions share the last bar


def draw_lengths(sets: Mapping[str, ShardIndex], tokenizer: Tokenizer | None, path: str) -> None:
    """One histogram of caption lengths for each set, with the context length where it cuts. Errors: `ValueError` for
    sets without a caption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = {name: _lengths(index, tokenizer) for name, index in sets.items()}
    lengths = {name: found for name, found in lengths.items() if found}
    if not lengths:
        raise ValueError("--plot: there is no caption to measure")
    figure, panels = pyplot.subplots(
        len(lengths), figsize=(7, 1 + 2 * len(lengths)), squeeze=False, layout="constrained"
    )
    for panel, (name, found) in zip(panels[:, 0], lengths.items(), strict=True):
        total = found.total()
        panel.bar(list(found), [100 * count / total for count in found.values()], width=0.9, color="#4269d0")
        panel.set_title(f"{name}: {total:,} captions", loc="left", fontsize=10)
        panel.set_ylabel("% of captions")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlim(0, max(found) + 1)
        if tokenizer is not None:
            cut = sum(count for length, count in found.items() if length > tokenizer.context_length)
            if cut or max(found) * 2 > tokenizer.context_length:
                panel.set_xlim(0, max(*found, tokenizer.context_length) + 2)
                panel.axvline(tokenizer.context_length + 0.5, color="#ff725c")
                words = f"context {tokenizer.context_length}: {cut / total:.1%} are cut"
                place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right"}
                panel.annotate(words, (tokenizer.context_length, 0.9), (-4, 0), color="#ff725c", **place)
    panels[-1, 0].set_xlabel("words" if tokenizer is None else "tokens, start and end included")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _lengths(index: ShardIndex, tokenizer: Tokenizer | None) -> Counter[int]:
    """Captions by length; MOST_BARS stands for all that are longer."""
    found: Counter[int] = Counter()
    for caption in _captions(index):
        length = len(caption.split()) if tokenizer is None else len(tokenizer.encode(caption)) + 2
        found[min(length, MOST_BARS)] += 1
    return found


def _captions(index: ShardIndex) -> Iterator[str]:
    from fastclip.data.captions import captions_of
    from fastclip.data.faults import BrokenSample

    for number in range(len(index)):
        try:
            yield from captions_of(index.read(number))
        except BrokenSample:
            continue
