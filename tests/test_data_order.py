"""The order of samples: every one once an epoch, at any number of ranks, workers and windows, resumed anywhere."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import examples, image_file, small_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastclip.data import DataOptions, Loader, Tokenizer, write_shard
from fastclip.data.order import Order
from fastclip.data.streams import Stream, permutation, uniforms

RELAXED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)
PNG = image_file(1, (4, 4))


def pairs(order: Order, epoch: int) -> list[tuple[int, int]]:
    places = order.places(epoch, np.arange(order.num_samples))
    return list(zip(places.shard.tolist(), places.number.tolist(), strict=True))


def all_of(counts: list[int]) -> list[tuple[int, int]]:
    return [(shard, number) for shard, count in enumerate(counts) for number in range(count)]


@settings(max_examples=examples(200), deadline=None)
@given(counts=COUNTS, window=st.integers(1, 40), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_an_epoch_is_every_sample_once(counts: list[int], window: int, seed: int, epoch: int) -> None:
    order = Order(np.array(counts), seed, window=window)
    assert order.num_samples == sum(counts)
    assert sorted(pairs(order, epoch)) == all_of(counts)


@settings(max_examples=examples(100), deadline=None)
@given(counts=COUNTS, window=st.integers(1, 40), data=st.data())
def test_a_position_has_its_sample_in_any_company(counts: list[int], window: int, data: st.DataObject) -> None:
    order = Order(np.array(counts), 0, window=window)
    positions = np.array(data.draw(st.lists(st.integers(0, sum(counts) - 1), max_size=20)), np.int64)
    whole = pairs(order, 2)
    places = order.places(2, positions)
    found = list(zip(places.shard.tolist(), places.number.tolist(), strict=True))
    assert found == [whole[i] for i in positions.tolist()]


def test_what_fits_in_a_window_is_shuffled_as_a_whole() -> None:
    counts = [5, 0, 7, 3, 9]
    assert pairs(Order(np.array(counts), 7), 3) == [all_of(counts)[i] for i in permutation(24, "order", 7, 3)]


def test_windows_mix_the_shards_they_hold_and_no_others() -> None:
    order = Order(np.full(40, 25), 0, window=100)
    for epoch in range(2):
        shards = [shard for shard, _ in pairs(order, epoch)]
        windows = [set(shards[first : first + 100]) for first in range(0, 1000, 100)]
        assert all(len(window) == 4 for window in windows)
        assert len(set.union(*windows)) == 40
    assert pairs(order, 0) != pairs(order, 1)


@settings(max_examples=examples(100), deadline=None)
@given(
    counts=COUNTS, factors=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.4]), min_size=8), window=st.integers(1, 90)
)
def test_upsampling_repeats_samples_as_often_as_asked(counts: list[int], factors: list[float], window: int) -> None:
    factors = [*factors[: len(counts) - 1], 1.0]
    order = Order(np.array(counts), 0, np.array(factors), window)
    if not order.num_samples:
        return
    for epoch in range(2):
        seen = Counter(pairs(order, epoch))
        for shard, (count, factor) in enumerate(zip(counts, factors, strict=True)):
            times = [seen[shard, number] for number in range(count)]
            assert sum(times) == int(factor) * count + round((factor - int(factor)) * count)
            assert set(times) <= {int(factor), int(factor) + 1}


@pytest.mark.parametrize("window", [10, 1000])
def test_resampling_draws_in_proportion(window: int) -> None:
    counts, factors = np.array([10, 0, 30, 20]), np.array([2.0, 5.0, 1.0, 0.0])
    order = Order(counts, 0, factors, window, resampled=20_000)
    assert order.num_samples == 20_000
    seen = Counter(pairs(order, 0))
    shares = np.bincount([shard for shard, _ in seen.elements()], minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.4, 0, 0.6, 0], atol=0.02)
    assert set(seen) == {pair for pair in all_of([10, 0, 30, 20]) if pair[0] in (0, 2)}
    assert pairs(order, 0) != pairs(order, 1)
    assert pairs(order, 0) == pairs(Order(counts, 0, factors, window, resampled=20_000), 0)


def test_uniforms_are_the_streams_own() -> None:
    stream = Stream("a", 1)
    assert uniforms(np.arange(5), "a", 1).tolist() == [stream.uniform() for _ in range(5)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(folder: Path, counts: list[int], broken: frozenset[int] = frozenset()) -> list[str]:
    """Shards of so many samples; the names of the good ones. A broken one has no image."""
    number, good = 0, []
    for path in folder.glob("*"):
        path.unlink()
    for shard, count in enumerate(counts):
        samples = []
        for _ in range(count):
            key = f"{number:03d}"
            samples.append((key, {"png": b"" if number in broken else PNG, "txt": f"red {number}".encode()}))
            good += [key] * (number not in broken)
            number += 1
        write_shard(folder / f"{shard:03d}.tar", samples)
    return good


def keys_of(loader: Loader, steps: range) -> list[list[str]]:
    batches = loader.batches(steps.start)
    try:
        return [batch["keys"] for batch in islice(batches, len(steps))]
    finally:
        batches.close()


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    counts = draw(COUNTS.filter(lambda counts: sum(counts) >= 2))
    world = draw(st.integers(1, 4))
    total = sum(counts)
    local = draw(st.integers(1, max(1, total // world)))
    steps = draw(st.integers(1, 3)) * max(total // (local * world), 1)
    return {
        "counts": counts,
        "world": world if local * world <= total else 1,
        "local": local,
        "options": DataOptions(
            window=draw(st.integers(1, 60)),
            resampled=draw(st.sampled_from([0, 0, 100])),
        ),
        "steps": steps,
        "kill": draw(st.integers(0, steps)),
        "workers": draw(st.sampled_from([0, 0, 0, 1])),
        "other_world": draw(st.sampled_from([1, 2, 3])),
    }


def check_run(folder: Path, tokenizer: Tokenizer, run: dict[str, Any]) -> None:
    """Exactly once, the same at any number of ranks, and resumed at any point at the same and another world size."""
    good = write(folder, run["counts"])
    world, global_batch, steps = run["world"], run["world"] * run["local"], run["steps"]

    def make(rank: int, world_size: int, workers: int = 0) -> Loader:
        options = {"global_batch": global_batch, "seed": 3, "options": run["options"], "workers": workers}
        return Loader(folder, tokenizer, 4, rank=rank, world_size=world_size, **options)

    ranks = [keys_of(make(rank, world, run["workers"]), range(steps)) for rank in range(world)]
    whole = [[key for rank in ranks for key in rank[step]] for step in range(steps)]
    epoch = make(0, 1).steps_per_epoch
    if not run["options"].resampled:
        for first in range(0, steps - epoch + 1, epoch):
            seen = Counter(key for batch in whole[first : first + epoch] for key in batch)
            assert max(seen.values()) == 1
            assert set(seen) <= set(good)
            assert seen.total() == epoch * global_batch
    kill = run["kill"]
    state = json.loads(json.dumps(make(0, world).state_dict(kill)))
    for rank in range(world):
        loader = make(rank, world, run["workers"])
        assert keys_of(loader, range(loader.load_state_dict(state), steps)) == ranks[rank][kill:]
    if global_batch % run["other_world"] == 0:
        others = [make(rank, run["other_world"]) for rank in range(run["other_world"])]
        resumed = [keys_of(loader, range(loader.load_state_dict(state), steps)) for loader in others]
        for step in range(kill, steps):
            assert sorted(whole[step]) == sorted(key for rank in resumed for key in rank[step - kill])
    assert len(json.dumps(state)) < 4096


@settings(max_examples=examples(15), deadline=None, suppress_health_check=RELAXED)
@given(run=runs())
def test_any_run_is_exact_and_resumes(tmp_path: Path, tokenizer: Tokenizer, run: dict[str, Any]) -> None:
    check_run(tmp_path, tokenizer, run)


@pytest.mark.long
@settings(max_examples=examples(60), deadline=None, suppress_health_check=RELAXED)
@given(run=runs())
def test_many_runs_are_exact_and_resume(tmp_path: Path, tokenizer: Tokenizer, run: dict[str, Any]) -> None:
    check_run(tmp_path, tokenizer, run)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=RELAXED)
@given(
    counts=COUNTS.filter(lambda counts: sum(counts) >= 8),
    broken=st.frozensets(st.integers(0, 60), max_size=4),
    window=st.sampled_from([6, 1000]),
    world=st.sampled_from([1, 2]),
)
def test_every_good_sample_comes_once_beside_the_broken(
    tmp_path: Path, tokenizer: Tokenizer, counts: list[int], broken: frozenset[int], window: int, world: int
) -> None:
    """Each good sample at its own place once; what stands in for a broken one is good, and the batches stay whole."""
    good = write(tmp_path, counts, broken)
    if len(good) < 4:
        return
    options = DataOptions(window=window, max_broken=1.0)
    loaders = [Loader(tmp_path, tokenizer, 4, 2, r, world, workers=0, options=options) for r in range(world)]
    epoch = loaders[0].steps_per_epoch
    ranks = [keys_of(loader, range(epoch)) for loader in loaders]
    seen = Counter(key for rank in ranks for batch in rank for key in batch)
    assert set(seen) <= set(good)
    assert seen.total() == 2 * epoch
    whole = [Loader(tmp_path, tokenizer, 4, 2, workers=0, options=options).job(step) for step in range(epoch)]
    own = Counter(
        f"{sum(counts[: int(Path(job.names[shard]).stem)]) + number:03d}"
        for job in whole
        for shard, number in zip(job.shard[0].tolist(), job.number[0].tolist(), strict=True)
    )
    assert max(own.values()) == 1
    assert not (own & Counter(good)) - seen


def test_replacements_come_from_what_is_left_out_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, [23], frozenset({3}))
    loader = Loader(tmp_path, tokenizer, 4, 6, workers=0)
    for epoch in range(8):
        steps = range(3 * epoch, 3 * epoch + 3)
        own = {f"{number:03d}" for step in steps for number in loader.job(step).number[0].tolist()}
        seen = Counter(key for batch in keys_of(loader, steps) for key in batch)
        spares = sorted((seen - Counter(own)).elements())
        assert len(spares) == ("003" in own)
        left_out = {f"{number:03d}" for number in range(23)} - own
        turned = [int(loader.job(step).number[1, place]) for step in steps for place in range(6)]
        assert len({f"{number:03d}" for number in turned} & left_out) == 5
    assert loader.skipped["empty_image"] >= 4


def test_a_machine_reads_its_part_of_the_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, [10] * 20)
    options = DataOptions(window=100)
    shards = [
        {
            name
            for step in range(10)
            for name in used(Loader(tmp_path, tokenizer, 4, 20, rank, 4, options=options), step)
        }
        for rank in range(4)
    ]
    assert all(len(own) <= 12 for own in shards)  # of 20, with neighbours at the edges
    assert len(set.union(*shards)) == 20


def used(loader: Loader, step: int) -> set[str]:
    job = loader.job(step)
    return {job.names[shard] for shard in job.shard[0].tolist()}


def test_another_way_to_draw_is_another_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path, [10, 10])
    state = Loader(tmp_path, tokenizer, 4, 4).state_dict(3)
    for options in (DataOptions(window=8), DataOptions(upsampling=(1.0,))):
        with pytest.raises(ValueError, match="are not those of the checkpoint"):
            Loader(tmp_path, tokenizer, 4, 4, options=options).load_state_dict(state)
    write(tmp_path, [12, 8])
    with pytest.raises(ValueError, match="are not those of the checkpoint"):
        Loader(tmp_path, tokenizer, 4, 4).load_state_dict(state)


def test_repeats_in_an_epoch_are_cropped_anew(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out = image_file(5, (64, 64))
    write_shard(tmp_path / "a.tar", [("0", {"png": out, "txt": b"red"})])
    options = DataOptions(upsampling=(4.0,), crop_scale=(0.2, 0.5))
    (batch,) = islice(Loader(tmp_path, tokenizer, 8, 4, workers=0, options=options).batches(), 1)
    assert len({image.numpy().tobytes() for image in batch["image"]}) == 4
    assert torch.equal(batch["text"][0], batch["text"][3])
