"""An index on disk: what it finds beside plain enumeration, going on after an interruption, filters, other models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import image_file, small_tokenizer, write_samples
from PIL import Image
from torch.nn import functional as F

from fastclip.cli.main import main
from fastclip.errors import UserError
from fastclip.evaluation import Encoder
from fastclip.evaluation.index import Index, build_index
from fastclip.evaluation.vectors import Vectors
from fastclip.models import create_model, save_model

pytest.importorskip("faiss")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def filled(folder: Path, features: torch.Tensor, part: int = 700) -> Vectors:
    vectors = Vectors(folder)
    for block in features.split(part):
        vectors.append(block)
    return vectors


def exact(features: torch.Tensor, query: torch.Tensor, k: int, numbers: Any = None) -> list[int]:
    scores = (features.half().float() @ query).tolist()
    numbers = range(len(scores)) if numbers is None else numbers
    return sorted(numbers, key=lambda n: (-scores[n], n))[:k]


def test_few_rows_are_compared_one_by_one(tmp_path: Path) -> None:
    features = unit(900, 24)
    features[5] = 0  # a picture that could not be read
    features[700] = features[3]
    vectors = filled(tmp_path / "images", features)
    assert vectors.build() == {"cells": 0, "looked_into": 0, "recall": 1.0}
    vectors = Vectors(tmp_path / "images")
    assert (len(vectors), vectors.parts) == (900, 2)
    kept = [n for n in range(900) if n != 5]
    for query in [*unit(4, 24, seed=1), features[3]]:
        scores, found = vectors.nearest(query[None], 20)
        assert found[0] == exact(features, query, 20, kept)
        assert scores[0] == sorted(scores[0], reverse=True)
    assert vectors.nearest(features[3][None], 2)[1] == [[3, 700]]
    among = np.array([9, 5, 800, 2])
    assert vectors.nearest(features[3][None], 20, among)[1][0] == exact(features, features[3], 3, [9, 800, 2])
    assert vectors.nearest(features[3][None], 3, np.array([], dtype=np.int64)) == ([[]], [[]])
    assert len(vectors.nearest(features[3][None], 5000)[1][0]) == 899
    torch.testing.assert_close(vectors.rows([899, 0, 3]), features[[899, 0, 3]].half().float())


def test_many_rows_are_found_in_the_nearest_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.evaluation.vectors.EXACT", 1000)
    centres = unit(60, 24)
    features = F.normalize(centres[torch.arange(6000) % 60] + 0.5 * unit(6000, 24, seed=1), dim=1)
    features[17] = 0
    vectors = filled(tmp_path / "images", features)
    how = vectors.build()
    assert how["recall"] >= 0.995
    assert 1 <= how["looked_into"] < how["cells"] == 20
    vectors = Vectors(tmp_path / "images")
    vectors.open_index(how["looked_into"])
    queries = F.normalize(centres + 0.3 * unit(60, 24, seed=2), dim=1)
    scores, found = vectors.nearest(queries, 10)
    wanted = [exact(features, query, 10) for query in queries]
    hits = [len(set(one) & set(true)) / 10 for one, true in zip(found, wanted, strict=True)]
    assert sum(hits) / len(hits) >= 0.99
    for one, row in zip(found, scores, strict=True):
        assert row == sorted(row, reverse=True)
        assert row == pytest.approx(
            [float(features[n].half().float() @ queries[found.index(one)]) for n in one], abs=1e-6
        )
    among = np.arange(0, 6000, 3)  # many: the filter goes into FAISS
    assert all(number % 3 == 0 for row in vectors.nearest(queries, 10, among)[1] for number in row)
    (tmp_path / "images.faiss").unlink()
    with pytest.raises(UserError, match="run fastclip index again"):
        Vectors(tmp_path / "images").open_index(3)


@pytest.mark.parametrize("width", [24, 33, 256, 258, 512])
def test_rows_without_any_structure_are_found(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hardest case for codes: ten nearest that are hardly nearer than a thousand others."""
    monkeypatch.setattr("fastclip.evaluation.vectors.EXACT", 1000)
    vectors = filled(tmp_path / "images", unit(8000, width))
    assert vectors.build(unit(100, width, seed=1))["recall"] >= 0.99


