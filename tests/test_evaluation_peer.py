"""The figures are CLIP_benchmark's and open_clip's on the same features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import clip_benchmark_module, open_clip_module
from torch import Tensor
from torch.nn import functional as F

from fastclip.evaluation import retrieval, zero_shot, zero_shot_classifier
from fastclip.evaluation.zero_shot import multi_label

pytestmark = pytest.mark.peer


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class Features(torch.nn.Module):
    """A model whose inputs are the features already."""

    def encode_image(self, image: Tensor) -> Tensor:
        return image

    def encode_text(self, text: Tensor) -> Tensor:
        return text


def one_text_a_number(texts: list[str]) -> Tensor:
    return torch.stack([unit(16, seed=1 + sum(text.encode())) for text in texts])


class Set(list):
    classes: tuple[str, ...] = ()


def loader(pairs: list[Any], classes: tuple[str, ...] = (), captions: bool = False) -> Any:
    def together(batch: list[Any]) -> Any:
        answers = [answer for _, answer in batch]
        return torch.stack([image for image, _ in batch]), answers if captions else torch.stack(answers)

    data = Set(pairs)
    data.classes = classes
    return torch.utils.data.DataLoader(data, batch_size=32, collate_fn=together)  # type: ignore[arg-type]


def accuracy(logits: Tensor, labels: Tensor, topk: tuple[int, ...]) -> list[float]:
    """What CLIP_benchmark 1.6.2's function of this name gives; its own does not run with NumPy 2.4."""
    from sklearn.metrics import top_k_accuracy_score

    return [top_k_accuracy_score(labels, logits, k=k, labels=range(logits.shape[1])) for k in topk]


@pytest.mark.parametrize("several", [False, True])
def test_zero_shot_is_clip_benchmarks(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = clip_benchmark_module("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(peer, "accuracy", accuracy)
    names, templates = tuple(f"class {n}" for n in range(9)), ["a {c}", "the {c}", "one {c}"]
    images, generator = unit(200, 16), torch.Generator().manual_seed(2)
    labels = (
        torch.rand(200, 9, generator=generator) < 0.3 if several else torch.randint(0, 9, (200,), generator=generator)
    )
    wanted = peer.evaluate(
        Features(),
        loader(list(zip(images, labels, strict=True)), names),
        one_text_a_number,
        names,
        templates,
        "cpu",
        amp=False,
    )
    classifier = zero_shot_classifier(lambda texts: one_text_a_number(list(texts)), names, templates)
    if several:
        found = multi_label(images, classifier, labels)
        assert found["mean_average_precision"] == pytest.approx(
            wanted["mean_average_precision"], abs=1e-6
        )  # theirs: fp32
        return
    found = zero_shot(images, classifier, labels)
    assert (found["top1"], found["top5"]) == (wanted["acc1"], wanted["acc5"])
    assert found["mean_per_class_recall"] == pytest.approx(wanted["mean_per_class_recall"], abs=1e-12)


@pytest.mark.parametrize("captions", [1, 5])
def test_retrieval_is_clip_benchmarks(captions: int) -> None:
    peer = clip_benchmark_module("clip_benchmark.metrics.zeroshot_retrieval")
    images = unit(150, 16)
    owners = torch.arange(150).repeat_interleave(captions)
    texts = [f"{n} {turn}" for n in range(150) for turn in range(captions)]
    own = images[owners] + unit(len(owners), 16, seed=1)
    features = dict(zip(texts, own, strict=True))
    pairs = [(images[n], texts[n * captions : (n + 1) * captions]) for n in range(150)]
    wanted = peer.evaluate(
        Features(),
        loader(pairs, captions=True),
        lambda asked: torch.stack([features[text] for text in asked]),
        "cpu",
        amp=False,
        recall_k_list=[1, 5, 10],
    )
    found = retrieval(images, F.normalize(own, dim=1), owners)
    for k in (1, 5, 10):
        assert torch.tensor(found["text_to_image"][f"R@{k}"]).float() == wanted[f"image_retrieval_recall@{k}"]
        assert torch.tensor(found["image_to_text"][f"R@{k}"]).float() == wanted[f"text_retrieval_recall@{k}"]
    assert 0.2 < found["text_to_image"]["R@1"] < 1


def test_one_caption_an_image_is_open_clips_one_to_one() -> None:
    """open_clip ranks text i for image i during training: the same figures where each image has one caption."""
    peer = open_clip_module("open_clip_train.train")
    images = unit(150, 16)
    texts = F.normalize(images + unit(150, 16, seed=1), dim=1)
    wanted = peer.get_clip_metrics(images, texts, torch.tensor(1.0))
    found = retrieval(images, texts, torch.arange(150))
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert found[way][f"R@{k}"] == wanted[f"{way}_R@{k}"]
        assert found[way]["median_rank"] == wanted[f"{way}_median_rank"]
