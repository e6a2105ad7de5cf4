"""What is said of a scene or a digit.

A full caption names size, colour, shape and place of every object, so it fits one content only; order, wording and
synonyms vary. Scenes of two objects also get a relation, once with everything and once as people ask for it
("a red circle above a blue square"); the held-out set holds full captions only.
"""

from fastclip.data.demo.scenes import PLACES, Object, Scene
from fastclip.data.streams import Stream

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ZERO_SHOT_TEMPLATES = ("a handwritten {}", "the digit {}", "a photo of the number {}", "the number {} written by hand")
_DIGIT_TEMPLATES = (*ZERO_SHOT_TEMPLATES, "handwritten digit {}", "a picture of the digit {}", "a {} drawn by hand")

_SYNONYMS = {"small": "little", "large": "big", "center": "middle", "top": "upper", "bottom": "lower"}


class _Wording:
    """One speaker: keeps to one word for a thing throughout a caption, and to one order of the objects."""

    def __init__(self, scene: Scene, stream: Stream) -> None:
        self._words = {plain: other for plain, other in _SYNONYMS.items() if stream.below(4) == 0}
        self.background = scene.background
        self.objects = stream.sample(scene.content, len(scene.content))

    def thing(self, item: Object) -> str:
        return f"{self._words.get(item.size, item.size)} {item.colour} {item.shape}"

    def place(self, item: Object) -> str:
        """For instance `top left`, or `upper left`; `top` and `bottom` alone have no other word."""
        first, *rest = item.place.split()
        return " ".join([self._words.get(first, first), *rest]) if rest or first == "center" else first

    def at_place(self, item: Object) -> str:
        edge = {"top": "at the", "bottom": "at the", "left": "on the", "right": "on the"}
        return f"{edge.get(item.place, 'in the')} {self.place(item)}"


def _terse(say: _Wording) -> str:
    return ", ".join(f"{say.thing(item)} {say.place(item)}" for item in say.objects)


def _sentence(say: _Wording) -> str:
    return " and ".join(f"a {say.thing(item)} {say.at_place(item)}" for item in say.objects)


def _place_first(say: _Wording) -> str:
    return ", ".join(f"{say.place(item)} a {say.thing(item)}" for item in say.objects)


def _with_background(say: _Wording) -> str:
    return f"on {say.background} " + " and ".join(f"a {say.thing(item)} {say.place(item)}" for item in say.objects)


_FULL = (_terse, _sentence, _place_first, _with_background)


def relations(a: Object, b: Object) -> list[str]:
    """The true words for where `a` lies as seen from `b`."""
    row_a, column_a = divmod(PLACES.index(a.place), 3)
    row_b, column_b = divmod(PLACES.index(b.place), 3)
    true = []
    if row_a != row_b:
        true.append("above" if row_a < row_b else "below")
    if column_a != column_b:
        true.append("left of" if column_a < column_b else "right of")
    return true


def bare_relation(a: Object, relation: str, b: Object) -> str:
    """As people ask for it: "a red circle above a blue square"."""
    return f"{_article(a.colour)} {a.shape} {relation} {_article(b.colour)} {b.shape}"


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def scene_captions(scene: Scene, stream: Stream) -> list[str]:
    """Four full captions in random order; for two objects then a full and a short relation."""
    captions = [style(_Wording(scene, stream)) for style in stream.sample(_FULL, len(_FULL))]
    if len(scene.objects) == 2:
        say = _Wording(scene, stream)
        a, b = say.objects
        relation = stream.choice(relations(a, b))
        captions.append(f"a {say.thing(a)} {say.place(a)}, {relation} a {say.thing(b)} {say.place(b)}")
        captions.append(bare_relation(a, relation, b))
    return captions


def digit_captions(label: int, stream: Stream, count: int = 4) -> list[str]:
    """`count` captions of a handwritten digit, by word ("seven") or, one in four, by numeral ("7")."""
    templates = stream.sample(_DIGIT_TEMPLATES, count)
    return [t.format(str(label) if stream.below(4) == 0 else NUMBER_WORDS[label]) for t in templates]
