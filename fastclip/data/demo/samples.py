"""The samples of the three parts of the embedded data set: training, held-out digits, held-out scenes."""

import io
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastclip.data.demo.captions import digit_captions, scene_captions
from fastclip.data.demo.digits import enlarge, load_digits, split_digits
from fastclip.data.demo.render import render_scene
from fastclip.data.demo.scenes import HeldOut, Object, Scene, held_out_scenes, train_scene
from fastclip.data.streams import Stream, permutation

PARTS = ("train", "digits_test", "scenes_test")
DIGIT_SHARE = 0.12  # of the training part

Files = dict[str, bytes]


@dataclass(frozen=True)
class Part:
    """One of PARTS. Its sample `number` is a pure function of (seed, number), and of `scenes` in the training part."""

    name: str
    seed: int
    scenes: int

    def __len__(self) -> int:
        return len(self._order)

    @cached_property
    def _held_out(self) -> list[HeldOut]:
        return held_out_scenes(self.seed)

    @cached_property
    def _held_out_contents(self) -> frozenset[tuple[Object, ...]]:
        return frozenset(held.scene.content for held in self._held_out)

    @cached_property
    def _digits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        images, labels = load_digits()
        train, test = split_digits(len(labels), self.seed)
        return images, labels, test if self.name == "digits_test" else train

    @cached_property
    def _order(self) -> np.ndarray:
        if self.name == "digits_test":
            return np.arange(len(self._digits[2]))
        if self.name == "scenes_test":
            return np.arange(len(self._held_out))
        digits = round(self.scenes * DIGIT_SHARE / (1 - DIGIT_SHARE))
        return permutation(self.scenes + digits, "mix", self.seed)

    def sample(self, number: int) -> tuple[str, Files]:
        """Key and files of sample `number`."""
        if self.name == "digits_test":
            return self._digit(number)
        if self.name == "scenes_test":
            held = self._held_out[number]
            return self._scene(number, held.scene, {"group": held.group, "kind": held.kind})
        number = int(self._order[number])
        if number < self.scenes:
            return self._scene(number, train_scene(self.seed, number, self._held_out_contents), {})
        return self._digit(number - self.scenes)

    def _scene(self, number: int, scene: Scene, extra: dict[str, Any]) -> tuple[str, Files]:
        key = f"{self.name}-scene-{number:06d}"
        stream = Stream(self.seed, key)
        captions = scene_captions(scene, stream)
        meta = {
            "source": "scenes",
            "objects": [asdict(item) for item in scene.objects],
            "background": scene.background,
            "captions": captions[:1] if self.name == "scenes_test" else captions,
        }
        return key, sample_files(render_scene(scene, stream), meta | extra)

    def _digit(self, number: int) -> tuple[str, Files]:
        images, labels, chosen = self._digits
        turn, place = divmod(number, len(chosen))
        label = int(labels[chosen[place]])
        key = f"{self.name}-digit-{number:06d}"
        stream = Stream(self.seed, key)
        meta = {"source": "digits", "label": label, "number": int(chosen[place]), "objects": []}
        image = enlarge(images[chosen[place]], stream if turn else None)
        return key, sample_files(image, meta | {"captions": digit_captions(label, stream)})


def sample_files(pixels: np.ndarray, meta: dict[str, Any]) -> Files:
    """An image (H, W, 3) uint8 and its "captions" among `meta` as a shard's record holds them."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", compress_level=1)
    return {"png": png.getvalue(), "txt": meta["captions"][0].encode(), "json": json.dumps(meta).encode()}
