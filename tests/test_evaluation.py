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
from data_helpers import image_file, sample
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastclip.data import EvalSet, get_tokenizer, write_shard
from fastclip.data.demo import write_demo
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, eval_sets, evaluate_folder, retrieval, zero_shot, zero_shot_classifier
from fastclip.evaluation.gallery import Gallery
from fastclip.evaluation.retrieval import ranks
from fastclip.evaluation.sets import find_sets
from fastclip.evaluation.suite import has_eval_sets, summary
from fastclip.evaluation.zero_shot import multi_label, prompts
from fastclip.models import create_model


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def tiles(monkeypatch: pytest.MonkeyPatch, images: int, texts: int) -> None:
    module = sys.modules["fastclip.evaluation.retrieval"]
    monkeypatch.setattr(module, "_IMAGES", images)
    monkeypatch.setattr(module, "_TEXTS", texts)


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
@pytest.mark.parametrize("tile", [(1, 1), (5, 7), (256, 2048)])
def test_retrieval_is_what_sorting_gives(
    captions_per_image: int, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles(monkeypatch, *tile)
    owners = [i for i in range(23) for _ in range(captions_per_image)]
    images = unit(23, 6)
    texts = F.normalize(images[owners] + 0.7 * unit(len(owners), 6, seed=1), dim=1)
    found = retrieval(images, texts, torch.tensor(owners))
    assert found == by_enumeration(images, texts, owners)
    assert 0.1 < found["image_to_text"]["R@1"] < found["image_to_text"]["R@10"]


@pytest.mark.parametrize("width", [6, 512, 777])
def test_a_score_has_the_same_bits_wherever_in_a_tile_it_lies(width: int) -> None:
    """What telling ties by their bits rests on; no library promises it, and in a tile of 3 x 4 MKL does not keep it."""
    module = sys.modules["fastclip.evaluation.retrieval"]
    image, text = (unit(1, width, seed=seed).float() for seed in (0, 1))
    scores = module._Tiles(image.expand(256, -1), text.expand(2048, -1)).scores(0, 0)
    assert scores.shape == (module._IMAGES, module._TEXTS)
    assert scores.unique().numel() == 1


@pytest.mark.parametrize("tile", [(16, 32), (256, 2048)])
def test_equal_scores_stand_in_the_order_of_their_index(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that are all alike find what lies first, which is chance; kinds of equal items are sorted stably."""
    tiles(monkeypatch, *tile)
    same = torch.ones(20, 4) / 2
    for figures in retrieval(same, same, torch.arange(20)).values():
        assert figures == {"R@1": 1 / 20, "R@5": 5 / 20, "R@10": 10 / 20, "median_rank": 10.5}
    generator = torch.Generator().manual_seed(0)
    owners = torch.randint(0, 23, (50,), generator=generator)
    images = unit(3, 6)[torch.randint(0, 3, (23,), generator=generator)]
    texts = unit(3, 6)[torch.randint(0, 3, (50,), generator=generator)]
    image_ranks, text_ranks = ranks(images.float(), texts.float(), owners)
    kinds = {tuple(row): number for number, row in enumerate(unit(3, 6).tolist())}
    image_kind, text_kind = ([kinds[tuple(row)] for row in rows.tolist()] for rows in (images, texts))
    scores = (unit(3, 6) @ unit(3, 6).T)[image_kind][:, text_kind]
    for i in range(23):
        order = sorted(range(50), key=lambda j: (-scores[i, j].item(), j))
        own = [order.index(j) for j in range(50) if owners[j] == i]
        assert image_ranks[i] == min(own, default=50)
    for j in range(50):
        order = sorted(range(23), key=lambda i: (-scores[i, j].item(), i))
        assert text_ranks[j] == order.index(int(owners[j]))


def test_an_image_without_a_caption_is_never_found() -> None:
    images = torch.eye(3)
    figures = retrieval(images, images[:2], torch.tensor([0, 1]))
    assert figures["image_to_text"]["R@1"] == pytest.approx(2 / 3)
    assert figures["text_to_image"]["R@1"] == 1
    with pytest.raises(ValueError, match="caption_image has 3 entries, must have 2"):
        retrieval(images, images[:2], torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"each of an image in \[0, 3\)"):
        retrieval(images, images[:2], torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="text_features must be finite"):
        retrieval(images, images * torch.nan, torch.arange(3))


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
    with pytest.raises(ValueError, match="'cat' names the classes 0 and 2"):
        zero_shot_classifier(encode, ["cat", "dog", "cat"], ["a {}"])
    with pytest.raises(ValueError, match="class 1 of 2 has an empty name"):
        zero_shot_classifier(encode, ["cat", " "], ["a {}"])
    own = {"cat": ["a cat", "the cat"], "dog": ["a dog"]}
    torch.testing.assert_close(zero_shot_classifier(encode, ["cat", "dog"], own)[0], classifier[0])
    with pytest.raises(ValueError, match="no prompt for the class 'bird'"):
        zero_shot_classifier(encode, ["cat", "bird"], own)


def test_prompts_are_encoded_for_some_classes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names, templates = [f"class {number}" for number in range(50)], ["a {}", "the {c}", "{} {c}"]
    sizes: list[int] = []

    def encode(texts: Any) -> Tensor:
        sizes.append(len(texts))
        return torch.stack([unit(5, seed=sum(text.encode())) for text in texts])

    whole = zero_shot_classifier(encode, names, templates)
    assert sizes.pop() == 150
    monkeypatch.setattr(sys.modules["fastclip.evaluation.zero_shot"], "_PROMPTS", 10)
    assert torch.equal(zero_shot_classifier(encode, names, templates), whole)
    assert max(sizes) <= 10
    assert prompts("x", templates) == ["a x", "the x", "x x"]


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


def test_equal_classes_stand_in_their_order() -> None:
    classifier = torch.eye(4)[[0, 1, 0, 1]]
    images, labels = torch.eye(4)[[0, 0, 0, 1]], torch.tensor([0, 0, 2, 1])
    found = zero_shot(images, classifier, labels)
    assert found["top1"] == 0.75
    assert found["top5"] == 1
    assert np.array(found["confusion"])[[0, 2, 1], [0, 0, 1]].tolist() == [2, 1, 1]


def test_zero_shot_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    monkeypatch.setattr(sys.modules["fastclip.evaluation.zero_shot"], "_SCORES", 100)
    images, classifier = unit(300, 16), unit(11, 16, seed=1)
    labels = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(2))  # two classes never occur
    scores = (images @ classifier.T).numpy()
    found = zero_shot(images, classifier, labels)
    predicted = scores.argmax(1)
    assert found["top1"] == metrics.accuracy_score(labels, predicted)
    assert found["top5"] == metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(11))
    wanted = metrics.recall_score(labels, predicted, average="macro", labels=labels.unique())
    assert found["mean_per_class_recall"] == pytest.approx(wanted, abs=1e-12)
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted, labels=range(11)).tolist()
    several = torch.rand(300, 11, generator=torch.Generator().manual_seed(3)) < 0.2
    wanted = metrics.average_precision_score(several.numpy(), scores, average="macro")
    assert multi_label(images, classifier, several)["mean_average_precision"] == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(ValueError, match=r"must be \(images, classes\) = \(300, 11\), was \(300, 10\)"):
        multi_label(images, classifier, several[:, :10])


@pytest.mark.parametrize("count", [3, 40])  # torch sorts long rows by another method than short ones
def test_equal_images_stand_in_their_order(count: int) -> None:
    images, classifier = torch.ones(count, 2), torch.ones(1, 2)
    for place in range(count):
        labels = torch.zeros(count, 1, dtype=torch.bool)
        labels[place] = True
        assert multi_label(images, classifier, labels)["average_precision"] == [1 / (place + 1)]


def test_average_precision_by_hand() -> None:
    images, classifier = torch.tensor([[1.0], [1.0], [0.5], [0.2]]), torch.tensor([[1.0], [-1.0]])
    labels = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 0]], dtype=torch.bool)
    found = multi_label(images, classifier, labels)
    assert found["average_precision"] == [
        pytest.approx((1 / 2 + 2 / 4) / 2),
        0,
    ]  # of equal scores the first comes first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, scenes=50, workers=1)
    return directory


def encoder(folder: Path, batch_size: int = 96) -> Encoder:
    torch.manual_seed(0)
    return Encoder.of_model(create_model("debug"), get_tokenizer(folder), batch_size=batch_size)


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
    held_out = find_sets(folder, get_tokenizer(folder), 64)["scenes_test"]
    gallery = Gallery()
    features = torch.eye(len(held_out.images))
    gallery.add_pairs(held_out, features, features)
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
