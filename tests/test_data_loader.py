"""The loader: same batches at any number of ranks and workers and after a resume; broken samples replaced, counted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import image_file, sample, small_tokenizer, take, write_samples

from fastclip.data import EvalSet, Loader, Tokenizer, write_shard
from fastclip.data.loader import Batch

BROKEN: dict[str, Any] = {
    "s3": {"png": b"no image"},
    "s4": {"png": image_file(4)[:-30]},
    "s8": {"png": b""},
    "s9": {"txt": b"\xff\xfe", "json": None},
    "s11": {"txt": None, "json": None},
    "s12": {"txt": b" \n", "json": None},
    "s17": {"json": json.dumps({"captions": ["", "  "]}).encode()},
    "s20": {"png": None},
}
CAUSES = Counter(unreadable_image=2, empty_image=1, missing_caption=1, empty_caption=2, invalid_utf8=1)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return small_tokenizer(tmp_path)


def make(data: Path, tokenizer: Tokenizer, **options: Any) -> Loader:
    return Loader(data, tokenizer, **({"image_size": 8, "global_batch": 6, "workers": 0} | options))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a["keys"], a["epoch"]) == (b["keys"], b["epoch"])
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["text"], b["text"])


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """The global batches of all ranks' local ones."""
    return [
        {
            "image": torch.cat([part["image"] for part in parts]),
            "text": torch.cat([part["text"] for part in parts]),
            "keys": [key for part in parts for key in part["keys"]],
            "epoch": parts[0]["epoch"],
        }
        for parts in zip(*ranks, strict=True)
    ]


