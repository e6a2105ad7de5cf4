"""Shards: names, writing, scanning, and what hostile or damaged files do."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import image_file, sample, write_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
        patch.setattr(tarfile, "open", None)
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


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(content)
    tar.addfile(member, io.BytesIO(content))


def test_hostile_members_are_ignored_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    png = image_file(0)
    with tarfile.open(path, "w") as tar:
        add(tar, "../up.png", png)
        add(tar, "a/../../up.png", png)
        add(tar, "/etc/absolute.png", png)
        add(tar, "link.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(tar, "hard.png", kind=tarfile.LNKTYPE, link="good.png")
        add(tar, "device.png", kind=tarfile.CHRTYPE)
        add(tar, "pipe.png", kind=tarfile.FIFOTYPE)
        add(tar, ".png", png)
        add(tar, "folder", kind=tarfile.DIRTYPE)
        add(tar, "folder/good.png", png)
        add(tar, "folder/good.txt", b"a caption")
        add(tar, "folder/good.exe", b"ignored: no suffix of ours")
        add(tar, "lonely.txt", b"no image")
    index = ShardIndex(path)
    assert all_keys(index) == ["folder/good"]
    assert index.read(0).text == "a caption"
    assert index.read(0).meta == {}
    assert index.skipped == Counter(ignored_member=8, missing_image=1)


def test_json_that_is_none_is_empty(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [sample(0, json=b"{broken"), sample(1, json=b"[1, 2]"), sample(2, json=b"\xff")])
    index = ShardIndex(tmp_path)
    assert [index.read(i).meta for i in range(3)] == [{}, {}, {}]


def test_members_beyond_the_cap_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.data.shards.MAX_MEMBER_BYTES", 500)
    write_shard(tmp_path / "a.tar", [sample(0), sample(1, png=b"x" * 501)])
    index = ShardIndex(tmp_path / "a.tar")
    assert all_keys(index) == ["0000"]
    assert index.skipped == Counter(oversized_member=1, missing_image=1)


def test_the_whole_samples_of_a_truncated_shard_are_used(tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    write_shard(whole, [sample(n) for n in range(4)])
    full = ShardIndex(whole)
    content = whole.read_bytes()
    ends = [offset + size for offset, size in full._places[:, 0].tolist()]
    path = tmp_path / "cut.tar"
    for cut in range(ends[0], full._places.sum(axis=2).max(), 173):
        path.write_bytes(content[:cut])
        index = ShardIndex(path)
        assert len(index) == sum(cut >= end for end in ends)
        assert index.skipped["truncated_shard"] == 1
        assert index.read(len(index) - 1).image == sample(len(index) - 1)[1]["png"]


def test_damage_in_the_middle_keeps_the_first_part(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [sample(n) for n in range(4)])
    header = int(ShardIndex(path)._places[2, 0, 0]) - tarfile.BLOCKSIZE
    content = bytearray(path.read_bytes())
    content[header : header + 50] = b"\xff" * 50
    path.write_bytes(content)
    index = ShardIndex(path)
    assert all_keys(index) == ["0000", "0001"]
    assert index.skipped == Counter(truncated_shard=1)


def test_one_unreadable_shard_is_counted_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 6)
    (data / "train-00001.tar").write_bytes(b"")
    index = ShardIndex(data)
    assert len(index) == 4
    assert index.skipped == Counter(unreadable_shard=1)
    for path in data.glob("*.tar"):
        path.write_bytes(b"\x1f\x8b this is no tar" * 100)
    with pytest.raises(ValueError, match=r"no sample in 3 file\(s\).*'unreadable_shard': 3.*uncompressed tar"):
        ShardIndex(data)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.lists(st.tuples(st.integers(0, 9 * 1024), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6))
def test_no_damage_hangs_or_crashes_the_scan(tmp_path: Path, damage: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "fuzz.tar"
    write_shard(path, [sample(n) for n in range(3)])
    content = bytearray(path.read_bytes())
    for place, noise in damage:
        content[place : place + len(noise)] = noise
    path.write_bytes(content)
    try:
        index = ShardIndex(path)
    except ValueError:  # nothing readable is left
        return
    for i in range(len(index)):
        assert len(index.read(i).image) <= len(content)


def test_a_header_that_points_backwards_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "loop.tar"
    write_shard(path, [sample(0), sample(1)])
    header = int(ShardIndex(path)._places[1, 0, 0]) - tarfile.BLOCKSIZE
    content = bytearray(path.read_bytes())
    member = content[header : header + tarfile.BLOCKSIZE]
    member[124:136] = b"\xff" * 10 + (-3072 & 0xFFFF).to_bytes(2, "big")  # base-256, negative size
    member[148:156] = b" " * 8
    member[148:156] = b"%06o\0 " % sum(member)
    content[header : header + tarfile.BLOCKSIZE] = member
    path.write_bytes(content)
    index = ShardIndex(path)
    assert all_keys(index) == ["0000"]
    assert index.skipped["truncated_shard"] == 1
