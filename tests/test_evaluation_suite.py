"""The figures beyond accuracy, each against its definition, scikit-learn or NumPy; the whole suite on real shards."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import image_file
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastclip.data import get_tokenizer
from fastclip.data.demo import write_demo
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.evaluation.calibration import SCALES, calibration
from fastclip.evaluation.corruptions import BLUR, CONTRAST, CORRUPTIONS, NOISE, Corrupted
from fastclip.evaluation.geometry import associations, clouds
from fastclip.evaluation.interpolation import along_the_path, interpolated
from fastclip.evaluation.linear_probe import linear_probe, sweep
from fastclip.evaluation.probes import bias_probe, robustness_table
from fastclip.evaluation.robustness import baseline_fit, effective_robustness
from fastclip.evaluation.sets import ImageFiles
from fastclip.evaluation.task_lists import evaluate_tasks, f1_macro, task_lists
from fastclip.models import create_model

pytest.importorskip("sklearn")


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def labelled(count: int, classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))
    return F.normalize(unit(classes, 12)[labels] + spread * unit(count, 12, seed=seed + 1), dim=1), labels


def test_linear_probe_is_scikit_learns_with_the_c_of_a_full_search() -> None:
    from sklearn.linear_model import LogisticRegression

    x, y = labelled(300, 5, 1.6, 1)
    x_test, y_test = labelled(200, 5, 1.6, 3)
    found = linear_probe(x, y, x_test, y_test)
    model = LogisticRegression(C=found["C"], max_iter=1000).fit(x.double().numpy(), y.numpy())
    assert found["top1"] == (model.predict(x_test.double().numpy()) == y_test.numpy()).mean()
    assert found["top1"] > 0.5
    steps = [math.log10(C) * 8 for C, _ in found["sweep"]]
    assert all(abs(step - round(step)) < 1e-9 for step in steps)  # eight steps a decade, of 1e-6 to 1e6
    assert {round(step) for step in steps} >= set(range(-48, 49, 16))
    best = max(accuracy for _, accuracy in found["sweep"])
    assert found["C"] == min(C for C, accuracy in found["sweep"] if accuracy == best)
    assert [row[0] for row in found["few_shot"]] == [1, 2, 4, 8, 16]
    assert found["few_shot"][0][1] < found["few_shot"][-1][1]
    assert linear_probe(x, y, x_test, y_test) == found


def test_the_sweep_finds_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an accuracy with one peak it finds the best of all 97 values with a fifth of the fits."""
    asked: list[float] = []

    def accuracy(*arguments: Any) -> float:
        asked.append(arguments[-1])
        return -abs(math.log10(arguments[-1]) - 1.375)

    monkeypatch.setattr(sys.modules["fastclip.evaluation.linear_probe"], "_accuracy", accuracy)
    none = np.empty(0)
    swept = sweep(none, none, none, none)
    assert max(swept, key=lambda C: swept[C]) == pytest.approx(10**1.375)
    assert len(asked) == len(swept) <= 20


def test_probe_mistakes() -> None:
    x, y = labelled(20, 2, 1.0, 1)
    with pytest.raises(ValueError, match="two classes at least"):
        linear_probe(x, y * 0, x, y)
    with pytest.raises(ValueError, match="need as many labels"):
        linear_probe(x, y[:3], x, y)
    with pytest.raises(ValueError, match="two images of a class at least"):
        linear_probe(x[:2], torch.tensor([0, 1]), x, y)