def test_a_batch_is_what_was_promised(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = make(write_samples(tmp_path / "data", 20), tokenizer, image_size=10, global_batch=4)
    assert (loader.num_samples, loader.steps_per_epoch) == (20, 5)
    (batch,) = take(loader, 1)
    assert sorted(batch) == ["epoch", "image", "index", "keys", "text"]
    assert (batch["image"].dtype, tuple(batch["image"].shape)) == (torch.uint8, (4, 3, 10, 10))
    assert (batch["text"].dtype, tuple(batch["text"].shape)) == (torch.int64, (4, 16))
    assert len(batch["keys"]) == 4
    for key, ids in zip(batch["keys"], batch["text"], strict=True):
        captions = json.loads(sample(int(key))[1]["json"])["captions"]
        assert any(torch.equal(ids, tokenizer(caption)[0]) for caption in captions)


def test_every_sample_comes_exactly_once_per_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = make(write_samples(tmp_path / "data", 24), tokenizer)
    batches = take(loader, 3 * loader.steps_per_epoch)
    orders = [[key for batch in batches if batch["epoch"] == epoch for key in batch["keys"]] for epoch in range(3)]
    assert all(sorted(order) == [f"{n:04d}" for n in range(24)] for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    other = take(make(tmp_path / "data", tokenizer, seed=1), 4)
    assert [key for batch in other for key in batch["keys"]] != orders[0]


def test_a_sample_has_one_number_in_all_of_the_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same in every epoch and on any number of ranks, also where it stands in for a broken one."""
    data = write_samples(tmp_path / "data", 24, 3, s5={"png": b"no image"})
    found: dict[int, str] = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        loader = make(data, tokenizer, rank=rank, world_size=world_size)
        for batch in take(loader, 2 * loader.steps_per_epoch):
            for number, key in zip(batch["index"].tolist(), batch["keys"], strict=True):
                assert found.setdefault(number, key) == key
    assert loader.data_size == 24
    in_order = [f"{sample:04d}" for shard in range(3) for sample in range(shard, 24, 3)]
    assert found == {number: key for number, key in enumerate(in_order) if key != "0005"}


def test_what_does_not_fill_a_batch_is_left_out_in_turn(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = make(write_samples(tmp_path / "data", 23), tokenizer)
    assert loader.steps_per_epoch == 3
    seen = [{key for batch in take(loader, 3, 3 * epoch) for key in batch["keys"]} for epoch in range(8)]
    assert all(len(keys) == 18 for keys in seen)
    assert len(set.union(*seen)) == 23


def test_captions_and_crops_change_with_the_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = make(write_samples(tmp_path / "data", 6), tokenizer, crop_scale=(0.3, 0.7))
    texts: dict[str, set[tuple[int, ...]]] = {}
    crops: dict[str, set[bytes]] = {}
    for batch in take(loader, 12):
        for key, ids, image in zip(batch["keys"], batch["text"], batch["image"], strict=True):
            texts.setdefault(key, set()).add(tuple(ids.tolist()))
            crops.setdefault(key, set()).add(image.numpy().tobytes())
    assert all(len(found) == 3 for found in texts.values())
    assert all(len(found) > 6 for found in crops.values())


@pytest.mark.parametrize("broken", [{}, BROKEN], ids=["whole", "broken"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_sees_the_same_global_batches(
    tmp_path: Path, tokenizer: Tokenizer, world_size: int, broken: dict[str, Any]
) -> None:
    data = write_samples(tmp_path / "data", 33, **broken)
    options = {"crop_scale": (0.3, 0.7), "seed": 5}
    one = make(data, tokenizer, **options)
    ranks = [make(data, tokenizer, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    assert_same(joined([take(loader, 11) for loader in ranks]), take(one, 11))
    assert sum((loader.skipped for loader in ranks), Counter()) == one.skipped
    assert bool(one.skipped) == bool(broken)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    # one shard and three workers: samples are read by place, so that is no problem
    data = write_samples(tmp_path / "data", 33, shards=1, **BROKEN)
    plain, loader = make(data, tokenizer), make(data, tokenizer, workers=workers)
    assert_same(take(loader, 12), take(plain, 12))
    assert loader.skipped == plain.skipped


def test_a_copy_in_another_process_is_the_same(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loader = make(write_samples(tmp_path / "data", 12), tokenizer)
    loader[0]  # opens files, which do not travel
    again = pickle.loads(pickle.dumps(loader))
    assert_same([again[step] for step in range(4)], [loader[step] for step in range(4)])


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_resume_equals_the_undisturbed_run(tmp_path: Path, tokenizer: Tokenizer, stop: int) -> None:
    data = write_samples(tmp_path / "data", 33, **BROKEN)
    undisturbed = make(data, tokenizer)
    wanted = take(undisturbed, 12)
    before = make(data, tokenizer, workers=1)
    assert_same(take(before, stop), wanted[:stop])
    state = json.loads(json.dumps(before.state_dict(stop)))
    after = make(data, tokenizer, workers=1)
    start = after.load_state_dict(state)
    assert_same(take(after, 12 - stop, start), wanted[stop:])
    assert after.skipped == undisturbed.skipped


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 1}, "seed: was 1; it must be 0"), ({"global_batch": 4}, "global_batch: was 4; it must be 6")],
)
def test_resume_with_other_arguments_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, int], words: str
) -> None:
    data = write_samples(tmp_path / "data", 12)
    state = make(data, tokenizer).state_dict(3)
    with pytest.raises(ValueError, match=words):
        make(data, tokenizer, **change).load_state_dict(state)
    write_shard(data / "train-00009.tar", [sample(99)])
    with pytest.raises(ValueError, match="num_samples: was 13; it must be 12"):
        make(data, tokenizer).load_state_dict(state)


def test_broken_samples_are_replaced_and_counted_by_cause(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_samples(tmp_path / "data", 37, **BROKEN)  # one of them has no image at all: 36 samples
    loader = make(data, tokenizer)
    assert loader.skipped == Counter(missing_image=1)
    batches = take(loader, loader.steps_per_epoch)
    broken = {f"{int(name[1:]):04d}" for name in BROKEN}
    for batch in batches:
        assert len(set(batch["keys"])) == 6
        assert not broken & set(batch["keys"])
    assert loader.skipped >= CAUSES  # a replacement may be broken too
    assert set(loader.skipped) == {*CAUSES, "missing_image"}


def test_captions_that_are_cut_are_used_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"s2": {"json": json.dumps({"captions": ["red " * 50]}).encode()}}
    loader = make(write_samples(tmp_path / "data", 6, **long), tokenizer)
    (batch,) = take(loader, 1)
    ids = batch["text"][batch["keys"].index("0002")]
    assert ids[-1] == tokenizer.eot_token_id
    assert loader.skipped == Counter(truncated_caption=1)


def test_a_shard_that_goes_away_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_samples(tmp_path / "data", 18)
    loader = make(data, tokenizer)
    (data / "train-00001.tar").unlink()
    batches = take(loader, 3)
    assert all(int(key) % 3 != 1 for batch in batches for key in batch["keys"])
    assert loader.skipped["unreadable_shard"] >= 6


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_is_one_clear_error(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    data = write_samples(tmp_path / "data", 9, **{f"s{n}": {"png": b"?"} for n in range(9)})
    with pytest.raises(
        ValueError, match=r"^shards: sample \d+ of '.*tar' cannot be used, nor can \d+ others"
    ) as caught:
        take(make(data, tokenizer, workers=workers), 1)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch": 10}, r"global_batch: was 10; it must be at most 9, the number of samples in 3 shard\(s\)"),
        ({"global_batch": 0}, "global_batch: must be at least 1, was 0"),
        ({"global_batch": 5, "world_size": 2}, "global_batch: must be a multiple of world_size = 2, was 5"),
        ({"image_size": 0}, "image_size: must be at least 1, was 0"),
        ({"workers": -1}, "workers: must be at least 0, was -1"),
        ({"rank": 2, "world_size": 2}, r"rank: must be in \[0, world_size = 2\), was 2"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale: must be 0 < low <= high <= 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, tokenizer: Tokenizer, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(write_samples(tmp_path / "data", 9), tokenizer, **options)


def test_missing_data_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        make(tmp_path / "nowhere", tokenizer)


def test_training_does_not_read_held_out_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_samples(tmp_path / "data", 12)
    write_shard(data / "scenes_test-00000.tar", [sample(n) for n in range(50, 60)])
    loader = make(data, tokenizer)
    assert loader.num_samples == 12


def test_signals_to_the_whole_group_do_not_end_the_workers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    batches = make(write_samples(tmp_path / "data", 12), tokenizer, workers=1).batches()
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
    assert [next(batches)["epoch"] for _ in range(5)] == [0, 1, 1, 2, 2]
    batches.close()
    assert not multiprocessing.active_children()


def test_held_out_data_comes_in_order_with_all_captions(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_samples(tmp_path / "data", 5, shards=1)
    held_out = EvalSet(data, tokenizer, image_size=12)
    assert len(held_out) == 5
    assert held_out.keys == [f"{n:04d}" for n in range(5)]
    assert held_out.caption_image.tolist() == [n for n in range(5) for _ in range(3)]
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [0, 1, 2, 0, 1]
    assert [record["label"] for record in held_out.records] == [0, 1, 2, 0, 1]
    assert held_out.images(0, 5).shape == (5, 3, 12, 12)
    assert torch.equal(held_out.images(3, 9), held_out.images(0, 5)[3:])
    assert torch.equal(held_out.texts(4, 7), tokenizer(held_out.captions[4:7]))
    assert held_out.image_file(2) == image_file(2)
    exact = EvalSet(data, tokenizer, image_size=8)
    assert not torch.equal(exact.images(0, 1), exact.images(1, 2))


def test_broken_held_out_samples_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = EvalSet(write_samples(tmp_path / "data", 24, shards=1, **BROKEN), tokenizer, image_size=8)
    assert len(held_out) == 24 - 5  # without a caption or an image member
    assert held_out.skipped == Counter(missing_image=1, missing_caption=1, empty_caption=2, invalid_utf8=1)
    images = held_out.images(0, len(held_out))
    gray = [key for key, image in zip(held_out.keys, images, strict=True) if (image == 128).all()]
    assert gray == ["0003", "0004", "0008"]
    assert held_out.skipped["unreadable_image"] == 3


def test_labels_are_none_where_one_is_missing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_samples(tmp_path / "data", 4, s1={"json": b"{}"})
    assert EvalSet(data, tokenizer, image_size=8).labels is None


def test_held_out_data_without_a_caption_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_samples(tmp_path / "data", 2, shards=1, s0={"txt": None, "json": None}, s1={"txt": b"", "json": None})
    with pytest.raises(ValueError, match=r"no usable sample in .*'missing_caption': 1"):
        EvalSet(data, tokenizer, image_size=8)
