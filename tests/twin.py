"""The twin run: open_clip's own `train_one_epoch` and our trainer on the same shards of real images (digits, upscaled),
from the same weights, with the same recipe and seed.

    python tests/twin.py [STEPS]

trains both on one rank for three seeds and prints their zero-shot accuracy on held-out digits. Exit 1 where the means
are further from each other than open_clip's runs are from theirs. test_training_twin.py compares the curves.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contrastive_loss_helpers import run_on_ranks
from peers import peer_module
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_helpers import MODEL, options, run, this_rank

from fastclip.data import Loader, get_tokenizer, normalize_image, train_tokenizer, write_shard
from fastclip.data.demo.captions import NUMBER_WORDS, ZERO_SHOT_TEMPLATES, digit_captions
from fastclip.data.demo.digits import enlarge, load_digits, split_digits
from fastclip.data.demo.samples import sample_files
from fastclip.data.streams import Stream
from fastclip.evaluation import Encoder, evaluate_folder
from fastclip.models import CLIP, create_model, get_config, load_checkpoint
from fastclip.training.__main__ import main as train

BATCH, EPOCH, LR, WARMUP = 64, 50, 1e-3, 5
SEEDS = (0, 1, 2)


def write_digits(folder: Path) -> Path:
    """All 1,797 digits: 1,437 to train on, 360 in `held_out`, where a run of ours does not look."""
    (folder / "held_out").mkdir(parents=True)
    images, labels = load_digits()
    captions: list[str] = []

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        label, key = int(labels[number]), f"{number:04d}"
        captions.extend(written := digit_captions(label, Stream(0, key)))
        return key, sample_files(enlarge(images[number]), {"label": label, "captions": written})

    parts = ("train-00000.tar", "held_out/digits_test-00000.tar")
    for name, numbers in zip(parts, split_digits(len(labels), seed=0), strict=True):
        write_shard(folder / name, [sample(int(number)) for number in numbers])
    classes = {"classnames": NUMBER_WORDS, "templates": ZERO_SHOT_TEMPLATES}
    (folder / "held_out" / "digits_test.classes.json").write_text(json.dumps(classes))
    train_tokenizer(captions, folder / "tokenizer.json", 600, 32)
    return folder


class Batches:
    """What open_clip's trainer takes for a data loader: one epoch of a rank's part of our batches."""

    def __init__(self, data: Path, seed: int, epoch: int, rank: int, ranks: int) -> None:
        self.num_batches, self.num_samples = EPOCH, EPOCH * BATCH
        tokenizer = get_tokenizer(str(data / "tokenizer.json"), 32)
        self.loader = Loader(str(data), tokenizer, 64, BATCH, rank=rank, world_size=ranks, seed=seed, workers=0)
        self.steps = range(epoch * EPOCH, (epoch + 1) * EPOCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        config = get_config(MODEL)
        for batch in (self.loader[step] for step in self.steps):
            image = normalize_image(batch["image"], config.image_mean, config.image_std, torch.float32)
            yield image, batch["text"]


def theirs(data: Path, out: Path, steps: int, seed: int = 0) -> list[float]:
    """This rank's losses under open_clip's trainer; `out`/epoch_N.pt as its `main` writes them."""
    open_clip = peer_module("open_clip")
    trainer, scheduler = (peer_module(f"open_clip_train.{name}") for name in ("train", "scheduler"))
    processes = this_rank() if torch.distributed.is_initialized() else None
    rank, ranks = (processes.rank, processes.world_size) if processes else (0, 1)
    torch.manual_seed(seed)
    ours = create_model(MODEL)
    model = open_clip.CLIP(**ours.config.to_dict()["model_cfg"], output_dict=True)
    model.load_state_dict(ours.state_dict())
    named = list(model.named_parameters())
    plain, rest = ([p for name, p in named if is_plain(name, p) == wanted] for wanted in (True, False))
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    model = DistributedDataParallel(model) if processes else model
    seen: list[float] = []

    class Recording(open_clip.ClipLoss):  # type: ignore[name-defined, misc]
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            found = super().forward(*arguments, **keywords)
            seen.append(found["contrastive_loss"].item())
            return found

    loss = Recording(local_loss=True, gather_with_grad=True, rank=rank, world_size=ranks)
    args = Namespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, horovod=False, rank=rank,
        grad_clip_norm=None, log_every_n_steps=1000, world_size=ranks, batch_size=BATCH // ranks, wandb=False,
        local_rank=rank,
    )  # fmt: skip
    for epoch in range(steps // EPOCH):
        part = SimpleNamespace(dataloader=Batches(data, seed, epoch, rank, ranks), set_epoch=lambda epoch: None)
        lr = scheduler.cosine_lr(optimizer, LR, WARMUP, steps)
        trainer.train_one_epoch(model, {"train": part}, loss, epoch, optimizer, None, lr, None, args)
        if rank == 0:
            state = {"epoch": epoch + 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, out / f"epoch_{epoch + 1}.pt")
    return seen


def is_plain(name: str, p: Tensor) -> bool:
    """Whether open_clip's `main` leaves it without decay."""
    return p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name


