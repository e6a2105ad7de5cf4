"""The weights of the best evaluation are kept, by a figure that is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastclip.data import get_tokenizer
from fastclip.data.demo import write_demo
from fastclip.errors import UserError
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.models import load_checkpoint
from fastclip.training.__main__ import main
from fastclip.training.evaluation import Best, figure

SETS = {
    "digits_test": {"task": "zero_shot", "top1": 0.5, "top5": 1.0, "mean_per_class_recall": 0.4, "confusion": []},
    "scenes_test": {
        "task": "retrieval",
        "image_to_text": {"R@1": 0.1, "median_rank": 3.0},
        "text_to_image": {"R@1": 0.2},
    },
}


def test_figures_have_names() -> None:
    assert figure("digits_test/top1", SETS) == 0.5
    assert figure("scenes_test/text_to_image/R@1", SETS) == 0.2
    for other in ("top1", "digits_test/ece", "scenes_test/image_to_text/median_rank", "digits_test/confusion"):
        with pytest.raises(UserError, match="best must be one of digits_test/top1, digits_test/top5"):
            figure(other, SETS)


class OneProcess:
    """What `Best` asks of an engine and of the processes."""

    is_first = True

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


def test_only_a_better_step_replaces_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []

    def save(folder: Path, *_: Any) -> None:
        saved.append(folder)

    monkeypatch.setattr("fastclip.training.evaluation.save_model", save)

    class Tokenizer:
        def save(self, path: Path) -> None:
            path.write_text("{}")

    def best(metric: str = "digits_test/top1") -> Best:
        one: Any = OneProcess()
        tokenizer: Any = Tokenizer()
        model: Any = None
        return Best(metric, one, model, tokenizer, one, tmp_path / "best")

    one = best()
    for step, value in ((1, 0.5), (2, 0.4), (3, 0.5), (4, 0.6)):
        one.look(step, {"digits_test": SETS["digits_test"] | {"top1": value}})
    assert len(saved) == 2
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {
        "metric": "digits_test/top1",
        "value": 0.6,
        "step": 4,
    }
    again = best()  # a resumed run knows what it has
    assert again.value == 0.6
    again.look(5, {"digits_test": SETS["digits_test"] | {"top1": 0.55}})
    assert len(saved) == 2
    assert best("digits_test/top5").value is None  # of another figure nothing is kept yet
    (tmp_path / "best" / "best.json").write_text("{")
    assert best().value is None


@pytest.mark.long
def test_a_run_keeps_its_best_step(tmp_path: Path) -> None:
    write_demo(tmp_path / "data", scenes=60, workers=1)
    arguments = (
        f"--model debug --engine torch --precision fp32 --data {tmp_path / 'data'} --out {tmp_path / 'run'} --steps 6"
    )
    arguments += " --global-batch 16 --eval-every 2 --best digits_test/top1 --workers 0"
    main(arguments.split())
    kept = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    values = {}
    for path in (tmp_path / "run" / "eval").glob("step_*.json"):
        evaluation = json.loads(path.read_text())
        values[evaluation["step"]] = evaluation["sets"]["digits_test"]["top1"]
    assert sorted(values) == [2, 4, 6]
    assert kept["value"] == max(values.values()) == values[kept["step"]]
    loaded = load_checkpoint(tmp_path / "run" / "best")
    encoder = Encoder.of_model(loaded.model, get_tokenizer(tmp_path / "run" / "best" / "tokenizer.json"))
    found = evaluate_folder(encoder, tmp_path / "data")["sets"]["digits_test"]["top1"]
    assert found == pytest.approx(kept["value"], abs=2 / 360)
    assert (tmp_path / "run" / "eval" / "suite.json").is_file()
