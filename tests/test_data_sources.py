"""Where samples come from: tables, folders, URLs, pipes, shard lists, made-up data, and mixtures of them."""

from __future__ import annotations

import io
import json
import os
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from data_helpers import image_file, small_tokenizer, write_samples
from pyarrow import csv, parquet

from fastclip.data import DataOptions, Loader, write_shard
from fastclip.data.captions import CaptionChoice, captions_of
from fastclip.data.faults import BrokenSample
from fastclip.data.fetch import Fetcher, is_remote
from fastclip.data.scan import Sample
from fastclip.data.sources import Source, make_sources, shard_index
from fastclip.data.streams import Stream


def samples(source: Source) -> list[Sample | str]:
    """All of a source in its order; the cause of what is broken."""
    found: list[Sample | str] = []
    for shard, count in enumerate(source.counts.tolist()):
        for number in range(count):
            try:
                found.append(source.reader.read(source.name(shard), number))
            except BrokenSample as error:
                found.append(str(error))
    return found


def one(spec: Any, **options: Any) -> Source:
    (source,) = make_sources(spec, **options)
    return source


def images(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(image_file(number))


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet"])
def test_a_table_of_paths_and_captions(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "images", 3)
    titles = ['a red, "big" circle', "two\nlines", "caf\u00e9"]
    paths = [f"images/{n}.png" for n in range(3)]
    table = pa.table({"other": [1, 2, 3], "filepath": paths, "title": titles})
    file = tmp_path / f"x.{form}"
    if form == "parquet":
        parquet.write_table(table, file)
    else:
        csv.write_csv(table, file, csv.WriteOptions(delimiter="," if form == "csv" else "\t"))
    for place in (tmp_path, tmp_path / "images"):
        monkeypatch.chdir(place)
        found = samples(one(str(file)))
        assert [(s.key, s.text, s.image) for s in found if isinstance(s, Sample)] == [
            (path, title, image_file(n)) for n, (path, title) in enumerate(zip(paths, titles, strict=True))
        ]
    assert (tmp_path / f"x.{form}.index.arrow").exists()


def test_rows_are_broken_one_by_one(tmp_path: Path) -> None:
    images(tmp_path, 2)
    os.mkfifo(tmp_path / "pipe.png")
    rows = [
        b"0.png,red",
        b"9.png,gone",
        b",no path",
        b"0.png,",
        b"a,b,c,d",
        b"1.png,caf\xe9",
        b"pipe.png,x",
        b"1.png,blue",
    ]
    (tmp_path / "x.csv").write_bytes(b"filepath,title\n" + b"\n".join(rows) + b"\n")
    for _ in range(2):  # converted, then read back
        source = one(str(tmp_path / "x.csv"))
        found = [s if isinstance(s, str) else s.text for s in samples(source)]
        assert found == ["red", "missing_file", "missing_file", None, "invalid_utf8", "special_file", "blue"]
        assert source.skipped == Counter(malformed_row=1)


def test_a_changed_table_is_read_anew(tmp_path: Path) -> None:
    images(tmp_path, 1)
    for rows in (1, 3):
        (tmp_path / "x.csv").write_text("filepath,title\n" + "0.png,red\n" * rows)
        assert one(str(tmp_path / "x.csv")).counts.sum() == rows


def test_a_table_of_several_captions_and_other_columns(tmp_path: Path) -> None:
    images(tmp_path, 2)
    table = pa.table({"img": ["0.png", "1.png"], "texts": [["a", "b"], []]})
    parquet.write_table(table, tmp_path / "x.parquet")
    found = samples(one(str(tmp_path / "x.parquet"), image_key="img", caption_key="texts"))
    assert [s.meta for s in found if isinstance(s, Sample)] == [{"captions": ["a", "b"]}, {}]
    with pytest.raises(ValueError, match=r"has the columns img, texts; none is filepath or .*--image_key"):
        one(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"filepath,title\n", "holds no rows"),
        ("x.csv", b"", "is no CSV table"),
        ("x.parquet", b"PAR1 no", "is no PARQUET table"),
        ("x.json", b'{"shards": 3}', "is no shard index"),
        ("x.json", b'{"shardlist": [{"url": "pipe:rm x", "nsamples": 3}]}', "names a pipe: command"),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        make_sources(str(tmp_path / name))
    assert not [left for left in os.listdir(tmp_path) if left.endswith(".tmp")]


def test_memory_does_not_grow_with_a_table(tmp_path: Path) -> None:
    images(tmp_path, 1)
    (tmp_path / "x.csv").write_text("filepath,title\n" + "0.png,a red circle\n" * 50_000)
    source = one(str(tmp_path / "x.csv"))
    assert source.counts.max() <= 1 << 14
    before = pa.total_allocated_bytes()
    for number in range(0, 50_000, 997):
        shard, place = divmod(number, int(source.counts[0]))
        assert source.reader.read(source.name(shard), place).text == "a red circle"
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_folder_of_images_and_texts(tmp_path: Path) -> None:
    images(tmp_path, 2)
    images(tmp_path / "below", 1)
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "1.json").write_text(json.dumps({"captions": ["one", "uno"]}))
    (tmp_path / "1.jpg").write_bytes(b"a second image of one name")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "linked").symlink_to(tmp_path / "below")
    source = one(str(tmp_path))
    found = {s.key: s for s in samples(source) if isinstance(s, Sample)}
    assert list(found) == ["0", "1", "below/0"]
    assert found["0"].text == "zero"
    assert source.skipped == Counter(duplicate_key=1)
    with pytest.raises(BrokenSample, match="missing_caption"):
        captions_of(found["below/0"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \*.tar file, and no image"):
        make_sources(str(tmp_path / "empty"))


def test_synthetic_data_is_endless_and_the_same(tmp_path: Path) -> None:
    source = one("synthetic:25000:32")
    assert source.counts.tolist() == [10_000, 10_000, 5_000]
    first, again, other = (source.reader.read(source.name(2), n) for n in (7, 7, 8))
    assert first == again
    assert (first.key, first.text != other.text) == ("synthetic-000020007", True)
    batch = next(Loader("synthetic:100", small_tokenizer(tmp_path), 16, 10, workers=0).batches())
    assert batch["image"].float().std() > 20
    for wrong in ("synthetic:", "synthetic:0", "synthetic:x", "synthetic:5:0"):
        with pytest.raises(ValueError, match="must be synthetic:COUNT"):
            make_sources(wrong)


def test_a_shard_index_is_believed_and_its_lies_are_counted(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 12)
    listed = shard_index(one(str(data)), str(tmp_path))
    assert listed["shardlist"][1] == {"url": "data/train-00001.tar", "nsamples": 4}
    listed["shardlist"][1]["nsamples"] = 6
    (tmp_path / "index.json").write_text(json.dumps(listed))
    source = one(str(tmp_path / "index.json"))
    assert source.counts.tolist() == [4, 6, 4]
    assert [s for s in samples(source) if isinstance(s, str)] == ["shrunk_shard"] * 2
    loader = Loader(tmp_path / "index.json", small_tokenizer(tmp_path), 8, 7, workers=0)
    assert len(list(islice(loader.batches(), 2))) == 2
    assert loader.skipped["shrunk_shard"] >= 2


def test_a_mixture_counts_its_sources(tmp_path: Path) -> None:
    images(tmp_path / "images", 6)
    for number in range(6):
        (tmp_path / "images" / f"{number}.txt").write_text(f"image {number}")
    data = write_samples(tmp_path / "data", 12)
    spec = f"{data}::{tmp_path / 'images'}::synthetic:20:16"
    options = DataOptions(upsampling=(1, 2, 0.5))
    loader = Loader(spec, small_tokenizer(tmp_path), 8, 17, workers=1, options=options)
    assert loader.num_samples == 12 + 12 + 10
    batches = loader.batches()
    seen = Counter(key for batch in islice(batches, 2) for key in batch["keys"])
    batches.close()
    assert [seen[str(n)] for n in range(6)] == [2] * 6
    assert list(loader.seen.values()) == [12, 12, 10] or sorted(loader.seen.values()) == [10, 12, 12]
    state = loader.state_dict(2)
    assert state["seen"] == dict(loader.seen)
    with pytest.raises(ValueError, match=r"upsampling: must be 3 numbers, one for each source, was \(1,\)"):
        Loader(spec, small_tokenizer(tmp_path), 8, 4, options=DataOptions(upsampling=(1,)))


def test_the_arithmetic_is_told(tmp_path: Path) -> None:
    loader = Loader(write_samples(tmp_path / "data", 23), small_tokenizer(tmp_path), 8, 6, world_size=2, workers=3)
    assert loader.describe() == (
        f"23 pairs in 3 shards ({tmp_path / 'data'}: 23 in 3), 3 steps an epoch of 6 = 2 ranks x 3, 3 workers; "
        "5 pairs are left out each epoch, other ones each time"
    )


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    return Fetcher(str(tmp_path / "cache"), timeout=0.5, retries=1)


def test_shards_from_pipes_and_urls(tmp_path: Path, fetcher: Fetcher) -> None:
    data = write_samples(tmp_path / "data", 12)
    wanted = [s.key for s in samples(one(str(data))) if isinstance(s, Sample)]
    for spec in (f"pipe:cat {data}/train-{{00000..00002}}.tar", f"file://{data}/train-{{00000..00002}}.tar"):
        source = one(spec, fetcher=fetcher)
        assert [s.key for s in samples(source) if isinstance(s, Sample)] == wanted
    options = DataOptions(fetcher=fetcher)
    loader = Loader(f"pipe:cat {data}/train-00000.tar", small_tokenizer(tmp_path), 8, 4, workers=1, options=options)
    batches = loader.batches()
    assert sorted(next(batches)["keys"]) == ["0000", "0003", "0006", "0009"]
    batches.close()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sleep 30", "nothing came for 0.5 s"),
        ("echo half a file; sleep 30", "nothing came for 0.5 s"),
        ("false", "ended with status 1"),
    ],
)
def test_a_url_that_stalls_is_given_up(tmp_path: Path, fetcher: Fetcher, command: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(OSError, match=f"{words}.*tried 2 times"):
        fetcher.local(f"pipe:{command}")
    assert time.monotonic() - start < 10
    assert not list((tmp_path / "cache").glob("*.part"))
    start = time.monotonic()
    with pytest.raises(OSError, match=words):  # not tried again at once
        fetcher.local(f"pipe:{command}")
    assert time.monotonic() - start < 0.2


def test_an_unreachable_shard_is_counted_or_fatal(tmp_path: Path, fetcher: Fetcher) -> None:
    data = write_samples(tmp_path / "data", 12)
    index = {"shardlist": [{"url": "nowhere://x.tar", "nsamples": 4}, {"url": "data/train-00000.tar", "nsamples": 4}]}
    (tmp_path / "x.json").write_text(json.dumps(index))
    tokenizer = small_tokenizer(tmp_path)
    loader = Loader(tmp_path / "x.json", tokenizer, 8, 2, workers=0, options=DataOptions(fetcher=fetcher))
    keys = {key for batch in islice(loader.batches(), 4) for key in batch["keys"]}
    assert keys <= {"0000", "0003", "0006", "0009"}
    assert loader.skipped["unreachable_shard"] >= 4
    strict = DataOptions(fetcher=fetcher, strict=True)
    with pytest.raises(ValueError, match=r"unreachable shard: .*nowhere"):
        list(islice(Loader(tmp_path / "x.json", tokenizer, 8, 2, workers=0, options=strict).batches(), 4))
    source = one([f"pipe:cat {data}/train-00001.tar", "pipe:false"], fetcher=fetcher)
    assert (source.counts.tolist(), source.skipped) == ([4, 0], Counter(unreachable_shard=1))


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    fetcher = Fetcher(str(tmp_path / "cache"), max_bytes=50_000)
    for number in range(5):
        path = fetcher.local(f"pipe:head -c 20000 /dev/zero; true {number}")
        assert os.path.getsize(path) == 20_000
        assert len(list((tmp_path / "cache").glob("*.tar"))) <= 2
    assert fetcher.local(f"pipe:head -c 20000 /dev/zero; true {number}") == path


def test_what_is_remote() -> None:
    assert all(is_remote(name) for name in ("s3://b/x.tar", "pipe:cat x", "https://h/x.tar", "hf://d/x.tar"))
    assert not any(is_remote(name) for name in ("x.tar", "/a/b", "C:x", "a:b"))


def drawn(spec: str, sample: Sample, count: int = 2000) -> Counter[str]:
    choice = CaptionChoice(spec)
    return Counter(choice.of(sample, Stream("caption", n)) for n in range(count))


def test_captions_by_key_and_weight() -> None:
    sample = Sample("k", b"", "alt", {"synthetic": ["s1", "s2"], "captions": ["c1", "c2"], "n": 3})
    assert set(drawn("", sample)) == {"c1", "c2"}
    found = drawn("txt=1::synthetic=3", sample)
    assert set(found) == {"alt", "s1", "s2"}
    assert abs(found["alt"] - 500) < 80
    assert abs(found["s1"] - 750) < 90
    assert set(drawn("n=9::synthetic=1::absent=5", sample)) == {"s1", "s2"}
    found = drawn("captions[1]=1::txt=3::captions[2]=9::n[0]::txt[1]=5", sample)
    assert set(found) == {"alt", "c2"}
    assert abs(found["c2"] - 500) < 80
    with pytest.raises(BrokenSample, match="missing_caption"):
        drawn("n::absent", sample)
    with pytest.raises(BrokenSample, match="invalid_utf8"):
        drawn("txt", Sample("k", b"", None, {}, fault="invalid_utf8"))
    for wrong in ("txt=0", "txt=-1", "txt=x", "txt=inf"):
        with pytest.raises(ValueError, match=r"the weight of 'txt' .* must be a positive number"):
            CaptionChoice(wrong)
    for wrong in ("captions[", "captions[-1]", "captions[x]", "[0]", "=1"):
        with pytest.raises(ValueError, match=r"a key is a name or name\[place\], was "):
            CaptionChoice(wrong)


def test_stored_teacher_embeddings_come_with_the_batch(tmp_path: Path) -> None:
    def npy(number: int, width: int) -> bytes:
        out = io.BytesIO()
        np.save(out, np.full(width, number, np.float16))
        return out.getvalue()

    members = {f"s{n}": {"dist_image_features.npy": npy(n, 5), "dist_text_features.npy": npy(n, 3)} for n in range(12)}
    data = write_samples(tmp_path / "data", 12, **members)
    names = ("dist_image_features.npy", "dist_text_features.npy")
    loader = Loader(data, small_tokenizer(tmp_path), 8, 6, workers=1, options=DataOptions(arrays=names))
    batches = loader.batches()
    for batch in islice(batches, 2):
        for name, width in (("dist_image_features", 5), ("dist_text_features", 3)):
            assert batch[name].shape == (6, width)
            assert batch[name][:, 0].tolist() == [float(key) for key in batch["keys"]]
    batches.close()
    assert not loader.skipped


def test_a_sample_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", [("k", {"png": image_file(1), "txt": b"red", "a.npy": b"1", "json": b"{}"})])
    source = one(str(tmp_path / "a.tar"))
    source.reader.read(source.name(0), 0)
    calls: list[int] = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *place: calls.append(1) or real(*place))
    assert source.reader.read(source.name(0), 0).arrays == {"a.npy": b"1"}
    assert len(calls) == 1
