"""Shards: names, writing, and the scan that is kept beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import sample, write_samples

from fastclip.data.shards import ShardIndex, expand_braces, expand_shards, index_path, write_shard


def all_keys(index: ShardIndex) -> list[str]:
    return [index.key(i) for i in range(len(index))]


def test_braces_expand_as_in_a_shell() -> None:
    assert expand_braces("x/{08..11}.tar") == ["x/08.tar", "x/09.tar", "x/10.tar", "x/11.tar"]
    assert expand_braces("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(ValueError, match="backwards"):
        expand_braces("{3..1}")


def test_every_way_to_name_shards(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "set [1]", 6)
    write_shard(data / "scenes_test-00000.tar", [sample(9)])
    train = [str(data / f"train-{i:05d}.tar") for i in range(3)]
    assert expand_shards(data, split="train") == train
    assert expand_shards(data) == [str(data / "scenes_test-00000.tar"), *train]
    assert expand_shards(data, split="val") == expand_shards(data)  # a directory without that split: all of it
    assert expand_shards(f"{data}/train-{{00000..00002}}.tar") == train
    assert expand_shards([train[2], Path(train[0])]) == [train[2], train[0]]
    write_samples(tmp_path / "plain", 3)
    assert len(expand_shards(str(tmp_path / "plain" / "train-*.tar"))) == 3


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("nowhere", FileNotFoundError, "'.*nowhere' does not exist"),
        ("full/train-{00000..00009}.tar", FileNotFoundError, "train-00003.tar' does not exist"),
        ("full/x*.tar", FileNotFoundError, "no file matches"),
        ("empty", ValueError, "holds no \\*.tar file"),
    ],
)
def test_missing_data_is_named(tmp_path: Path, spec: str, error: type[Exception], words: str) -> None:
    write_samples(tmp_path / "full", 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=words):
        expand_shards(tmp_path / spec)


def test_an_empty_list_is_named() -> None:
    with pytest.raises(ValueError, match="the list is empty"):
        expand_shards([])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 7)
    index = ShardIndex(data)
    assert sorted(all_keys(index)) == [f"{n:04d}" for n in range(7)]
    for i in range(7):
        key, files = sample(int(index.key(i)))
        read = index.read(i)
        assert (read.key, read.image, read.text) == (key, files["png"], files["txt"].decode())
        assert read.meta["label"] == int(key) % 3
        assert Path(index.path(i)).name == f"train-{int(key) % 3:05d}.tar"
    assert not index.skipped
    index.close()
    assert index.read(0).image  # files open again by themselves


def test_writing_is_deterministic_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    paths = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for path in paths:
        write_shard(path, [sample(1), sample(2)])
    assert paths[0].read_bytes() == paths[1].read_bytes()

    def fails():  # type: ignore[no-untyped-def]
        yield sample(3)
        raise RuntimeError("disk gone")

    before = paths[0].read_bytes()
    with pytest.raises(RuntimeError, match="disk gone"):
        write_shard(paths[0], fails())
    assert paths[0].read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index.npz", "b.tar", "b.tar.index.npz"]


def test_a_kept_scan_is_used_and_an_old_or_broken_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [sample(1), sample(2)])
    with monkeypatch.context() as patch:
        patch.setattr("fastclip.data.scan.plain_members", None)
        assert all_keys(ShardIndex(path)) == ["0001", "0002"]
    kept = Path(index_path(path)).read_bytes()
    write_shard(path, [sample(3), sample(4), sample(5)])
    Path(index_path(path)).write_bytes(kept)
    assert all_keys(ShardIndex(path)) == ["0003", "0004", "0005"]
    Path(index_path(path)).write_bytes(b"not an index")
    assert all_keys(ShardIndex(path)) == ["0003", "0004", "0005"]


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.data.shards._OPEN_FILES", 2)
    index = ShardIndex(write_samples(tmp_path / "data", 10, shards=5))
    for i in [*range(10), *range(10)]:
        assert index.read(i).text is not None
        assert len(index._files) <= 2