def picture(number: int = 0, size: int = 32) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image_file(number, (size, size)))).convert("RGB"))


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_grow_and_repeat(name: str) -> None:
    smooth = np.asarray(Image.fromarray(picture(0, 6)).resize((224, 224), Image.Resampling.BICUBIC))
    errors = []
    for severity in range(1, 6):
        worse = CORRUPTIONS[name](smooth, severity, 3)
        assert worse.shape == smooth.shape
        assert worse.dtype == np.uint8
        assert np.array_equal(worse, CORRUPTIONS[name](smooth, severity, 3))
        errors.append(float(((worse.astype(float) - smooth) ** 2).mean()))
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_corruptions_are_what_imagenet_c_says() -> None:
    gray = np.full((200, 200, 3), 128, dtype=np.uint8)
    drawn = CORRUPTIONS["noise"](gray, 1, 0).astype(float) - 128
    assert drawn.std() == pytest.approx(255 * NOISE[0], rel=0.01)
    assert not np.array_equal(CORRUPTIONS["noise"](gray, 1, 0), CORRUPTIONS["noise"](gray, 1, 1))
    pixels = picture(1)
    mean = pixels.mean((0, 1), keepdims=True)
    assert np.abs(CORRUPTIONS["contrast"](pixels, 5, 0) - ((pixels - mean) * CONTRAST[4] + mean)).max() <= 0.5
    point = np.zeros((224, 224, 3), dtype=np.uint8)
    point[104:120, 104:120] = 255
    blurred = CORRUPTIONS["blur"](point, 3, 0)[:, :, 0].astype(float)
    place = np.arange(224)
    variance = ((place - 111.5) ** 2 * blurred.sum(0)).sum() / blurred.sum()
    assert variance == pytest.approx(BLUR[2] ** 2 + (16**2 - 1) / 12, rel=0.02)
    flat = CORRUPTIONS["pixelate"](picture(2, 64), 3, 0)
    assert len(np.unique(flat.reshape(-1, 3), axis=0)) <= 25 * 25


def test_corrupted_images_do_not_depend_on_the_batch() -> None:
    source = ImageFiles([str(n) for n in range(5)], image_file, 8)
    worse = Corrupted(source, "noise", 2)
    whole = worse.images(0, 5)
    assert torch.equal(torch.cat([worse.images(0, 2), worse.images(2, 5)]), whole)
    assert not torch.equal(whole, source.images(0, 5))
    with pytest.raises(ValueError, match="corruption must be one of noise, blur"):
        Corrupted(source, "fog", 1)
    with pytest.raises(ValueError, match="severity must be 1 to 5, was 0"):
        Corrupted(source, "noise", 0)


def test_calibration_by_enumeration() -> None:
    images, labels = labelled(400, 7, 1.2, 5)
    classifier = unit(7, 12)
    found = calibration(images, classifier, labels, 9.0)
    cosines = (images @ classifier.T).double().numpy()
    p = np.exp(9 * cosines) / np.exp(9 * cosines).sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels.numpy()
    ece = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        assert found["bins"][low][0] == inside.sum()
    assert found["ece"] == pytest.approx(ece, abs=1e-12)
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), abs=1e-12)
    from sklearn.metrics import log_loss

    assert found["nll"] == pytest.approx(log_loss(labels, p, labels=range(7)), abs=1e-12)
    entropies = [row[3] for row in found["scales"]]
    assert entropies == sorted(entropies, reverse=True)
    assert [row[0] for row in found["scales"]] == list(SCALES)
    assert found["best_scale"] == min(found["scales"], key=lambda row: row[2])[0]


def test_a_confident_model_that_is_always_right_is_calibrated() -> None:
    found = calibration(torch.eye(3), torch.eye(3), torch.arange(3), 1e4)
    assert found["ece"] == 0
    assert found["entropy"] == 0
    assert found["bins"][-1] == [3, 1.0, 1.0]


def test_clouds_by_enumeration() -> None:
    images, texts = unit(40, 6), F.normalize(unit(60, 6, seed=1) + 0.5, dim=1)
    owners = torch.arange(60) % 40
    found = clouds(images, texts, owners)
    x, y = images.double().numpy(), texts.double().numpy()
    assert found["gap"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), abs=1e-12)
    assert found["alignment"] == pytest.approx(((x[owners] - y) ** 2).sum(1).mean(), abs=1e-12)
    pairs = [np.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(y) for b in y[:i]]
    assert found["uniformity"]["texts"] == pytest.approx(np.log(np.mean(pairs)), abs=1e-9)
    from sklearn.decomposition import PCA

    fitted = PCA(2).fit(np.concatenate([x, y]))
    assert found["explained"] == pytest.approx(fitted.explained_variance_ratio_.sum(), abs=1e-9)
    own = np.array(found["picture"]["images"] + found["picture"]["texts"])
    np.testing.assert_allclose(np.abs(own), np.abs(fitted.transform(np.concatenate([x, y]))), atol=1e-9)


