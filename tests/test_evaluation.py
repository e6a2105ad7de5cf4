"""Zero-shot and retrieval against plain enumeration, the suite on real shards, and the same figures on any ranks."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contrastive_loss_helpers import run_on_ranks
from data_helpers import image_file, sample
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastclip.data import EvalSet, get_tokenizer, write_shard
from fastclip.data.demo import write_demo
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, eval_sets, evaluate_folder, retrieval, zero_shot, zero_shot_classifier
from fastclip.evaluation.suite import has_eval_sets, summary
from fastclip.models import create_model


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def by_enumeration(images: Tensor, texts: Tensor, owners: list[int]) -> dict[str, dict[str, float]]:
    """R@k and the median rank as their definitions say, by sorting every list."""
    scores = images @ texts.T
    found: dict[str, list[int]] = {"image_to_text": [], "text_to_image": []}
    for i in range(len(images)):
        order = sorted(range(len(texts)), key=lambda j: -scores[i, j].item())
        found["image_to_text"].append(min(order.index(j) for j, owner in enumerate(owners) if owner == i))
    for j in range(len(texts)):
        order = sorted(range(len(images)), key=lambda i: -scores[i, j].item())
        found["text_to_image"].append(order.index(owners[j]))
    results = {}
    for way, places in found.items():
        recalls = {f"R@{k}": sum(place < k for place in places) / len(places) for k in (1, 5, 10)}
        results[way] = recalls | {"median_rank": float(np.median(places)) + 1}
    return results


@pytest.mark.parametrize("captions_per_image", [1, 3])
@pytest.mark.parametrize("block", [1, 50, 1 << 24])
def test_retrieval_is_what_sorting_gives(captions_per_image: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastclip.evaluation.retrieval"], "_BLOCK", block)
    owners = [i for i in range(23) for _ in range(captions_per_image)]
    images = unit(23, 6)
    texts = F.normalize(images[owners] + 0.7 * unit(len(owners), 6, seed=1), dim=1)
    found = retrieval(images, texts, torch.tensor(owners))
    assert found == by_enumeration(images, texts, owners)
    assert 0.1 < found["image_to_text"]["R@1"] < found["image_to_text"]["R@10"]


def test_features_that_are_all_alike_find_nothing() -> None:
    same = torch.ones(20, 4) / 2
    for figures in retrieval(same, same, torch.arange(20)).values():
        assert figures == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "median_rank": 20.0}


def test_an_image_without_a_caption_is_never_found() -> None:
    images = torch.eye(3)
    figures = retrieval(images, images[:2], torch.tensor([0, 1]))
    assert figures["image_to_text"]["R@1"] == pytest.approx(2 / 3)
    assert figures["text_to_image"]["R@1"] == 1
    with pytest.raises(ValueError, match="caption_image has 3 entries, must have 2"):
        retrieval(images, images[:2], torch.tensor([0, 1, 2]))


def test_classifier_is_the_renormalised_mean_of_normalised_prompts() -> None:
    table = {"a cat": [3.0, 0.0], "the cat": [0.0, 0.5], "a dog": [-1.0, 0.0], "the dog": [-2.0, 0.0]}
    seen: list[list[str]] = []

    def encode(texts: Any) -> Tensor:
        seen.append(list(texts))
        return torch.tensor([table[text] for text in texts])

    classifier = zero_shot_classifier(encode, ["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(classifier, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))
    assert seen == [list(table)]
    with pytest.raises(ValueError, match="template 'a photo' must hold"):
        zero_shot_classifier(encode, ["cat"], ["a {}", "a photo"])
    with pytest.raises(ValueError, match="must not be empty"):
        zero_shot_classifier(encode, [], ["a {}"])


def test_zero_shot_figures_by_hand() -> None:
    classifier = torch.eye(7)
    labels = torch.tensor([0, 0, 0, 1, 5])  # class 0 is found twice in three, 1 always, 5 is last of seven
    images = torch.zeros(5, 7)
    images[torch.arange(5), torch.tensor([0, 0, 2, 1, 6])] = 1
    images[4, :5] = 0.5
    images[2, 0] = 0.5
    found = zero_shot(images, classifier, labels)
    assert found["top1"] == 3 / 5
    assert found["top5"] == 4 / 5
    assert found["mean_per_class_recall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    confusion = np.zeros((7, 7), dtype=int)
    confusion[0, 0], confusion[0, 2], confusion[1, 1], confusion[5, 6] = 2, 1, 1, 1
    assert found["confusion"] == confusion.tolist()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\), was 0 to 7"):
        zero_shot(images, classifier, torch.tensor([0, 0, 0, 0, 7]))
    with pytest.raises(ValueError, match="labels has 2 entries, must have 5"):
        zero_shot(images, classifier, labels[:2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, scenes=50, workers=1)
    return directory


def encoder(folder: Path, group: dist.ProcessGroup | None = None, batch_size: int = 96) -> Encoder:
    torch.manual_seed(0)
    plain = Encoder.of_model(create_model("debug"), get_tokenizer(folder), batch_size=batch_size)
    return Encoder(plain.forward, plain.config, plain.tokenizer, group=group, batch_size=batch_size)


def on_ranks(folder: Path) -> Any:
    return evaluate_folder(encoder(folder, dist.group.WORLD), folder, with_gallery=True)


def test_a_folder_gives_the_same_figures_on_any_number_of_ranks(folder: Path) -> None:
    torch.set_num_threads(1)
    alone = evaluate_folder(encoder(folder), folder, with_gallery=True)
    for found in run_on_ranks(3, on_ranks, folder):
        assert found == alone


def test_what_is_found_in_the_demo_folder(folder: Path) -> None:
    found = evaluate_folder(encoder(folder), folder, with_gallery=True)
    digits, scenes = found["sets"]["digits_test"], found["sets"]["scenes_test"]
    assert (digits["task"], digits["images"], len(digits["classnames"])) == ("zero_shot", 360, 10)
    assert np.array(digits["confusion"]).sum() == 360
    assert (scenes["task"], scenes["images"], scenes["texts"]) == ("retrieval", 1000, 1000)
    assert digits["skipped"] == scenes["skipped"] == {}
    assert "digits_test top-1" in summary(found)
    assert "text->image R@1" in summary(found)
    gallery = json.loads(json.dumps(found["gallery"]))
    assert len(gallery["text_to_image"]) == 6
    assert len(gallery["image_to_text"]) == 12
    for entry in gallery["text_to_image"]:
        scores = [shown["score"] for shown in entry["images"]]
        assert scores == sorted(scores, reverse=True)
        content = entry["images"][0]["image"].removeprefix("data:image/png;base64,")
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (64, 64)
    assert "gallery" not in evaluate_folder(encoder(folder), folder)


def test_the_gallery_marks_the_true_pairs(folder: Path) -> None:
    """With a model whose features are the pair's number, every first answer is right and all others are wrong."""
    images = eval_sets(folder, get_tokenizer(folder), 64)["scenes_test"]
    from fastclip.evaluation.gallery import Gallery

    gallery = Gallery()
    features = torch.eye(len(images))
    gallery.add_pairs(images, features, features)
    for entry in gallery.to_dict()["text_to_image"]:
        assert [shown["right"] for shown in entry["images"]] == [True, False, False, False, False]
    for entry in gallery.to_dict()["image_to_text"]:
        assert [shown["right"] for shown in entry["texts"]] == [True, False, False, False, False]


