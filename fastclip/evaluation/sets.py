"""Held-out sets in the layouts that people have: shards, CLIP_benchmark's WebDataset, Karpathy splits, class folders.

| what lies in the folder | read as |
|---|---|
| `<name>_test-*.tar` | our shards; classified if `<name>_test.classes.json` is beside them, else retrieved |
| `<split>/nshards.txt`, `<split>/0.tar` ... | CLIP_benchmark's export, with `dataset_type.txt`, `classnames.txt` |
| `dataset_<name>.json` | Karpathy's split file, image files in the same folder |
| folders of image files | one class a folder; `classes.json` gives names, prompts and which folder is which class |
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastclip.data import EvalSet, Tokenizer
from fastclip.data.eval_set import eval_batch
from fastclip.data.shards import IMAGE_SUFFIXES
from fastclip.errors import UserError
from fastclip.evaluation.tar_members import TarMembers
from fastclip.evaluation.zero_shot import Templates

HELD_OUT = "_test"
PHOTO = ("a photo of a {}.",)
Task = Literal["zero_shot", "multi_label", "retrieval"]


class ImageSource(Protocol):
    """Images by number, the same on every rank. What cannot be decoded is mid-gray and counted in `skipped`."""

    keys: list[str]
    skipped: Counter[str]

    def __len__(self) -> int: ...

    def images(self, start: int, stop: int) -> Tensor:
        """Images start..stop - 1: uint8 (n, 3, S, S), shorter side resized, centre cut out."""
        ...

    def image_file(self, number: int) -> bytes:
        """The image file of image `number`."""
        ...


class ImageFiles:
    """An `ImageSource` of files that `image_file(number)` reads."""

    def __init__(self, keys: Sequence[str], image_file: Callable[[int], bytes], image_size: int) -> None:
        self.keys, self.image_file, self._image_size = list(keys), image_file, image_size
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.keys)

    def images(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`."""
        numbers = range(len(self))[start:stop]
        return eval_batch(numbers, self.image_file, self._image_size, self.skipped)


