"""The embedded data set: frozen content, held-out scenes, hard negatives, captions that say everything."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastclip.data import EvalSet, Loader, ShardIndex, get_tokenizer
from fastclip.data.demo import GENERATOR_VERSION, write_demo
from fastclip.data.demo.captions import NUMBER_WORDS, ZERO_SHOT_TEMPLATES, scene_captions
from fastclip.data.demo.digits import load_digits, split_digits
from fastclip.data.demo.render import COLOUR, GROUND, render_scene
from fastclip.data.demo.samples import Part
from fastclip.data.demo.scenes import (
    ASKED_FOR,
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    HeldOut,
    Object,
    Scene,
    hard_negatives,
    held_out_scenes,
    train_scene,
)
from fastclip.data.streams import Stream, hash64, permutation

# Generator version 1 is frozen: these never change while GENERATOR_VERSION is 1.
FROZEN = {
    "train": "c04f7e03fe413a6e",
    "digits_test": "ec7eb47b0d10dcf5",
    "scenes_test": "d6e04efc3cc5c94c",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, scenes=4000, workers=2)
    return directory


@pytest.fixture(scope="module")
def held_out() -> list[HeldOut]:
    return held_out_scenes(0)


def records(demo: Path, name: str) -> list[dict[str, Any]]:
    index = ShardIndex(f"{demo}/{name}-*.tar")
    return [index.read(i).meta for i in range(len(index))]


def content_of(record: dict[str, Any]) -> tuple[Object, ...]:
    return tuple(sorted(Object(**item) for item in record["objects"]))


def digest(samples: list[tuple[str, dict[str, bytes]]]) -> str:
    """SHA-256 of keys, pixels, captions and JSON (not of PNG bytes, which belong to a zlib version)."""
    found = hashlib.sha256()
    for key, files in samples:
        with Image.open(io.BytesIO(files["png"])) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))
            found.update(image.tobytes())
        found.update(key.encode() + files["txt"] + files["json"])
    return found.hexdigest()[:16]


def test_random_streams_are_frozen() -> None:
    assert hash64("scene", 0, "train", 7) == 13792812401797086790
    stream = Stream("a", 1)
    assert [stream.below(100) for _ in range(4)] == [16, 64, 61, 20]
    assert stream.uniform() == 0.5801474523936593
    assert permutation(8, "order", 0, 0).tolist() == [6, 5, 2, 4, 3, 1, 0, 7]


@pytest.mark.parametrize("name", FROZEN)
def test_generator_version_1_is_frozen(name: str) -> None:
    assert GENERATOR_VERSION == 1
    part = Part(name, seed=0, scenes=40_000)
    assert digest([part.sample(n) for n in range(0, len(part), len(part) // 60)]) == FROZEN[name]


def test_written_twice_is_the_same_to_the_byte_at_any_number_of_workers(tmp_path: Path) -> None:
    manifests = [write_demo(tmp_path / str(workers), scenes=200, workers=workers) for workers in (1, 3)]
    assert manifests[0] == manifests[1]
    for name in [*manifests[0]["sha256"], "manifest.json"]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


def test_a_second_call_does_nothing_and_damage_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_demo(tmp_path, scenes=50, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("fastclip.data.demo.write.write_shard", None)
        assert write_demo(tmp_path, scenes=50, workers=1) == manifest
    (tmp_path / "train-00000.tar").write_bytes(b"")
    assert write_demo(tmp_path, scenes=50, workers=1) == manifest
    assert len(ShardIndex(tmp_path, "train")) == manifest["counts"]["train"]
    other = write_demo(tmp_path, scenes=5000, workers=2)
    assert other["counts"]["train"] == 5682
    write_demo(tmp_path, scenes=50, workers=1)
    assert len(list(tmp_path.glob("train-*.tar"))) == 1  # the second shard of the larger set is gone


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday-photos.tar").write_bytes(b"precious")
    write_demo(tmp_path, scenes=10, workers=1)
    assert (tmp_path / "holiday-photos.tar").read_bytes() == b"precious"


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scenes: must be at least 1, was 0"):
        write_demo(tmp_path, scenes=0)
    with pytest.raises(ValueError, match="workers: must be at least 1, was 0"):
        write_demo(tmp_path, workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"directory: must be a directory, '.*file' is a file"):
        write_demo(tmp_path / "file")


def test_the_tables_have_what_was_asked_for() -> None:
    assert len(SHAPES) >= 8
    assert len(COLOURS) >= 8
    assert (len(SIZES), len(PLACES), len(BACKGROUNDS)) == (3, 9, 4)


def test_held_out_scenes_are_not_in_the_training_part(held_out: list[HeldOut], demo: Path) -> None:
    test = {held.scene.content for held in held_out}
    assert len(test) == len(held_out) == 1000
    assert {content_of(record) for record in records(demo, "scenes_test")} == test
    train = {content_of(record) for record in records(demo, "train") if record["source"] == "scenes"}
    assert len(train) > 3000
    assert not train & test
    # and they would be, were they not drawn again
    free = {train_scene(0, number, frozenset()).content for number in range(4000)}
    assert free & test


def test_object_counts(demo: Path, held_out: list[HeldOut]) -> None:
    assert Counter(len(held.scene.objects) for held in held_out) == {1: 200, 2: 400, 3: 400}
    scenes = [r for r in records(demo, "train") if r["source"] == "scenes"]
    counts = Counter(len(record["objects"]) for record in scenes)
    for objects, share in ((1, 0.2), (2, 0.4), (3, 0.4)):
        assert abs(counts[objects] / len(scenes) - share) < 0.03
    assert all(len({item["place"] for item in r["objects"]}) == len(r["objects"]) for r in scenes)


def test_what_the_readme_searches_for_is_held_out_beside_its_swaps(held_out: list[HeldOut]) -> None:
    (found,) = [h for h in held_out if h.scene == ASKED_FOR]
    group = [h for h in held_out if h.group == found.group]
    assert {h.kind: h.scene for h in group} == dict(
        zip(("base", "colours", "places"), (ASKED_FOR, *hard_negatives(ASKED_FOR)), strict=True)
    )


def test_half_of_the_held_out_scenes_come_with_hard_negatives(held_out: list[HeldOut]) -> None:
    groups: dict[int, dict[str, Scene]] = {}
    for held in held_out:
        groups.setdefault(held.group, {})[held.kind] = held.scene
    families = [group for group in groups.values() if len(group) > 1]
    assert len(families) == 167
    assert all(list(group) == ["single"] for group in groups.values() if len(group) == 1)
    for family in families:
        assert sorted(family) == ["base", "colours", "places"]
        assert hard_negatives(family["base"]) == (family["colours"], family["places"])
        for one, other in combinations(family.values(), 2):
            assert one.content != other.content
            assert one.background == other.background
        for field in dataclasses.fields(Object):  # the same words throughout, in other combinations
            words = [sorted(getattr(item, field.name) for item in scene.objects) for scene in family.values()]
            assert words[0] == words[1] == words[2]


CANON = {"little": "small", "big": "large", "middle": "center", "upper": "top", "lower": "bottom"}


def parse(caption: str) -> list[dict[str, set[str]]]:
    """The words of each object of a caption, by kind, found again without the code that wrote it."""
    for word in (" and ", ", "):
        caption = caption.replace(word, "|")
    for relation in ("above", "below", "left of", "right of"):
        caption = caption.replace(f"|{relation} ", "|")
    objects = []
    for phrase in caption.split("|"):
        words = [CANON.get(word, word) for word in phrase.split()]
        if words[0] == "on" and words[1] in BACKGROUNDS:
            words = words[2:]
        places = " ".join(word for word in words if word in ("top", "bottom", "left", "right", "center"))
        kinds = {"size": SIZES, "colour": COLOURS, "shape": SHAPES}
        objects.append({kind: {w for w in words if w in table} for kind, table in kinds.items()} | {"place": {places}})
    return objects


def test_full_captions_say_everything(demo: Path) -> None:
    scenes = records(demo, "scenes_test")
    scenes += [r for r in records(demo, "train") if r["source"] == "scenes"][:800]
    for record in scenes:
        wanted = sorted(tuple(sorted(item.items())) for item in record["objects"])
        for caption in record["captions"][:5]:
            found = [{kind: " ".join(words) for kind, words in item.items()} for item in parse(caption)]
            assert sorted(tuple(sorted(item.items())) for item in found) == wanted, caption


def test_held_out_captions_are_full_and_differ(demo: Path) -> None:
    captions = [record["captions"] for record in records(demo, "scenes_test")]
    assert all(len(some) == 1 for some in captions)
    assert len({caption for some in captions for caption in some}) == 1000


def test_relations_are_true() -> None:
    red, blue = Object("small", "red", "circle", "top left"), Object("large", "blue", "square", "bottom")
    said = {scene_captions(Scene((red, blue), "gray"), Stream("relation", n))[-1] for n in range(40)}
    assert said == {
        "a red circle above a blue square",
        "a red circle left of a blue square",
        "a blue square below a red circle",
        "a blue square right of a red circle",
    }
    orange = Object("small", "orange", "ring", "bottom right")
    said = {scene_captions(Scene((blue, orange), "gray"), Stream("relation", n))[-1] for n in range(40)}
    assert said == {"a blue square left of an orange ring", "an orange ring right of a blue square"}


def test_objects_are_drawn_where_and_as_large_as_the_caption_says() -> None:
    for place in PLACES:
        for shape in SHAPES:
            covered = []
            for size in SIZES:
                pixels = render_scene(Scene((Object(size, "red", shape, place),), "black"), Stream("draw", place))
                reds = pixels[:, :, 0] > 120
                covered.append(int(reds.sum()))
                rows, columns = np.nonzero(reds)
                assert PLACES[int(rows.mean() // 21.4) * 3 + int(columns.mean() // 21.4)] == place
            assert covered[0] * 1.6 < covered[1]
            assert covered[1] * 1.6 < covered[2]


def test_every_word_can_be_seen() -> None:
    """Shapes of one size differ in 8 whole pixels or more, colours among themselves and from the grounds by 90 or more
    (sum over channels): nothing that a caption says is lost in 64 x 64 pixels."""
    for size in SIZES:
        drawn = [
            render_scene(Scene((Object(size, "red", shape, "center"),), "black"), Stream("same jitter")).astype(int)
            for shape in SHAPES
        ]
        contrast = np.abs(np.subtract(COLOUR["red"], GROUND["black"])).sum()
        assert min(np.abs(one - other).sum() for one, other in combinations(drawn, 2)) >= 8 * contrast
    shades = [*COLOUR.values(), *GROUND.values()]
    assert min(np.abs(np.subtract(one, other)).sum() for one, other in combinations(shades, 2)) >= 90


def test_digits_are_real_split_by_sample_and_a_tenth_of_the_training_part(demo: Path) -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    train_numbers, test_numbers = split_digits(1797, 0)
    assert (len(train_numbers), len(test_numbers)) == (1437, 360)
    train, test = ([r for r in records(demo, name) if r["source"] == "digits"] for name in ("train", "digits_test"))
    assert not {r["number"] for r in train} & {r["number"] for r in test}
    assert len({r["number"] for r in test}) == 360
    assert all(labels[r["number"]] == r["label"] for r in train + test)
    assert {r["label"] for r in test} == set(range(10))
    assert len(train) / len(records(demo, "train")) == pytest.approx(0.12, abs=0.001)
    for record in train + test:
        assert all(NUMBER_WORDS[record["label"]] in c or str(record["label"]) in c for c in record["captions"])


def test_repeated_digits_are_not_copies() -> None:
    part = Part("train", seed=0, scenes=40_000)
    digits = [n for n in range(3000) if "digit" in part.sample(n)[0]]
    number = {n: json.loads(part.sample(n)[1]["json"])["number"] for n in digits}
    twice = [pair for pair in combinations(digits, 2) if number[pair[0]] == number[pair[1]]]
    assert twice
    for one, other in twice[:20]:
        assert part.sample(one)[1]["png"] != part.sample(other)[1]["png"]


def test_class_names_and_tokenizer_fit_the_captions(demo: Path) -> None:
    classes = json.loads((demo / "digits_test.classes.json").read_text())
    assert classes == {"classnames": list(NUMBER_WORDS), "templates": list(ZERO_SHOT_TEMPLATES)}
    tokenizer = get_tokenizer(demo)
    captions = [
        c for name in ("train", "scenes_test", "digits_test") for r in records(demo, name) for c in r["captions"]
    ]
    lengths = [len(tokenizer.encode(caption)) + 2 for caption in captions]
    assert max(lengths) <= tokenizer.context_length
    assert np.mean(lengths) <= 16
    words = {word for caption in captions for word in caption.replace(",", " ,").split()}
    assert len(words) > 60
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []
    assert all(len(tokenizer.encode(t.format(n))) <= 7 for t in ZERO_SHOT_TEMPLATES for n in NUMBER_WORDS)


def test_the_loader_and_the_held_out_sets_read_it(demo: Path) -> None:
    tokenizer = get_tokenizer(demo)
    loader = Loader(demo, tokenizer, image_size=64, global_batch=128, workers=1, crop_scale=(1, 1))
    batches = loader.batches()
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (128, 3, 64, 64)
    assert not loader.skipped
    scenes = EvalSet(f"{demo}/scenes_test-*.tar", tokenizer, image_size=64)
    assert (len(scenes), len(scenes.captions), scenes.labels) == (1000, 1000, None)
    digits = EvalSet(f"{demo}/digits_test-*.tar", tokenizer, image_size=64)
    assert len(digits) == 360
    assert digits.labels is not None


def test_it_can_be_written_from_a_plain_script(tmp_path: Path) -> None:
    """No `if __name__ == "__main__"` needed, though worker processes are started."""
    script = tmp_path / "script.py"
    script.write_text(f"from fastclip.data.demo import write_demo\nwrite_demo({str(tmp_path / 'out')!r}, scenes=20)\n")
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, cwd=Path(__file__).parent.parent)
    assert (tmp_path / "out" / "manifest.json").exists()