def test_associations_by_hand() -> None:
    groups = {"a": torch.eye(2), "b": torch.tensor([[0.0, 1.0]])}
    found = associations(groups, {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 1.0])})
    assert found["mean_cosine"] == {"a": {"x": 0.5, "y": 0.5}, "b": {"x": 0.0, "y": 1.0}}
    assert found["nearest"] == {"a": {"x": 0.5, "y": 0.5}, "b": {"x": 0.0, "y": 1.0}}
    assert found["effect_size"]["a - b"]["x"] == pytest.approx(0.5 / np.std([1, 0, 0], ddof=1))
    with pytest.raises(ValueError, match="must not be empty"):
        associations({"a": torch.empty(0, 2)}, {"x": torch.ones(2)})


def test_effective_robustness_is_what_lies_above_the_line() -> None:
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    models = [(p, 1 / (1 + math.exp(-(0.9 * logit(p) - 0.7)))) for p in (0.3, 0.5, 0.6, 0.8)]
    slope, offset = baseline_fit(models)
    assert (slope, offset) == (pytest.approx(0.9), pytest.approx(-0.7))
    found = effective_robustness(0.5, 0.5, (slope, offset))
    assert found["effective_robustness"] == pytest.approx(0.5 - 1 / (1 + math.exp(0.7)))
    with pytest.raises(ValueError, match="two models of different accuracy"):
        baseline_fit([(0.5, 0.4)])
    with pytest.raises(ValueError, match="must be a share"):
        effective_robustness(63.2, 0.5, (1.0, 0.0))


def test_the_line_between_two_states() -> None:
    first = {"w": torch.tensor([0.0, 1.0]), "n": torch.tensor(3)}
    second = {"w": torch.tensor([1.0, 5.0]), "n": torch.tensor(3)}
    assert interpolated(first, second, 0.25)["w"].tolist() == [0.25, 2.0]
    assert interpolated(first, second, 1)["w"] is second["w"]
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], was 2"):
        interpolated(first, second, 2)
    for other in ({"w": second["w"]}, {"w": torch.ones(3), "n": torch.tensor(3)}):
        with pytest.raises(ValueError, match=r"must be of one architecture, but differ in '[wn]'"):
            interpolated(first, other, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, scenes=300, workers=1)
    return directory


