"""Held-out sets in every layout that is read, and what is said of folders that are not quite in one."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import image_file, small_tokenizer

from fastclip.data.shards import write_shard
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.evaluation.sets import HeldOut, find_sets
from fastclip.models import create_model


def npy(*values: int) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array(values))
    return out.getvalue()


def web_dataset(folder: Path, samples: list[dict[str, bytes]], kind: str = "", shards: int = 2) -> Path:
    """A folder as clip_benchmark_export_wds writes it."""
    (folder / "test").mkdir(parents=True)
    size = -(-len(samples) // shards)
    for shard in range(shards):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number, sample in enumerate(samples[shard * size : (shard + 1) * size], shard * size):
                for suffix, content in sample.items():
                    member = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text(f"{shards}\n")
    if kind:
        (folder / "dataset_type.txt").write_text(f"{kind}\n")
    (folder / "classnames.txt").write_text("red\ngreen\nblue\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n{c} on a table\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return small_tokenizer(tmp_path)


def only(folder: Path, tokenizer: Any, split: str = "test") -> HeldOut:
    found = find_sets(folder, tokenizer, 8, split)
    assert len(found) == 1
    return next(iter(found.values()))


def test_clip_benchmark_classification(tmp_path: Path, tokenizer: Any) -> None:
    samples = [{"webp": image_file(n, form="WEBP"), "cls": str(n % 3).encode()} for n in range(5)]
    one = only(web_dataset(tmp_path / "cars", samples), tokenizer)
    assert (one.name, one.task, one.layout) == ("cars", "zero_shot", "CLIP_benchmark, test split")
    assert one.labels is not None
    assert one.labels.tolist() == [0, 1, 2, 0, 1]
    assert one.classnames == ["red", "green", "blue"]
    assert one.templates == ["a {c}", "{c} on a table"]
    assert one.images.keys == [f"s{n:07d}" for n in range(5)]
    assert one.images.image_file(4) == samples[4]["webp"]
    assert one.images.images(1, 9).shape == (4, 3, 8, 8)


def test_clip_benchmark_multi_label_and_retrieval(tmp_path: Path, tokenizer: Any) -> None:
    samples = [{"npy": npy(n % 2, 1, 0), "jpg": image_file(n, form="JPEG")} for n in range(4)]
    one = only(web_dataset(tmp_path / "voc", samples, "multilabel"), tokenizer)
    assert one.task == "multi_label"
    assert one.labels is not None
    assert one.labels.tolist() == [[bool(n % 2), True, False] for n in range(4)]
    texts = [
        {"png": image_file(n), "txt": "\n".join(f"red circle {n} {t}" for t in range(1 + n)).encode()} for n in range(3)
    ]
    two = only(web_dataset(tmp_path / "coco", [*texts, {"txt": b"no image"}], "retrieval"), tokenizer)
    assert two.task == "retrieval"
    assert two.caption_image.tolist() == [0, 1, 1, 2, 2, 2]
    assert two.captions[:3] == ["red circle 0 0", "red circle 1 0", "red circle 1 1"]
    assert two.images.skipped == {"missing_member": 1}


def test_class_folders(tmp_path: Path, tokenizer: Any) -> None:
    """ImageNet-V2 numbers its folders without zeros in front: as text, "10" would come before "2"."""
    root = tmp_path / "v2"
    for number in range(12):
        folder = root / str(number)
        folder.mkdir(parents=True)
        (folder / "b.png").write_bytes(image_file(number))
        (folder / "a.jpeg").write_bytes(image_file(number, form="JPEG"))
    one = only(root, tokenizer)
    assert one.labels is not None
    assert one.labels.tolist() == [n for n in range(12) for _ in "ab"]
    assert one.images.keys[4:6] == ["2/a.jpeg", "2/b.png"]
    assert one.templates == ["a photo of a {}."]
    names = [f"class {number}" for number in range(12)]
    (root / "classes.json").write_text(json.dumps({"classnames": names, "templates": ["a {}"]}))
    assert only(root, tokenizer).classnames == names


def test_a_map_of_folders_leaves_out_and_joins_classes(tmp_path: Path, tokenizer: Any) -> None:
    """ObjectNet and the 200-class subsets: which folder is which class is a file, not code."""
    root = tmp_path / "objectnet"
    for name in ("air_freshener", "alarm clock", "digital clock", "wall clock"):
        (root / name).mkdir(parents=True)
        (root / name / "0.png").write_bytes(image_file(len(name)))
    assert only(root, tokenizer).classnames == ["air freshener", "alarm clock", "digital clock", "wall clock"]
    classes = {"classnames": ["wall clock", "clock"], "templates": ["a {}"]}
    (root / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(UserError, match=r'2 classnames, .* has 4 class folders: make them agree, or add "folders"'):
        find_sets(root, tokenizer, 8)
    classes["folders"] = {"alarm clock": 1, "digital clock": 1, "wall clock": 0}  # type: ignore[assignment]
    (root / "classes.json").write_text(json.dumps(classes))
    one = only(root, tokenizer)
    assert one.labels is not None
    assert one.labels.tolist() == [1, 1, 0]
    assert only(tmp_path, tokenizer).name == "objectnet"  # with a classes.json, a folder below is found


def karpathy(folder: Path, **replaced: Any) -> Path:
    folder.mkdir(exist_ok=True)
    images = [
        {
            "filename": f"{n}.jpg",
            "filepath": "val2014",
            "split": ("train", "restval", "val", "test", "test")[n],
            "sentences": [{"raw": f"a {n} {turn}"} for turn in range(5)],
        }
        | replaced
        for n in range(5)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    (folder / "val2014").mkdir(exist_ok=True)
    for n in range(5):
        (folder / "val2014" / f"{n}.jpg").write_bytes(image_file(n, form="JPEG"))
    return folder


def test_karpathy_splits(tmp_path: Path, tokenizer: Any) -> None:
    one = only(karpathy(tmp_path / "coco"), tokenizer)
    assert (one.name, one.task, one.layout, len(one.images)) == ("coco", "retrieval", "Karpathy test split", 2)
    assert one.captions == [f"a {n} {turn}" for n in (3, 4) for turn in range(5)]
    assert one.caption_image.tolist() == [0] * 5 + [1] * 5
    assert len(only(tmp_path / "coco", tokenizer, split="restval").captions) == 5


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"filepath": "../other"}, "lies outside of"),
        ({"filename": "gone.jpg"}, "which is neither in"),
        ({"sentences": 3}, "must be a Karpathy split file"),
        ({"split": "train"}, "no image of the split 'test'"),
    ],
)
def test_karpathy_files_that_cannot_be_read(
    tmp_path: Path, tokenizer: Any, replaced: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        find_sets(karpathy(tmp_path / "coco", **replaced), tokenizer, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "test" / "1.tar").unlink(), "1.tar is missing: nshards.txt promises 2 shards"),
        (lambda f: (f / "test" / "nshards.txt").write_text("many"), "must hold the number of shards, holds 'many'"),
        (lambda f: (f / "classnames.txt").unlink(), "classnames.txt is missing"),
        (lambda f: (f / "test" / "0.tar").write_bytes(b"junk" * 999), "is no tar file, or is damaged"),
        (lambda f: (f / "dataset_type.txt").write_text("retrieval"), "no sample has an image and a .txt member"),
    ],
)
def test_clip_benchmark_folders_that_cannot_be_read(tmp_path: Path, tokenizer: Any, change: Any, message: str) -> None:
    folder = web_dataset(tmp_path / "cars", [{"png": image_file(n), "cls": b"0"} for n in range(4)])
    change(folder)
    with pytest.raises(UserError, match=message):
        find_sets(folder, tokenizer, 8)


def test_labels_that_are_none(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"s0000000\.cls in .* is no label"):
        find_sets(web_dataset(tmp_path / "a", [{"png": image_file(0), "cls": b"cat"}], shards=1), tokenizer, 8)
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)  # code could hide in a pickle: it is not opened
    samples = [{"png": image_file(0), "npy": objects.getvalue()}]
    with pytest.raises(UserError, match="is no label"):
        find_sets(web_dataset(tmp_path / "b", samples, "multilabel", shards=1), tokenizer, 8)


def test_class_names_and_labels_that_disagree(tmp_path: Path, tokenizer: Any) -> None:
    encoder = Encoder.of_model(create_model("debug"), tokenizer)
    samples = [{"png": image_file(n), "cls": str(n).encode()} for n in range(5)]
    web_dataset(tmp_path / "data" / "cars", samples)
    with pytest.raises(UserError, match=r"cars \(3 class names\): labels must be in \[0, 3\), was 0 to 4"):
        evaluate_folder(encoder, tmp_path / "data")
    (tmp_path / "data" / "cars" / "classnames.txt").write_text("a\nb\na\nd\ne\n")
    with pytest.raises(UserError, match=r"cars \(5 class names\): classnames: 'a' names the classes 0 and 2"):
        evaluate_folder(encoder, tmp_path / "data")


def test_several_layouts_below_one_folder(tmp_path: Path, tokenizer: Any) -> None:
    encoder = Encoder.of_model(create_model("debug"), tokenizer)
    root = tmp_path / "data"
    web_dataset(root / "cars", [{"png": image_file(n), "cls": str(n % 3).encode()} for n in range(4)])
    web_dataset(root / "voc", [{"png": image_file(n), "npy": npy(1, 0, n % 2)} for n in range(4)], "multilabel")
    karpathy(root / "coco")
    found = evaluate_folder(encoder, root, with_gallery=True)
    assert [(name, one["task"]) for name, one in found["sets"].items()] == [
        ("cars", "zero_shot"),
        ("coco", "retrieval"),
        ("voc", "multi_label"),
    ]
    assert found["sets"]["coco"]["texts"] == 10
    assert 0 < found["sets"]["voc"]["mean_average_precision"] <= 1
    assert len({one["fingerprint"] for one in found["sets"].values()}) == 3
    assert evaluate_folder(encoder, root, with_gallery=True) == json.loads(json.dumps(found))


def test_a_folder_without_a_set(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="must hold shards named"):
        find_sets(tmp_path, tokenizer, 8)
    write_shard(tmp_path / "train-00000.tar", [])
    with pytest.raises(UserError, match="must hold shards named"):
        find_sets(tmp_path, tokenizer, 8)
    assert torch.is_tensor(only(karpathy(tmp_path / "k"), tokenizer).caption_image)