@pytest.mark.parametrize("shared", [-1, 1])
def test_few_directions_are_enough_where_the_rows_vary_in_few_around_a_mean(
    shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model's features do; a query asks along their mean, or against it."""
    monkeypatch.setattr("fastclip.evaluation.vectors.EXACT", 1000)
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(12, 320, generator=generator)
    mean = 2 * spread[:6].sum(0)
    features = F.normalize(mean + torch.randn(8000, 12, generator=generator) @ spread, dim=1)
    queries = F.normalize(shared * mean + torch.randn(100, 12, generator=generator) @ spread, dim=1)
    vectors = filled(tmp_path / "images", features)
    assert vectors.build(queries)["recall"] >= 0.995
    assert vectors._index.index.d == 64


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    vectors = filled(tmp_path / "images", unit(3, 4))
    vectors.part_path(0).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"part-00000\.npy is damaged"):
        Vectors(tmp_path / "images")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its tokenizer, 23 samples in shards, one of them broken, and three pictures in a folder."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    model = create_model("debug")
    (folder / "run").mkdir()
    small_tokenizer(folder / "run", model.config.text.context_length)
    save_model(folder / "run", model, model.config)
    write_samples(folder / "data", 23, **{"s4": {"png": b"no image"}})
    (folder / "pictures" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "deep/b.PNG", "deep/c.png")):
        (folder / "pictures" / name).write_bytes(image_file(number))
    (folder / "pictures" / "a.txt").write_text("a red circle\n\n a second line\n")
    (folder / "pictures" / "link.png").symlink_to("/etc/passwd")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out + err


def test_index_and_search_on_the_command_line(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclip.evaluation.index.PART", 5)
    out = tmp_path / "index"
    status, said = run(capsys, "index", work / "data", "--out", out, "--checkpoint", work / "run", "--captions")
    assert status == 0, said
    assert "23 images in" in said
    again = json.loads((out / "index.json").read_text())
    written = {path: path.stat().st_mtime_ns for path in out.rglob("part-*.npy")}
    assert run(capsys, "index", work / "data", "--out", out, "--checkpoint", work / "run", "--captions")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("part-*.npy")} == written  # nothing is done twice
    assert json.loads((out / "index.json").read_text()) == again

    page = tmp_path / "found.html"
    saved = tmp_path / "found"
    status, said = run(capsys, "search", "a red circle", "--index", out, "--top", 3, "--html", page, "--save", saved)
    assert status == 0, said
    assert "looked up in" in said
    assert page.read_text().count("data:image/png;base64") == 3
    assert len(list(saved.iterdir())) == 3
    status, said = run(capsys, "search", "red", "--index", out, "--top", 30, "--where", "label=1")
    assert status == 0, said
    keys = {line.split()[2] for line in said.splitlines() if line[:1] == " " and line.split()[0].isdecimal()}
    assert keys == {f"{n:04d}" for n in range(23) if n % 3 == 1 and n != 4}  # sample 4 is broken and never found
    picture = tmp_path / "q.png"
    picture.write_bytes(image_file(7))
    status, said = run(capsys, "search", "--image", picture, "--index", out, "--similar", "--top", 1)
    assert status == 0, said
    assert "0007" in said
    status, said = run(capsys, "search", "--image", picture, "--index", out, "--top", 69)
    assert status == 0, said
    assert len({line.split("  ")[-1] for line in said.splitlines() if "on a table" in line}) == 69


def test_an_interrupted_index_goes_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.evaluation.index.PART", 4)
    encoder = encoder_of(work)
    arguments: Any = {"model": "m", "with_captions": True}

    def stop(parts: Any) -> Any:
        for part in parts:
            if part == 3:
                raise KeyboardInterrupt
            yield part

    with pytest.raises(KeyboardInterrupt):
        build_index(encoder, [str(work / "data")], tmp_path / "i", progress=stop, **arguments)
    with pytest.raises(UserError, match="holds an unfinished index: run the same fastclip index again"):
        Index(tmp_path / "i")
    with pytest.raises(UserError, match="an index with another model"):
        build_index(encoder, [str(work / "data")], tmp_path / "i", model="n", with_captions=True)
    last = tmp_path / "i" / "images" / "part-00002.npy"
    last.unlink()  # as if it had been stopped between the captions and the images of a part
    done: list[int] = []
    build_index(
        encoder,
        [str(work / "data")],
        tmp_path / "i",
        progress=lambda parts: (done.append(p) or p for p in parts),
        **arguments,
    )
    assert done == [2, 3, 4, 5]
    build_index(encoder, [str(work / "data")], tmp_path / "j", **arguments)
    a, b = Index(tmp_path / "i"), Index(tmp_path / "j")
    for query in unit(5, encoder.config.embed_dim):
        assert a.find_images(query, 9) == b.find_images(query, 9)
        assert a.find_captions(query, 9) == b.find_captions(query, 9)