def encoder(folder: Path, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder.of_model(create_model("debug"), get_tokenizer(folder))


def test_along_the_path(folder: Path, tmp_path: Path) -> None:
    from test_evaluation_sets import web_dataset

    data = str(web_dataset(tmp_path / "cars", [{"png": image_file(n), "cls": str(n % 3).encode()} for n in range(30)]))
    one, two = encoder(folder), encoder(folder, seed=1)
    assert one.model is not None
    assert two.model is not None
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    path = along_the_path(one.model, two.model.state_dict(), one, data, (0.0, 0.5, 1.0))
    assert path[0] == {"alpha": 0.0} | evaluate_folder(one, data)
    assert path[2] == {"alpha": 1.0} | evaluate_folder(two, data)
    assert all(torch.equal(before[name], value) for name, value in one.model.state_dict().items())


@pytest.mark.long
def test_the_suite_of_the_demo_folder(folder: Path) -> None:
    found = json.loads(json.dumps(evaluate_folder(encoder(folder), folder, with_suite=True)))
    digits, scenes = found["suite"]["digits_test"], found["suite"]["scenes_test"]
    assert set(digits) == {"calibration", "corruptions", "linear_probe"}
    assert digits["linear_probe"]["train_images"] == 41  # digits among 300 scenes
    assert set(scenes) == {"clouds"}
    assert {len(shares) for shares in digits["corruptions"].values()} == {5}


def test_a_bias_file_of_groups_and_of_a_sets_classes(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "bias.json"
    file.write_text(
        json.dumps({"prompts": ["a circle"], "groups": {"red": ["a red one", "red"], "blue": ["a blue one"]}})
    )
    found = bias_probe(encoder(folder), file, folder)
    assert found["members"] == {"red": 2, "blue": 1}
    file.write_text(json.dumps({"prompts": ["a circle", "a line"], "set": "digits_test"}))
    found = bias_probe(encoder(folder), file, folder)
    assert len(found["members"]) == 10
    assert sum(found["members"].values()) == 360
    for content, message in (
        ({"prompts": []}, "must hold prompts"),
        ({"prompts": ["a"], "set": "scenes_test"}, "not among the sets with classes"),
        ({"groups": {}}, "must hold"),
        ([], "must hold"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            bias_probe(encoder(folder), file, folder)


def test_a_baseline_file(tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"reference": "a", "shifts": {"b": [[0.4, 0.4], [0.6, 0.6]]}}))
    found = robustness_table({"a": {"top1": 0.5}, "b": {"top1": 0.7}}, file)
    assert found["shifts"]["b"]["effective_robustness"] == pytest.approx(0.2)
    with pytest.raises(UserError, match="names 'b', which has no zero-shot accuracy here"):
        robustness_table({"a": {"top1": 0.5}}, file)
    file.write_text("{}")
    with pytest.raises(UserError, match="must hold"):
        robustness_table({}, file)


def test_task_lists_run_what_is_on_disk(folder: Path, tmp_path: Path) -> None:
    from test_evaluation_sets import web_dataset

    lists = task_lists()
    assert {name: len(tasks) for name, tasks in lists.items()} == {
        "datacomp": 38,
        "clip_benchmark": 41,
        "imagenet_robustness": 6,
        "retrieval": 39,  # 36 languages of Crossmodal-3600
    }
    samples = [{"png": image_file(n), "cls": str(n % 3).encode()} for n in range(6)]
    web_dataset(tmp_path / "wds_vtab-caltech101_test", samples)
    web_dataset(tmp_path / "wilds" / "iwildcam", samples)
    web_dataset(tmp_path / "retrieval" / "flickr30k", [{"png": image_file(0), "txt": b"a\nb"}], "retrieval", shards=1)
    web_dataset(tmp_path / "fairness" / "geode", samples)
    found = evaluate_tasks(encoder(folder), tmp_path, "datacomp")
    assert {task: metric for task, (metric, _) in found["tasks"].items()} == {
        "vtab/caltech101": "mean_per_class_recall",
        "retrieval/flickr30k": "mean_recall@1",
        "wilds/iwildcam": "f1_macro",
        "fairness/geode": "top1",  # its groups are not in the exported files
    }
    assert len(found["missing"]) == 34
    assert found["mean"] == pytest.approx(sum(value for _, value in found["tasks"].values()) / 4)
    with pytest.raises(UserError, match="none of the 6 tasks of imagenet_robustness is in"):
        evaluate_tasks(encoder(folder), tmp_path, "imagenet_robustness")
    with pytest.raises(UserError, match="the suite must be one of datacomp"):
        evaluate_tasks(encoder(folder), tmp_path, "vtab")


def test_f1_is_scikit_learns() -> None:
    from sklearn.metrics import confusion_matrix, f1_score

    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 6, 100), generator.integers(0, 8, 100)
    matrix = confusion_matrix(true, predicted, labels=range(8)).tolist()
    assert f1_macro(matrix) == pytest.approx(
        f1_score(true, predicted, average="macro", labels=np.unique(true)), abs=1e-12
    )
