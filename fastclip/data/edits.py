"""Hard negatives made of the captions themselves: words or pairs of words change places, or one gives way to another.

After NegCLIP (Yuksekgonul et al. 2023). A model that knows which words occur, but not which belong together, cannot
tell "a red circle above a blue square" from "a blue circle above a red square" or from "a blue square above a red
circle"; random negatives hardly ever ask it to.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise, starmap

from fastclip.data.streams import Stream

_EDGE = ""  # stands before the first word and behind the last
_LONGEST = 2  # words that change places together: what a thing looks like and what it is


class CaptionEdits:
    """Knows from `captions` which word may follow which, so that an edited caption reads like one of them."""

    def __init__(self, captions: Iterable[str]) -> None:
        self._followers: dict[str, set[str]] = {}
        for caption in captions:
            for before, word in pairwise([_EDGE, *caption.split(), _EDGE]):
                self._followers.setdefault(before, set()).add(word)

    def edited(self, caption: str, stream: Stream) -> str:
        """`caption` with two different words, or two pairs of words that share none in the same place, exchanged; where
        no exchange reads like a caption, with one word replaced; where that cannot be either, "".

        An exchange makes a caption of the same words that is false for almost any picture. A replacement may now and
        then be true too (a synonym).
        """
        words = [_EDGE, *caption.split(), _EDGE]
        exchanges = list(self._exchanges(words))
        if exchanges:
            i, j, length = stream.choice(exchanges)
            words[i : i + length], words[j : j + length] = words[j : j + length], words[i : i + length]
            return " ".join(words[1:-1])
        others = [(i, word) for i in range(1, len(words) - 1) for word in self._others(words, i)]
        if not others:
            return ""
        i, word = stream.choice(others)
        return " ".join([*words[1:i], word, *words[i + 1 : -1]])

    def _exchanges(self, words: list[str]) -> Iterator[tuple[int, int, int]]:
        """(i, j, length): the words from i on and those from j on may change places, for both come to stand between
        words that captions have them between."""
        last = len(words) - 1
        for i in range(1, last):
            before_i = self._followers.get(words[i - 1], ())
            for j in range(i + 1, last):
                if words[j] == words[i] or words[j] not in before_i:
                    continue
                for length in range(1, min(_LONGEST, j - i, last - j) + 1):
                    end_i, end_j = words[i + length - 1], words[j + length - 1]
                    between = words[i + length : j]
                    joints = zip(
                        [end_i, end_j, *between[-1:]], [words[j + length], *between[:1], words[i]], strict=True
                    )
                    if end_i != end_j and all(starmap(self._follows, joints)):
                        yield i, j, length

    def _others(self, words: list[str], i: int) -> list[str]:
        """The other words that have been seen between the neighbours of word i, in a fixed order."""
        between = (w for w in self._followers.get(words[i - 1], ()) if w and self._follows(w, words[i + 1]))
        return sorted(word for word in between if word != words[i])

    def _follows(self, before: str, word: str) -> bool:
        return word in self._followers.get(before, ())