def encoder_of(work: Path) -> Encoder:
    from fastclip.cli.loading import Source, load_encoder

    return load_encoder(Source(work / "run", work), "", "fp32", 8)


def test_a_folder_of_pictures(work: Path, tmp_path: Path) -> None:
    encoder = encoder_of(work)
    build_index(encoder, [str(work / "pictures")], tmp_path / "i", model="m")
    index = Index(tmp_path / "i")
    assert len(index) == 3  # the link is not followed
    found = index.find_images(encoder.image(Image.open(io.BytesIO(image_file(1)))), 3)
    assert [(one.key, one.metadata) for one in found][:1] == [("deep/b.PNG", {"folder": "deep"})]
    assert found[0].score == pytest.approx(1, abs=1e-3)
    assert {one.key: one.caption for one in found}["a.png"] == "a red circle"
    assert [
        one.key for one in index.find_images(found[0].score * torch.ones(encoder.config.embed_dim), 9, ["folder!=deep"])
    ] == ["a.png"]
    assert index.find_images(torch.ones(encoder.config.embed_dim), 9, ["nothing=here"]) == []
    for injected in ("folder=' OR 1=1 --", 'x".y=1', "folder"):
        if "=" in injected and '"' not in injected:
            assert index.find_images(torch.ones(encoder.config.embed_dim), 9, [injected]) == []
        else:
            with pytest.raises(UserError, match="a filter must be field=value"):
                index.find_images(torch.ones(encoder.config.embed_dim), 9, [injected])
    with pytest.raises(UserError, match="holds no captions"):
        index.find_captions(torch.ones(encoder.config.embed_dim), 1)
    for number in (-1, 3):
        with pytest.raises(ValueError, match="there are images 0 to 2"):
            index.image_file(number)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "--out", "x"), "there is nothing to index"),
        (("index", "data"), "--out must name the folder"),
        (("index", "{empty}", "--out", "{tmp}/x", "--checkpoint", "{run}"), "holds no *.tar shard and no"),
        (("index", "{data}", "--out", "{run}", "--checkpoint", "{run}"), "is not empty and holds no index"),
        (("search", "red", "--index", "{tmp}/none"), "holds no index: fastclip index makes one"),
        (("search", "red", "--where", "a=b"), "need an --index"),
        (
            ("search", "red", "--index", "{tmp}/i", "--checkpoint", "{other}"),
            "features of two models cannot be compared",
        ),
        (("search", "--image", "{broken}", "--index", "{tmp}/i"), "that can be decoded"),
        (("serve",), "--index must name a folder"),
        (("serve", "--index", "{tmp}/i", "--port", "99999"), "--port must be 0 to 65535"),
    ],
)
def test_mistakes(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(image_file(0)[:40])
    torch.manual_seed(1)
    model = create_model("debug")
    (tmp_path / "other").mkdir()
    save_model(tmp_path / "other", model, model.config)
    build_index(encoder_of(work), [str(work / "pictures")], tmp_path / "i", model="m", checkpoint=str(work / "run"))
    places = {"tmp": tmp_path, "run": work / "run", "data": work / "data"}
    places |= {"empty": tmp_path / "empty", "other": tmp_path / "other", "broken": tmp_path / "broken.png"}
    status, said = run(capsys, *(argument.format(**places) for argument in arguments))
    assert status == 2
    assert message in said


def test_a_collection_that_has_changed(work: Path, tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "data", 5, shards=1)
    build_index(encoder_of(work), [str(folder)], tmp_path / "i", model="m")
    write_samples(folder, 6, shards=1)
    with pytest.raises(UserError, match="has changed: make the index anew"):
        Index(tmp_path / "i")