class Subset:
    """Some images of an `ImageSource`."""

    def __init__(self, source: ImageSource, numbers: Sequence[int]) -> None:
        self._source, self._numbers, self.skipped = source, list(numbers), source.skipped
        self.keys = [source.keys[number] for number in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def images(self, start: int, stop: int) -> Tensor:
        """See `ImageSource`."""
        return torch.cat([self._source.images(number, number + 1) for number in self._numbers[start:stop]])

    def image_file(self, number: int) -> bytes:
        """See `ImageSource`."""
        return self._source.image_file(self._numbers[number])


@dataclass(frozen=True)
class HeldOut:
    """One set: its images and what is asked of them.

    A set to classify has `labels` (int64 (N,), or bool (N, classes) where an image has several), `classnames` and
    `templates`; a set to retrieve has `captions` and `caption_image` int64 (captions,).
    """

    name: str
    task: Task
    images: ImageSource
    layout: str
    labels: Tensor | None = None
    classnames: list[str] = field(default_factory=list)
    templates: Templates = ()
    captions: list[str] = field(default_factory=list)
    caption_image: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def find_sets(folder: str | Path, tokenizer: Tokenizer, image_size: int, split: str = "test") -> dict[str, HeldOut]:
    """The held-out sets of `folder` by name, in the first layout of the table above that is there.

    A folder without a set of its own may hold one folder for each set. Errors: `UserError` for a folder without any.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no held-out data at {folder}: it is not a folder")
    found = _sets_of(folder, tokenizer, image_size, split)
    if not found:
        for inside in sorted(path for path in folder.iterdir() if path.is_dir()):
            found |= _sets_of(inside, tokenizer, image_size, split, class_folders=False)
    if not found:
        class_folders = _class_folders(folder, split)
        if class_folders:
            one = _image_folder(folder, class_folders, image_size)
            found = {one.name: one}
    if not found:
        raise UserError(
            f"no held-out data in {folder}: it must hold shards named <name>{HELD_OUT}-00000.tar, {split}/nshards.txt "
            f"with {split}/0.tar (CLIP_benchmark), dataset_<name>.json (Karpathy) or one folder of images a class"
        )
    return found


def _sets_of(
    folder: Path, tokenizer: Tokenizer, image_size: int, split: str, class_folders: bool = True
) -> dict[str, HeldOut]:
    names = sorted({path.name.rpartition("-")[0] for path in folder.glob(f"*{HELD_OUT}-*.tar")})
    found = {name: _shards(folder, name, tokenizer, image_size) for name in names}
    if not found and (folder / split / "nshards.txt").is_file():
        found = {folder.name: _web_dataset(folder, image_size, split)}
    if not found:
        karpathy = sorted(folder.glob("dataset_*.json"))
        found = {path.stem.removeprefix("dataset_"): _karpathy(path, image_size, split) for path in karpathy}
    if not found and not class_folders and (folder / "classes.json").is_file():
        found = {folder.name: _image_folder(folder, _class_folders(folder, split), image_size)}
    return found


def _shards(folder: Path, name: str, tokenizer: Tokenizer, image_size: int) -> HeldOut:
    eval_set = EvalSet(sorted(folder.glob(f"{name}-*.tar")), tokenizer, image_size)
    path = folder / f"{name}.classes.json"
    one = HeldOut(
        name, "retrieval", eval_set, "shards", captions=eval_set.captions, caption_image=eval_set.caption_image
    )
    if not path.is_file() or eval_set.labels is None:
        return one
    classnames, templates = read_classes(path)
    return replace(one, task="zero_shot", labels=eval_set.labels, classnames=classnames, templates=templates)


def training_part(
    folder: str | Path, held_out: HeldOut, tokenizer: Tokenizer, image_size: int, at_most: int
) -> tuple[ImageSource, Tensor] | None:
    """The first `at_most` labelled images to train a probe on for a set of `find_sets(folder)`, None if none lie there.

    In our shards: `<name>_train-*.tar` beside `<name>_test-*.tar`, else the samples of `train-*.tar` that have a label;
    in the other layouts the split "train".
    """
    folder = Path(folder)
    if held_out.layout == "shards":
        stem = held_out.name.removesuffix(HELD_OUT)
        shards = sorted(folder.glob(f"{stem}_train-*.tar")) or sorted(folder.glob("train-*.tar"))
        if not shards:
            return None
        source: ImageSource = EvalSet(shards, tokenizer, image_size)
        found = [record.get("label") for record in source.records]  # type: ignore[attr-defined]
    else:
        inside = folder / held_out.name if (folder / held_out.name).is_dir() else folder
        if not (inside / "train").is_dir():
            return None
        one = next(iter(find_sets(inside, tokenizer, image_size, "train").values()))
        if one.labels is None or one.task != "zero_shot":
            return None
        source, found = one.images, one.labels.tolist()
    labels = {number: label for number, label in enumerate(found) if isinstance(label, int)}
    numbers = list(labels)[:at_most]
    if not numbers:
        return None
    return Subset(source, numbers), torch.tensor([labels[number] for number in numbers])


def read_classes(path: Path) -> tuple[list[str], Templates]:
    """Class names and templates of a `classes.json`; templates may be a list for all, or one list for each name."""
    try:
        content = json.loads(path.read_text())
        templates = content["templates"]
        if isinstance(templates, dict):
            templates = {str(name): [str(text) for text in texts] for name, texts in templates.items()}
        else:
            templates = [str(text) for text in templates]
        return [str(name) for name in content["classnames"]], templates
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} must hold {{"classnames": [...], "templates": [...]}}: {error!r}') from error


def _web_dataset(folder: Path, image_size: int, split: str) -> HeldOut:
    """CLIP_benchmark's export: key.<image> beside key.cls, key.npy (multi-label) or key.txt (a caption a line)."""
    kind = _line_of(folder / "dataset_type.txt", "classification").lower()
    count = _line_of(folder / split / "nshards.txt", "")
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"{folder / split / 'nshards.txt'} must hold the number of shards, holds {count!r}")
    members = TarMembers([folder / split / f"{number}.tar" for number in range(int(count))])
    answer = {"retrieval": "txt", "multilabel": "npy"}.get(kind, "cls")
    usable = [number for number in range(len(members)) if members.has(number, IMAGE_SUFFIXES, answer)]
    if not usable:
        raise UserError(f"{folder / split}: no sample has an image and a .{answer} member, which {kind} needs")
    images = ImageFiles(
        [members.keys[number] for number in usable], lambda n: members.read(usable[n], IMAGE_SUFFIXES), image_size
    )
    if len(usable) < len(members):
        images.skipped["missing_member"] = len(members) - len(usable)
    if kind == "retrieval":
        texts = [members.read(number, ("txt",)).decode("utf-8", "replace").splitlines() for number in usable]
        owners = [number for number, lines in enumerate(texts) for _ in lines]
        captions = [line for lines in texts for line in lines]
        layout = f"CLIP_benchmark, {split} split"
        return HeldOut(folder.name, "retrieval", images, layout, captions=captions, caption_image=torch.tensor(owners))
    classnames = _lines(folder / "classnames.txt")
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    labels = torch.stack([members.label(number, answer) for number in usable])
    task: Task = "multi_label" if kind == "multilabel" else "zero_shot"
    return HeldOut(folder.name, task, images, f"CLIP_benchmark, {split} split", labels, classnames, templates)


