"""What is in a scene: one, two or three objects, each with a size, a colour, a shape and one of nine places.

Generator version 1, frozen: a scene is a pure function of (seed, split, number). The held-out scenes are drawn first;
a training scene whose objects equal those of a held-out scene (whatever the background) is drawn again.
"""

from dataclasses import dataclass, replace

from fastclip.data.streams import Stream

SIZES = ("small", "medium", "large")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "star", "cross", "ring")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUNDS = ("white", "gray", "black", "brown")


@dataclass(frozen=True, order=True)
class Object:
    """One object; the fields are words of the tables above."""

    size: str
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Up to three objects in different places on one background."""

    objects: tuple[Object, ...]
    background: str

    @property
    def content(self) -> tuple[Object, ...]:
        """The objects in canonical order: two scenes with the same content get the same captions."""
        return tuple(sorted(self.objects))


def draw_scene(stream: Stream, count: int) -> Scene:
    """A scene of `count` objects in different places."""
    objects = tuple(
        Object(stream.choice(SIZES), stream.choice(COLOURS), stream.choice(SHAPES), place)
        for place in stream.sample(PLACES, count)
    )
    return Scene(objects, stream.choice(BACKGROUNDS))


def train_scene(seed: int, number: int, held_out: frozenset[tuple[Object, ...]]) -> Scene:
    """Training scene `number`: one, two or three objects in 20, 40 and 40 % of the scenes, none of them held out."""
    stream = Stream("scene", seed, "train", number)
    count = stream.choice((1, 2, 2, 3, 3))
    while (scene := draw_scene(stream, count)).content in held_out:
        pass
    return scene


def hard_negatives(scene: Scene) -> tuple[Scene, Scene]:
    """`scene` with the colours of its first two objects swapped, and with their places swapped."""
    a, b, *rest = scene.objects
    colours = (replace(a, colour=b.colour), replace(b, colour=a.colour), *rest)
    places = (replace(a, place=b.place), replace(b, place=a.place), *rest)
    return replace(scene, objects=colours), replace(scene, objects=places)


@dataclass(frozen=True)
class HeldOut:
    """A test scene; scenes of one `group` differ by a swap only. `kind`: "single", "base", "colours" or "places"."""

    scene: Scene
    group: int
    kind: str


# What the README searches for, "a red circle above a blue square", is there to be found, beside its two swaps.
ASKED_FOR = Scene((Object("medium", "red", "circle", "top"), Object("medium", "blue", "square", "bottom")), "white")


def held_out_scenes(seed: int, count: int = 1000) -> list[HeldOut]:
    """`count` held-out scenes with different contents, half of them in groups of three (base, colours swapped, places
    swapped), the first of them ASKED_FOR. Over all of them one, two and three objects come in 20, 40 and 40 %.
    """
    stream = Stream("scene", seed, "test")
    groups = (count + 5) // 6
    ones, twos = count // 5, 2 * count // 5
    twos_in_groups = (groups + 1) // 2
    plan = [2] * twos_in_groups + [3] * (groups - twos_in_groups)
    singles = [1] * ones + [2] * (twos - 3 * twos_in_groups)
    singles += [3] * (count - 3 * groups - len(singles))

    seen: set[tuple[Object, ...]] = set()
    chosen: list[HeldOut] = []
    while len(chosen) < 3 * groups:
        base = draw_scene(stream, plan[len(chosen) // 3]) if chosen else ASKED_FOR
        a, b = base.objects[:2]
        family = (base, *hard_negatives(base))
        if a.colour != b.colour and a.shape != b.shape and not seen.intersection(s.content for s in family):
            group = len(chosen) // 3
            chosen += [HeldOut(s, group, kind) for s, kind in zip(family, ("base", "colours", "places"), strict=True)]
            seen.update(s.content for s in family)
    while len(chosen) < count:
        scene = draw_scene(stream, singles[len(chosen) - 3 * groups])
        if scene.content not in seen:
            chosen.append(HeldOut(scene, groups + len(chosen) - 3 * groups, "single"))
            seen.add(scene.content)
    return stream.sample(chosen, count)