def twin(data: Path, folder: Path, steps: int, ranks: int) -> list[float]:
    """open_clip's curve over `ranks`: the mean of each rank's part of the loss."""
    folder.mkdir()
    curves = [theirs(data, folder, steps)] if ranks == 1 else run_on_ranks(ranks, theirs, data, folder, steps)
    return [statistics.fmean(parts) for parts in zip(*curves, strict=True)]


def words(data: Path, out: Path, steps: int, **changed: Any) -> list[str]:
    """The same recipe as a command line of ours."""
    values = {"global_batch": BATCH, "chunk_size": 16, "steps": steps, "warmup": WARMUP, "schedule": "open_clip"}
    values |= {"lr": LR, "weight_decay": 0.2, "engine": "torch"}
    return [*options(data, out, **(values | changed)), "--decay-embeddings"]


def trained(*arguments: str, ranks: int = 1) -> None:
    if ranks == 1:
        assert train(list(arguments)) == 0
        return
    done = run("torchrun", list(arguments))
    assert done.returncode == 0, done.stderr


def top1(data: Path, model: CLIP) -> float:
    """Zero-shot top-1 on the held-out digits."""
    encoder = Encoder.of_model(model, get_tokenizer(str(data / "tokenizer.json"), 32))
    return float(evaluate_folder(encoder, data / "held_out")["sets"]["digits_test"]["top1"])


def accuracies(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """(open_clip's, ours) by seed."""
    data = write_digits(folder / "data")
    found: tuple[list[float], list[float]] = ([], [])
    for seed in SEEDS:
        theirs(data, folder, steps, seed)
        model = create_model(MODEL)
        model.load_state_dict(torch.load(folder / f"epoch_{steps // EPOCH}.pt", weights_only=True)["state_dict"])
        trained(*words(data, folder / f"ours-{seed}", steps, seed=seed, log_every=EPOCH))
        pair = top1(data, model), top1(data, load_checkpoint(folder / f"ours-{seed}").model)
        print(f"seed {seed}: open_clip {pair[0]:.1%}, ours {pair[1]:.1%}", flush=True)
        for accuracy, of_one in zip(pair, found, strict=True):
            of_one.append(accuracy)
    return found


def main(steps: int = 600) -> int:
    with tempfile.TemporaryDirectory() as folder:
        others, ours = accuracies(Path(folder), steps // EPOCH * EPOCH)
    gap, noise = statistics.fmean(ours) - statistics.fmean(others), statistics.stdev(others)
    print(f"the means are {gap:+.1%} apart, open_clip's seeds vary by {noise:.1%} (one standard deviation)")
    return int(abs(gap) > noise)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
