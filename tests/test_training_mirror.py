"""The mirror of a run: what is copied, what is taken up, and what happens where the other place is away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from training_helpers import lines, options, small_data

from fastclip.errors import UserError
from fastclip.training.__main__ import main
from fastclip.training.mirror import Mirror

URL = "memory://bucket/run"


@pytest.fixture
def there() -> Iterator[Any]:
    """An object store."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def step(run: Path, number: int) -> Path:
    folder = run / "checkpoints" / f"step_{number:08d}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "rank_0.pt").write_bytes(bytes([number]))
    (folder / "manifest.json").write_text(json.dumps({"step": number, "files": {"state/rank_0.pt": {}}}))
    (run / "metrics.jsonl").write_text(f"until {number}")
    return folder


def pushed(run: Path, *numbers: int, keep: int = 2) -> Mirror:
    mirror = Mirror(URL, run, keep)
    for number in numbers:
        folder = step(run, number)
        mirror.push(folder)
        mirror.finish(folder)
    return mirror


def test_the_newest_are_there_and_come_back(there: Any, tmp_path: Path) -> None:
    pushed(tmp_path / "run", 1, 2, 3)
    steps = sorted(Path(path).name for path in there.ls("/bucket/run/checkpoints", detail=False))
    assert steps == ["step_00000002", "step_00000003"]
    assert there.cat_file("/bucket/run/latest") == b"step_00000003\n"
    other = tmp_path / "other"
    Mirror(URL, other, 2).pull()
    assert (other / "checkpoints/step_00000003/state/rank_0.pt").read_bytes() == b"\3"
    assert (other / "metrics.jsonl").read_text() == "until 3"
    assert (other / "latest").read_text() == "step_00000003\n"


@pytest.mark.parametrize("rest", ["", "{"])
def test_a_step_without_a_whole_manifest_is_none(there: Any, tmp_path: Path, rest: str) -> None:
    pushed(tmp_path / "run", 1, 2)
    there.rm_file("/bucket/run/checkpoints/step_00000002/manifest.json")
    if rest:
        there.pipe_file("/bucket/run/checkpoints/step_00000002/manifest.json", rest.encode())
    Mirror(URL, tmp_path / "other", 2).pull()
    assert (tmp_path / "other" / "latest").read_text() == "step_00000001\n"


def test_what_is_here_is_as_new(there: Any, tmp_path: Path) -> None:
    pushed(tmp_path / "run", 1, 2)
    step(tmp_path / "other", 2)
    (tmp_path / "other" / "metrics.jsonl").write_text("own")
    Mirror(URL, tmp_path / "other", 2).pull()
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == "own"
    Mirror("memory://empty", tmp_path / "third", 2).pull()
    assert not (tmp_path / "third").exists()


def test_a_manifest_cannot_name_other_places(there: Any, tmp_path: Path) -> None:
    pushed(tmp_path / "run", 1)
    content = json.dumps({"step": 1, "files": {"../../../stolen": {}}}).encode()
    there.pipe_file("/bucket/run/checkpoints/step_00000001/manifest.json", content)
    with pytest.raises(UserError, match=r"names '../../../stolen', which lies elsewhere"):
        Mirror(URL, tmp_path / "other", 2).pull()


def test_a_place_that_is_away_ends_nothing(
    there: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(there, "put_file", away)
        mirror = pushed(tmp_path / "run", 1)
    said = capsys.readouterr().out
    assert f"the mirror {URL} cannot be written: no route to host; the run goes on" in said
    assert f"step_00000001 is not in the mirror {URL}" in said
    folder = step(tmp_path / "run", 2)
    mirror.push(folder)
    mirror.finish(folder)
    assert "not in the mirror" not in capsys.readouterr().out
    assert there.exists("/bucket/run/checkpoints/step_00000002/manifest.json")
    monkeypatch.setattr(there, "cat_file", away)
    with pytest.raises(UserError, match=f"--mirror {URL} cannot be read: no route"):
        Mirror(URL, tmp_path / "other", 2).pull()


def test_an_address_that_nothing_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_data(tmp_path / "data", 16)
    assert main(options(data, tmp_path / "out", mirror="nowhere://bucket")) == 2
    assert "--mirror nowhere://bucket: Protocol not known: nowhere" in capsys.readouterr().err


def test_a_run_goes_on_from_its_mirror_alone(tmp_path: Path) -> None:
    """The machine is gone, its disk with it: the losses are those of the run that nothing happened to."""
    data, mirror = small_data(tmp_path / "data"), f"file://{tmp_path / 'mirror'}"
    changed = {"engine": "torch", "schedule": "constant", "save_every": 2, "mirror": mirror}
    assert main(options(data, tmp_path / "out", steps=4, **changed)) == 0
    shutil.rmtree(tmp_path / "out")
    assert main(options(data, tmp_path / "new", steps=6, resume="latest", **changed)) == 0
    assert main(options(data, tmp_path / "whole", steps=6, **changed | {"mirror": ""})) == 0
    ours, truth = ([(line["step"], line["loss"]) for line in lines(tmp_path / name)] for name in ("new", "whole"))
    assert ours == truth
    assert (tmp_path / "mirror" / "latest").read_text() == "step_00000006\n"
    assert (tmp_path / "mirror" / "report.html").is_file()
