"""`fastclip data check`, `pack`, `bench`, `tokenizer` and `stats`, as a user calls them."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from data_helpers import image_file, small_tokenizer, write_samples
from PIL import Image
from pyarrow import parquet

from fastclip.cli.main import main
from fastclip.data import Loader, get_tokenizer
from fastclip.data.shards import ShardIndex
from fastclip.data.sources import make_sources

BROKEN = {"s2": {"png": b""}, "s4": {"png": b"noise"}, "s5": {"txt": b"\xff", "json": None}}


def test_check_finds_every_kind_of_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_samples(tmp_path / "data", 12, **BROKEN)
    shard = data / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    assert main(["data", "check", str(data)]) == 0
    out = capsys.readouterr().out
    assert "10 samples in 3 shards, 6 can be used" in out
    for cause in ("empty image", "unreadable image", "invalid utf8", "truncated shard", "missing caption"):
        assert f"1  {cause}" in out
    assert "'0005' in " in out
    assert main(["data", "check", str(data), "--strict", "--skip-decode", "--workers", "1"]) == 1
    assert "unreadable image" not in capsys.readouterr().out


def test_marked_samples_are_met_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_samples(tmp_path / "data", 12, **BROKEN)
    index = tmp_path / "index.json"
    assert main(["data", "check", str(data), "--mark", "--index", str(index)]) == 0
    assert f"{index}: 3 shards, 9 samples" in capsys.readouterr().out
    assert main(["data", "check", str(data)]) == 0
    assert "9 samples in 3 shards, 9 can be used" in capsys.readouterr().out
    assert ShardIndex(data).skipped == Counter(empty_image=1, unreadable_image=1, invalid_utf8=1)
    loader = Loader(index, small_tokenizer(tmp_path), 8, 9, workers=0)
    assert len(set(next(loader.batches())["keys"])) == 9
    assert not loader.skipped


def test_check_says_where_nothing_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(write_samples(tmp_path / "data", 6)), "--strict"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["folder", "csv", "embedded", "shards"])
def test_pack_writes_shards_of_anything(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for number in range(7):
        (given / f"{number}.png").write_bytes(image_file(number) if number != 3 else b"")
        (given / f"{number}.txt").write_text(f"image {number}")
    spec = str(given)
    if form == "csv":
        spec = str(given / "x.csv")
        rows = [f"{number}.png,image {number}\n" for number in range(7)]
        Path(spec).write_text("filepath,title\n" + "".join(rows))
    elif form == "embedded":
        spec = str(given / "x.parquet")
        files = [{"bytes": image_file(n) if n != 3 else b"", "path": "x"} for n in range(7)]
        parquet.write_table(
            pa.table({"image": files, "text": [f"image {n}" for n in range(7)]}), spec, row_group_size=2
        )
    elif form == "shards":
        spec = str(write_samples(tmp_path / "shards", 7, s3={"png": b""}))
    out = tmp_path / "out"
    assert main(["data", "pack", spec, str(out), "--shard-size", "3", "--workers", "2"]) == 0
    assert "6 pairs in 3 shards; left out: 1 empty image" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == [f"{n:05d}.tar{end}" for n in range(3) for end in ("", ".index.npz")]
    index = ShardIndex(out)
    assert sorted(index.read(i).image for i in range(6)) == sorted(image_file(n) for n in range(7) if n != 3)
    assert all(index.read(i).text for i in range(6))
    assert main(["data", "pack", spec, str(out)]) == 2
    assert "holds shards already" in capsys.readouterr().err


def test_images_in_a_table_are_packed_first(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [{"bytes": b"x", "path": "x"}], "text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"holds struct.* not paths; .*fastclip data pack"):
        make_sources(str(tmp_path / "x.parquet"))


def test_tokenizer_learns_from_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_samples(tmp_path / "data", 12)
    out = tmp_path / "made" / "tokenizer.json"
    arguments = ["data", "tokenizer", str(data), str(out), "--vocab-size", "560", "--context", "20"]
    assert main(arguments) == 0
    assert "ids from 36 captions; tokens p50" in capsys.readouterr().out
    tokenizer = get_tokenizer(out)
    assert tokenizer.context_length == 20
    assert len(tokenizer.encode("table")) == 1
    content = out.read_bytes()
    assert main(arguments) == 0
    assert out.read_bytes() == content
    assert main([*arguments[:4], "--vocab-size", "3"]) == 2


def test_bench_names_the_limit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small_tokenizer(tmp_path)
    arguments = ["data", "bench", "synthetic:200:64", "--image-size", "32", "--batch", "8", "--workers", "1"]
    arguments += ["--seconds", "0.05", "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for words in ("read ", "decode ", "crop and resize ", "tokenize ", "loader, 1 workers:", "The limit is"):
        assert words in out
    assert main([*arguments, "--json", "--fast-decode"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert min(found["stages"].values()) == found["stages"][found["limit"]]


def test_stats_draws_caption_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_samples(tmp_path / "data", 12, **BROKEN)
    small_tokenizer(data)
    assert main(["data", "stats", str(data), "--plot", str(tmp_path / "lengths.png")]) == 0
    assert "lengths.png" in capsys.readouterr().out
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 3