def test_features_are_those_of_the_model(folder: Path) -> None:
    model = create_model("debug")
    own = Encoder.of_model(model, get_tokenizer(folder), batch_size=7)
    eval_set = eval_sets(folder, own.tokenizer, 64)["digits_test"]
    features = own.images(eval_set)
    first = Image.open(io.BytesIO(eval_set.image_file(0)))
    torch.testing.assert_close(own.image(first), features[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(360))
    ids = own.tokenizer(eval_set.captions[:9])
    expected = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(own.texts(eval_set.captions[:9]), expected.detach(), atol=1e-6, rtol=1e-5)


def test_a_broken_image_counts_against_the_model_and_is_counted(tmp_path: Path, folder: Path) -> None:
    write_shard(tmp_path / "x_test-00000.tar", [sample(0), sample(1, png=b"no image"), sample(2, json=b"", txt=b" ")])
    found = evaluate_folder(encoder(folder), tmp_path)["sets"]["x_test"]
    assert found["images"] == 2
    assert found["skipped"] == {"unreadable_image": 1, "empty_caption": 1}


def test_folders_without_held_out_data(tmp_path: Path, folder: Path) -> None:
    tokenizer = get_tokenizer(folder)
    assert has_eval_sets(folder)
    assert not has_eval_sets(tmp_path)
    with pytest.raises(UserError, match="it must hold shards named <name>_test-00000"):
        eval_sets(tmp_path, tokenizer, 64)
    with pytest.raises(UserError, match="it is not a folder"):
        eval_sets(tmp_path / "nothing", tokenizer, 64)
    write_shard(tmp_path / "x_test-00000.tar", [sample(0)])
    (tmp_path / "x_test.classes.json").write_text('{"classnames": ["a"]}')
    with pytest.raises(UserError, match="must hold"):
        evaluate_folder(encoder(folder), tmp_path)


def test_eval_sets_are_images_in_the_order_of_the_shards(folder: Path) -> None:
    sets = eval_sets(folder, get_tokenizer(folder), 64)
    assert list(sets) == ["digits_test", "scenes_test"]
    assert all(isinstance(s, EvalSet) for s in sets.values())
    assert sets["scenes_test"].keys == sorted(sets["scenes_test"].keys)


def test_the_gallery_holds_small_pictures_whatever_the_shard_holds(tmp_path: Path, folder: Path) -> None:
    wide, broken = sample(0, png=image_file(0, (900, 300))), sample(1, png=b"no image")
    write_shard(tmp_path / "x_test-00000.tar", [wide, broken])
    found = evaluate_folder(encoder(folder), tmp_path, with_gallery=True)["gallery"]
    uris = [entry["image"].removeprefix("data:image/png;base64,") for entry in found["image_to_text"]]
    assert [Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris] == [(160, 53), (160, 160)]
