"""Hostile and damaged data: skipped, counted by cause, named once, and no reason to end a run unless asked to."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import struct
import tarfile
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import add, examples, image_file, sample, small_tokenizer, write_samples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastclip.data import Loader, write_shard
from fastclip.data.faults import BUDGET_FROM, Faults
from fastclip.data.options import DataOptions
from fastclip.data.scan import scan_shard
from fastclip.data.shards import ShardIndex

PNG = image_file(0)


def keys(path: Path) -> list[str]:
    scan = scan_shard(str(path))
    return [scan.key(i) for i in range(len(scan))]


def header(name: bytes, size: int, kind: bytes = b"0", digits: bytes | None = None) -> bytes:
    """A tar header with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = digits or b"%011o\0" % size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, content: bytes) -> bytes:
    return header(name, len(content)) + content + bytes(-len(content) % 512)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def shard_bytes(tmp_path: Path, numbers: range, **replaced: Any) -> bytes:
    path = tmp_path / "made.tar"
    write_shard(path, [sample(n, **replaced.get(f"s{n}", {})) for n in numbers])
    return path.read_bytes()


def test_hostile_members_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../up.png", PNG)
        add(tar, "a/../../up.png", PNG)
        add(tar, "/etc/absolute.png", PNG)
        add(tar, ".png", PNG)
        add(tar, f"{'x/' * 600}long.png", PNG)
        add(tar, "link.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add(tar, "hard.png", kind=tarfile.LNKTYPE, link="good.png")
        add(tar, "device.png", kind=tarfile.CHRTYPE)
        add(tar, "block.png", kind=tarfile.BLKTYPE)
        add(tar, "pipe.png", kind=tarfile.FIFOTYPE)
        add(tar, "sparse.png", PNG, kind=tarfile.GNUTYPE_SPARSE)
        add(tar, "folder", kind=tarfile.DIRTYPE)
        add(tar, "folder/good.png", PNG)
        add(tar, "folder/good.txt", b"a caption")
        add(tar, "folder/good.exe", b"ignored: no suffix of ours")
        add(tar, "folder/good.pyd", b"ignored: never unpickled")
        add(tar, "lonely.txt", b"no image")
    index = ShardIndex(path)
    assert [index.key(0), len(index)] == ["folder/good", 1]
    assert (index.read(0).text, index.read(0).meta, index.read(0).arrays) == ("a caption", {}, {})
    assert index.skipped == Counter(unsafe_name=5, link_member=2, special_member=4, missing_image=1)


def test_json_that_is_none_is_empty(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    broken = [b"{broken", b"[1, 2]", b"\xff", deep, b"1" * 10_000]
    write_shard(tmp_path / "a.tar", [sample(n, json=content) for n, content in enumerate(broken)])
    index = ShardIndex(tmp_path)
    assert [index.read(i).meta for i in range(5)] == [{}] * 5


def test_members_beyond_the_caps_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.data.tar.MAX_MEMBER_BYTES", 500)
    monkeypatch.setattr("fastclip.data.scan.MAX_TEXT_BYTES", 1000)
    write_shard(tmp_path / "a.tar", [sample(0), sample(1, png=b"x" * 501), sample(2, txt=b"x" * 1001)])
    index = ShardIndex(tmp_path / "a.tar")
    assert [index.key(i) for i in range(len(index))] == ["0000", "0002"]
    assert index.read(1).text is None
    assert index.skipped == Counter(oversized_member=2, missing_image=1)


@pytest.mark.parametrize(
    "digits", [b"%011o\0" % (10 << 30), b"\x80" + (1 << 70).to_bytes(11, "big")], ids=["octal", "base 256"]
)
def test_a_header_that_promises_gigabytes_hides_nothing(tmp_path: Path, digits: bytes) -> None:
    content = shard_bytes(tmp_path, range(2))
    path = write(tmp_path / "a.tar", header(b"huge.png", 0, digits=digits) + content)
    scan = scan_shard(str(path))
    assert keys(path) == ["0000", "0001"]
    assert scan.skipped == Counter(truncated_shard=1, oversized_member=1)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
@pytest.mark.parametrize("size", [10 << 30, 100_000], ids=["beyond the end", "inside"])
def test_a_long_name_that_promises_gigabytes_costs_nothing(tmp_path: Path, kind: bytes, size: int) -> None:
    digits = b"%011o\0" % size
    name = header(b"long", 0, kind, digits) + (bytes(100_352) if size < 1 << 20 else b"")
    path = write(tmp_path / "a.tar", name + member(b"named.png", PNG) + shard_bytes(tmp_path, range(2)))
    scan = scan_shard(str(path))
    assert keys(path)[-2:] == ["0000", "0001"]
    assert scan.skipped["oversized_header"] == 1


def test_long_and_pax_names_are_read(tmp_path: Path) -> None:
    name = f"{'folder/' * 30}{'x' * 50}"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            add(tar, f"{name}.png", PNG)
            add(tar, f"{name}.txt", "caf\u00e9".encode())
            add(tar, "caf\u00e9.png", PNG)
        index = ShardIndex(tmp_path / "a.tar")
        assert [index.key(i) for i in range(len(index))] == [name, "caf\u00e9"]
        assert index.read(0).text == "caf\u00e9"
        assert not index.skipped


def test_the_whole_samples_of_a_truncated_shard_are_used(tmp_path: Path) -> None:
    content = shard_bytes(tmp_path, range(4))
    places = scan_shard(str(tmp_path / "made.tar")).places
    ends = places[:, 0].sum(axis=1)
    for cut in range(int(ends[0]), int(places.sum(axis=2).max()), 173):
        path = write(tmp_path / "cut.tar", content[:cut])
        scan = scan_shard(str(path))
        assert len(scan) == sum(cut >= end for end in ends)
        assert scan.skipped["truncated_shard"] == 1


@pytest.mark.parametrize("cut", [0, 1, 511, 700])
def test_what_is_appended_to_a_truncated_shard_is_used(tmp_path: Path, cut: int) -> None:
    first, second = shard_bytes(tmp_path, range(3)), shard_bytes(tmp_path, range(3, 6))
    path = write(tmp_path / "a.tar", first[: len(first) - 10_240 - cut] + second)
    scan = scan_shard(str(path))
    assert {"0003", "0004", "0005"} <= set(keys(path))
    assert scan.read(open_descriptor(path), keys(path).index("0004")).image == image_file(4)


def open_descriptor(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def test_concatenated_shards_are_read_to_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", shard_bytes(tmp_path, range(2)) + shard_bytes(tmp_path, range(1, 4)))
    scan = scan_shard(str(path))
    assert keys(path) == ["0000", "0001", "0002", "0003"]
    assert scan.skipped == Counter(concatenated_shard=1, duplicate_key=3)


def test_damage_in_the_middle_costs_what_it_hit(tmp_path: Path) -> None:
    content = bytearray(shard_bytes(tmp_path, range(4)))
    start = int(scan_shard(str(tmp_path / "made.tar")).places[2, 0, 0]) - 512
    content[start : start + 50] = b"\xff" * 50
    path = write(tmp_path / "a.tar", bytes(content))
    assert keys(path) == ["0000", "0001", "0003"]
    assert scan_shard(str(path)).skipped == Counter(damaged_shard=1, missing_image=1)


def test_duplicates_keep_the_first(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar", member(b"a.png", b"1") + member(b"a.jpg", b"2") + member(b"a.png", b"3") + bytes(1024)
    )
    index = ShardIndex(path)
    assert (len(index), index.read(0).image, index.skipped) == (1, b"1", Counter(duplicate_key=2))


def test_a_header_that_points_backwards_does_not_hang(tmp_path: Path) -> None:
    content = bytearray(shard_bytes(tmp_path, range(2)))
    start = int(scan_shard(str(tmp_path / "made.tar")).places[1, 0, 0]) - 512
    content[start : start + 512] = header(b"0001.png", 0, digits=b"\xff" * 10 + (-3072 & 0xFFFF).to_bytes(2, "big"))
    path = write(tmp_path / "a.tar", bytes(content))
    assert keys(path) == ["0000"]
    assert scan_shard(str(path)).skipped == Counter(damaged_shard=1, missing_image=1)


def test_megabytes_of_zeros_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(member(b"a.png", PNG))
        file.seek(128 << 20)
        file.write(member(b"b.png", PNG) + bytes(1024))
    start = time.monotonic()
    assert keys(path) == ["a", "b"]
    assert time.monotonic() - start < 5


def test_one_unreadable_shard_is_counted_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 6)
    (data / "train-00001.tar").write_bytes(b"")
    index = ShardIndex(data)
    assert len(index) == 4
    assert index.skipped == Counter(unreadable_shard=1)
    for path in data.glob("*.tar"):
        path.write_bytes(b"\x1f\x8b this is no tar" * 100)
    for make in (ShardIndex, lambda path: Loader(path, small_tokenizer(tmp_path), 8, 1)):
        with pytest.raises(ValueError, match=r"no sample in 3 file\(s\).*'unreadable_shard': 3.*uncompressed tar"):
            make(data)


damage = st.lists(st.tuples(st.integers(0, 12 * 1024), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6)


@settings(max_examples=examples(150), deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damage, cut=st.integers(0, 30_000), tail=st.sampled_from(["", "again", "noise"]))
def test_no_damage_hangs_or_crashes_the_scan(
    tmp_path: Path, damage: list[tuple[int, bytes]], cut: int, tail: str
) -> None:
    whole = shard_bytes(tmp_path, range(3))
    content = bytearray(whole)
    for place, noise in damage:
        content[place : place + len(noise)] = noise
    path = write(tmp_path / "fuzz.tar", bytes(content)[:cut] + {"": b"", "again": whole, "noise": b"\x01" * 777}[tail])
    scan = scan_shard(str(path))
    file = open_descriptor(path)
    for i in range(len(scan)):
        read = scan.read(file, i)
        assert not read.fault.startswith("shrunk")
        assert len(read.image) <= path.stat().st_size
    if tail == "again" and len(scan) < 3:
        assert set(scan.skipped) & {"truncated_shard", "damaged_shard", "unreadable_shard", "missing_image"}


@settings(max_examples=examples(100), deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=1500))
def test_any_bytes_are_scanned(tmp_path: Path, content: bytes) -> None:
    assert len(scan_shard(str(write(tmp_path / "any.tar", content)))) == 0


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that promises width x height pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


BROKEN: dict[str, tuple[dict[str, bytes | None], str]] = {
    "bomb": ({"png": bomb(60_000, 60_000)}, "too_many_pixels"),
    "nothing": ({"png": b""}, "empty_image"),
    "noise": ({"png": b"\xff\xd8\xff noise"}, "unreadable_image"),
    "half a JPEG": ({"png": image_file(1, (64, 64), form="JPEG")[:600]}, "unreadable_image"),
    "a pickle": ({"png": b"\x80\x04cos\nsystem\n."}, "unreadable_image"),
    "no caption": ({"txt": None, "json": None}, "missing_caption"),
    "blank caption": ({"txt": b" \n", "json": None}, "empty_caption"),
    "Latin-1": ({"txt": b"caf\xe9", "json": None}, "invalid_utf8"),
    "numbers": ({"txt": None, "json": json.dumps({"captions": [1, 2]}).encode()}, "missing_caption"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_sample_is_replaced_counted_and_named_once(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    members, cause = BROKEN[case]
    data = write_samples(tmp_path / "data", 12, s2=members, s5=members)
    loader = Loader(data, small_tokenizer(tmp_path), 8, global_batch=6, workers=0)
    with caplog.at_level(logging.WARNING, "fastclip.data"):
        batches = list(islice(loader.batches(), 6))
    assert all(len(set(batch["keys"])) == 6 for batch in batches)
    assert not {"0002", "0005"} & {key for batch in batches for key in batch["keys"]}
    assert loader.skipped[cause] >= 6
    assert set(loader.skipped) == {cause}
    (line,) = caplog.messages
    assert cause.replace("_", " ") in line
    assert "train-00002.tar" in line


def test_a_jpeg_that_is_a_png_is_what_it_is(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 6, s2={"png": None, "jpg": image_file(2)})
    loader = Loader(data, small_tokenizer(tmp_path), 8, global_batch=6, workers=0, crop_scale=(1, 1))
    batch = next(loader.batches())
    found = batch["image"][batch["keys"].index("0002")].numpy()
    assert np.array_equal(found.transpose(1, 2, 0), np.asarray(Image.open(io.BytesIO(image_file(2)))))
    assert not loader.skipped


def test_a_shard_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 18)
    loader = Loader(data, small_tokenizer(tmp_path), 8, global_batch=6, workers=0)
    batches = loader.batches()
    next(batches)
    shard = data / "train-00001.tar"
    with open(shard, "r+b") as file:
        file.truncate(3000)
    for batch in islice(batches, 5):
        assert not {f"{n:04d}" for n in range(4, 18, 3)} & set(batch["keys"])
    assert loader.skipped["shrunk_shard"] >= 5
    assert set(loader.skipped) == {"shrunk_shard"}


def test_strict_stops_at_the_first(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 12, s2={"png": b""})
    tokenizer, strict = small_tokenizer(tmp_path), DataOptions(strict=True)
    with pytest.raises(ValueError, match=r"empty image: .*'0002'.*strict run"):
        list(islice(Loader(data, tokenizer, 8, 6, workers=0, options=strict).batches(), 2))
    (data / "train-00001.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=r"unreadable shard: .*train-00001.tar"):
        Loader(data, tokenizer, 8, 6, workers=0, options=strict)


def test_captions_that_are_cut_do_not_stop_a_strict_run(tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data", 6, s2={"json": json.dumps({"captions": ["red " * 50]}).encode()})
    loader = Loader(data, small_tokenizer(tmp_path), 8, 6, workers=0, options=DataOptions(strict=True))
    next(loader.batches())
    assert loader.skipped == Counter(truncated_caption=1)


def test_too_much_that_is_broken_ends_the_run_with_a_summary(tmp_path: Path) -> None:
    broken = {f"s{n}": {"png": b""} for n in range(0, 40, 4)}
    data = write_samples(tmp_path / "data", 40, **broken)
    loader = Loader(data, small_tokenizer(tmp_path), 8, 20, workers=0, options=DataOptions(max_broken=0.1))
    batches = loader.batches()
    assert len(list(islice(batches, BUDGET_FROM // 20 - 1))) == BUDGET_FROM // 20 - 1
    with pytest.raises(ValueError, match=r"of 1000 samples are broken, more than the share of 0.1 .*empty image"):
        next(batches)
    patient = Loader(data, small_tokenizer(tmp_path), 8, 20, workers=0, options=DataOptions(max_broken=0.6))
    assert len(list(islice(patient.batches(), 60))) == 60


def test_the_budget_counts_samples_not_captions() -> None:
    faults = Faults(max_broken=0.1)
    faults.add({"truncated_caption": 5000, "empty_image": 200}, {}, broken=100, read=1000)
    with pytest.raises(ValueError, match="101 of 1001"):
        faults.add({"empty_image": 1}, {}, broken=1, read=1)


def test_stored_arrays_are_never_pickles(tmp_path: Path) -> None:
    def npy(array: Any) -> bytes:
        out = io.BytesIO()
        np.save(out, array, allow_pickle=True)
        return out.getvalue()

    good = {f"s{n}": {"teacher.npy": npy(np.full(3, n, np.float16))} for n in range(12)}
    bad = {"s2": npy(np.array([{"a": 1}], dtype=object)), "s4": npy(np.zeros(4)), "s5": b"\x80\x04.", "s7": npy(1)}
    members = good | {name: {"teacher.npy": content} for name, content in bad.items()} | {"s9": {}}
    data = write_samples(tmp_path / "data", 12, **members)
    options = DataOptions(arrays=("teacher.npy",))
    loader = Loader(data, small_tokenizer(tmp_path), 8, 4, workers=0, options=options)
    for batch in islice(loader.batches(), 6):
        assert batch["teacher"].shape == (4, 3)
        assert batch["teacher"][:, 0].tolist() == [float(key) for key in batch["keys"]]
    assert set(loader.skipped) == {"unreadable_array", "missing_array"}
    with pytest.raises(ValueError, match=r"no sample holds student.npy; there are \['teacher.npy'\]"):
        Loader(data, small_tokenizer(tmp_path), 8, 4, options=DataOptions(arrays=("student.npy",)))


@pytest.mark.long
@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.sampled_from(["good", "half", "link", "huge", "zeros", "noise", "climb", "long", "empty", "bomb"]),
        max_size=12,
    ),
    cut=st.integers(0, 4000),
)
def test_a_loader_of_any_mess_gives_good_samples_or_says_why(tmp_path: Path, pieces: list[str], cut: int) -> None:
    parts = {
        "half": member(b"half.png", PNG)[:700],
        "link": header(b"link.png", 0, b"2"),
        "huge": header(b"huge.png", 0, digits=b"%011o\0" % (10 << 30)),
        "zeros": bytes(1024),
        "noise": b"\x07" * 333,
        "climb": member(b"../../etc/passwd.png", PNG),
        "long": header(b"long", 0, b"L", b"%011o\0" % (10 << 30)),
    }
    content, good = b"", set()
    for number, piece in enumerate(pieces):
        if piece == "good":
            good.add(f"{number:04d}")
        png = {"empty": b"", "bomb": bomb(60_000, 60_000)}.get(piece, PNG)
        pair = member(b"%04d.png" % number, png) + member(b"%04d.txt" % number, b"red")
        content += parts.get(piece, pair)
    path = write(tmp_path / "mess.tar", content[: max(len(content) - cut, 0)])
    path.with_name("mess.tar.index.npz").unlink(missing_ok=True)
    tokenizer, found = small_tokenizer(tmp_path), set()
    with contextlib.suppress(ValueError):  # nothing in it can be used
        found = {batch["keys"][0] for batch in islice(Loader(path, tokenizer, 8, 1, workers=0).batches(), 40)}
    assert found <= good
    if not cut and not {"half", "long"} & set(pieces):  # these take what follows them along
        assert found == good