def _line_of(path: Path, default: str) -> str:
    return path.read_text().strip() if path.is_file() else default


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing: a set to classify needs it, one entry a line")
    return [line.strip() for line in path.read_text().splitlines()]


def _karpathy(path: Path, image_size: int, split: str) -> HeldOut:
    """The images of one split ("test": 1,000 of Flickr30k, 5,000 of COCO) with all their sentences."""
    try:
        images = [image for image in json.loads(path.read_text())["images"] if image["split"] == split]
        texts = [[str(sentence["raw"]) for sentence in image["sentences"]] for image in images]
        names = [
            f"{image['filepath']}/{image['filename']}" if "filepath" in image else image["filename"] for image in images
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{path} must be a Karpathy split file, {{"images": [{{"filename", "split", ...}}]}}: {error!r}'
        ) from error
    if not images:
        raise UserError(f"{path} has no image of the split {split!r}")
    folder = path.parent
    roots = (folder, folder / "images")
    root = next((root for root in roots if _inside(root, names[0]).is_file()), None)
    if root is None:
        raise UserError(f"{path} names {names[0]!r}, which is neither in {roots[0]} nor in {roots[1]}")
    owners = [number for number, sentences in enumerate(texts) for _ in sentences]
    return HeldOut(
        path.stem.removeprefix("dataset_"),
        "retrieval",
        ImageFiles(names, lambda number: _inside(root, names[number]).read_bytes(), image_size),
        f"Karpathy {split} split",
        captions=[sentence for sentences in texts for sentence in sentences],
        caption_image=torch.tensor(owners),
    )


def _inside(root: Path, name: str) -> Path:
    """`root/name`; an error where the name climbs out of the folder."""
    path = Path(root, name)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"image {name!r} lies outside of {root}")
    return path


def _class_folders(folder: Path, split: str) -> list[Path]:
    """The folders of images in `folder` or its split in the order of their classes: by number, else by name."""
    for root in (folder / split, folder / "val", folder):
        inside = [path for path in root.iterdir() if path.is_dir() and _image_files(path)] if root.is_dir() else []
        if inside:
            numeric = all(path.name.isdecimal() for path in inside)
            return sorted(inside, key=(lambda path: int(path.name)) if numeric else (lambda path: path.name))
    return []


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)


def _image_folder(folder: Path, class_folders: list[Path], image_size: int) -> HeldOut:
    """One class a folder. "folders" of classes.json maps a folder's name to its class's number, where they differ."""
    path = folder / "classes.json"
    place = {inside.name: number for number, inside in enumerate(class_folders)}
    if path.is_file():
        classnames, templates = read_classes(path)
        mapped = json.loads(path.read_text()).get("folders")
        if mapped is not None:
            place = {str(name): int(number) for name, number in mapped.items()}
        elif len(classnames) != len(class_folders):
            raise UserError(
                f"{path} has {len(classnames)} classnames, {folder} has {len(class_folders)} class folders: make them "
                f'agree, or add "folders", which maps a folder to the number of its class'
            )
    else:
        classnames, templates = [re.sub(r"[_\s]+", " ", inside.name) for inside in class_folders], list(PHOTO)
    files = [
        (file, place[inside.name]) for inside in class_folders if inside.name in place for file in _image_files(inside)
    ]
    if not files:
        raise UserError(f"{folder}: no class folder is named in {path}")
    return HeldOut(
        folder.name,
        "zero_shot",
        ImageFiles(
            [str(file.relative_to(folder)) for file, _ in files],
            lambda number: files[number][0].read_bytes(),
            image_size,
        ),
        "class folders",
        torch.tensor([number for _, number in files]),
        classnames,
        templates,
    )
