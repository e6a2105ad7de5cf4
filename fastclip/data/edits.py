"""Hard negatives made of the captions themselves: two words change places, or one gives way to another.

After NegCLIP (Yuksekgonul et al. 2023). A model that knows which words occur, but not which belong together, cannot
tell "a red circle and a blue square" from "a blue circle and a red square"; random negatives hardly ever ask it to.
"""

from collections.abc import Iterable
from itertools import pairwise

from fastclip.data.streams import Stream

_EDGE = ""  # stands before the first word and behind the last


class CaptionEdits:
    """Knows from `captions` which word may follow which, so that an edited caption reads like one of them."""

    def __init__(self, captions: Iterable[str]) -> None:
        self._followers: dict[str, set[str]] = {}
        for caption in captions:
            for before, word in pairwise([_EDGE, *caption.split(), _EDGE]):
                self._followers.setdefault(before, set()).add(word)

    def edited(self, caption: str, stream: Stream) -> str:
        """`caption` with two different words exchanged; where no exchange reads like a caption, with one word replaced;
        where that cannot be either, "".

        An exchange makes a caption of the same words that is false for almost any picture. A replacement may now and
        then be true too (a synonym).
        """
        words = [_EDGE, *caption.split(), _EDGE]
        places = range(1, len(words) - 1)
        swaps = [(i, j) for i in places for j in places if i < j and self._may_swap(words, i, j)]
        if swaps:
            i, j = stream.choice(swaps)
            words[i], words[j] = words[j], words[i]
            return " ".join(words[1:-1])
        others = [(i, word) for i in places for word in self._others(words, i)]
        if not others:
            return ""
        i, word = stream.choice(others)
        return " ".join([*words[1:i], word, *words[i + 1 : -1]])

    def _may_swap(self, words: list[str], i: int, j: int) -> bool:
        """Whether each of two different words has been seen behind the word that it comes to stand behind."""
        before_j = words[j] if j == i + 1 else words[j - 1]
        return words[i] != words[j] and self._follows(words[i - 1], words[j]) and self._follows(before_j, words[i])

    def _others(self, words: list[str], i: int) -> list[str]:
        """The other words that have been seen between the neighbours of word i, in a fixed order."""
        between = (w for w in self._followers.get(words[i - 1], ()) if w and self._follows(w, words[i + 1]))
        return sorted(word for word in between if word != words[i])

    def _follows(self, before: str, word: str) -> bool:
        return word in self._followers.get(before, ())
