"""From open_clip: its command lines, checkpoints from it and to it. Its trainer beside ours: test_training_twin.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peers import peer_module
from torch import Tensor
from training_helpers import MODEL, options

from fastclip.data import Loader, get_tokenizer, normalize_image
from fastclip.data.demo import write_demo
from fastclip.errors import UserError
from fastclip.models import create_model, get_config, load_checkpoint
from fastclip.training.__main__ import main, parse
from fastclip.training.model import model_of
from fastclip.training.open_clip import read_checkpoint, translate
from fastclip.training.optim import parameter_groups
from fastclip.training.recipes import RECIPES

BATCH = 64
LAION = """torchrun --nproc_per_node 8 --nnodes=4 -m open_clip_train.main --train-data '/data/{00000..41455}.tar'
 --train-num-samples 400000000 --dataset-type webdataset --batch-size 256 --accum-freq 4 --epochs 32 --warmup 2000
 --lr 5e-4 --wd 0.2 --precision amp --workers 8 --model ViT-B-32 --local-loss --gather-with-grad --imagenet-val /val
 --report-to wandb --name b32 --save-frequency 2 --dataset-resampled"""


def test_a_command_line_becomes_a_config(capfd: pytest.CaptureFixture[str]) -> None:
    config = parse(["--from-open-clip", LAION.replace("\n", " "), "--lr", "1e-4"])
    batches = -(-400_000_000 // 32_768)
    assert (config.model, config.global_batch, config.chunk_size, config.steps) == (
        "ViT-B-32",
        32_768,
        256,
        32 * batches,
    )
    assert (config.lr, config.weight_decay, config.betas, config.eps) == (1e-4, 0.2, (0.9, 0.98), 1e-6)
    assert (config.warmup, config.schedule, config.precision) == (2000, "open_clip", "bf16")
    assert (config.data, config.workers, config.wandb) == ("/data/{00000..41455}.tar", 8, "open-clip")
    assert (config.out, config.save_every, config.decay_embeddings) == ("logs/b32", 2 * batches, True)
    said = capfd.readouterr().out
    for note in ("--precision amp: bf16", "--imagenet-val /val: no counterpart", "--local-loss: the loss is the same"):
        assert f"--from-open-clip: {note}" in said
    assert "number of ranks" not in said
    assert config.resampled == 400_000_000


def test_locks_cooldowns_and_resnets() -> None:
    line = "--model RN50 --lock-image --lock-image-unlocked-groups=2 --lr-scheduler const-cooldown --epochs 10"
    values, notes = translate(
        f"{line} --grad-checkpointing --epochs-cooldown 2 --train-num-samples 6400 --grad-clip-norm 1 --opt lamb"
    )
    assert values["recompute"] == "full"
    assert (values["lock_image"], values["image_unlocked"], values["betas"], values["eps"]) == (
        True,
        "2",
        [0.9, 0.999],
        1e-8,
    )
    assert (values["schedule"], values["cooldown"], values["steps"]) == ("wsd", 0.2, 1000)
    assert (values["grad_clip"], values["optimizer"]) == ("1", "lamb")
    assert any("number of ranks" in note for note in notes)
    assert any("square root instead of a line" in note for note in notes)
    values, notes = translate(f"--model coca_ViT-B-32 --coca-caption-loss-weight 1.5 {line.partition('--lr')[0][13:]}")
    assert (values["caption_weight"], values["contrastive_weight"]) == ("1.5", 1.0)
    assert not any("coca" in note for note in notes)
    _, notes = translate("--siglip --foo 3")
    assert {"--siglip: no counterpart", "--foo 3: no counterpart"} <= set(notes)
    assert any("--train-num-samples is not in it" in note for note in notes)


@pytest.mark.parametrize(("line", "message"), [("--lr", "--lr has no value"), ("nonsense", "'nonsense' is no flag")])
def test_lines_that_are_none(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate(line)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_whole(name: str) -> None:
    config = RECIPES[name]()
    model = model_of(config)
    assert config.steps > 0
    assert RECIPES[name].__doc__ or RECIPES[name].func.__doc__  # type: ignore[attr-defined]
    assert model.vision.image_size == (config.image_size or get_config(config.model).vision.image_size)
    assert (model.vision.patch_dropout == 0.5) == (name == "flip")
    assert (config.sigmoid_weight > 0) == (name == "siglip")


def test_a_file_that_is_no_checkpoint_of_theirs(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="is not a checkpoint of open_clip's trainer"):
        read_checkpoint(path)
    model = create_model(MODEL)
    optimizer = torch.optim.AdamW(model.visual.parameters())
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    with pytest.raises(UserError, match="locked towers and other optimizers cannot be taken up, use --init"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin") / "data"
    write_demo(folder, scenes=100, workers=1)
    for path in folder.glob("*_test*"):
        path.unlink()
    return folder


def batches(data: Path, count: int) -> list[tuple[Tensor, Tensor]]:
    config = get_config(MODEL)
    loader = Loader(str(data), get_tokenizer(str(data / "tokenizer.json"), 32), 64, BATCH, workers=0)
    made = (loader[step] for step in range(count))
    return [(normalize_image(b["image"], config.image_mean, config.image_std, torch.float32), b["text"]) for b in made]


@pytest.mark.peer
def test_open_clip_opens_our_checkpoint(data: Path, tmp_path: Path) -> None:
    """The weights of a run, by its own loader, give the same features."""
    open_clip = peer_module("open_clip")
    out = tmp_path / "out"
    assert main(options(data, out, engine="torch", steps=1)) == 0
    (step,) = (out / "checkpoints").glob("step_*")
    trained = load_checkpoint(out)
    peer = open_clip.CLIP(**trained.config.to_dict()["model_cfg"])
    open_clip.load_checkpoint(peer, str(step / "model.safetensors"))
    ((image, text),) = batches(data, 1)
    with torch.no_grad():
        ours = trained.model.encode_image(image, normalize=True), trained.model.encode_text(text, normalize=True)
        other = peer.eval().encode_image(image, normalize=True), peer.encode_text(text, normalize=True)
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_decay_is_open_clips_where_asked(data: Path) -> None:
    model = create_model(MODEL)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, parse(["--decay-embeddings"]))
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {"token_embedding.weight", "positional_embedding", "visual.positional_embedding"} <= decayed
    assert "visual.class_embedding" not in decayed
