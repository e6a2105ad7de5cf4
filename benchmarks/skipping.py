"""`python -m benchmarks.skipping --checkpoint RUN`: the approximate gradient beside the exact one, on trained features.

Of pairs of a run's training data, the learned scale: forward and backward of `contrastive_loss` and of
`approximate_contrastive_loss` at some tolerances, with the pairs as they come and sorted, in interleaved rounds. The
error is the larger of both features' gradients, against the exact one of the same kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.timing import Sample, interleave, ratio, time_block
from fastclip import approximate_contrastive_loss, contrastive_loss
from fastclip.cli.loading import find_source, load_encoder
from fastclip.data import EvalSet
from fastclip.data.streams import Stream
from fastclip.errors import UserError
from fastclip.testing import relative_error

TOLERANCES = (1e-4, 1e-3, 1e-2)
Inputs = tuple[Tensor, Tensor, Tensor]


class Turn:
    """One loss among those that take turns."""

    def __init__(self, loss: Callable[..., Tensor], inputs: Inputs) -> None:
        self.loss, self.inputs = loss, inputs

    def block(self, repeats: int) -> Sample:
        return time_block(self.loss, self.inputs, (), repeats)


def features(run: str, data: str, pairs: int) -> Inputs:
    """Of training pairs of the run's data: images, a caption of each, and the scale."""
    source = find_source(run, data)
    encoder = load_encoder(source, "", "fp32", 256)
    shards = sorted(str(path) for path in source.data.glob("train-*.tar"))
    if not shards:
        raise UserError(f"--data {source.data} has no train-*.tar: a folder that `fastclip data demo` writes")
    whole = EvalSet(shards, encoder.tokenizer, encoder.config.vision.image_size)
    stream = Stream("skipping", 0)
    chosen = stream.sample(range(len(whole.keys)), min(pairs, len(whole.keys)))
    captions = [stream.choice(whole.records[number]["captions"]) for number in chosen]
    found = (encoder.images(whole)[chosen], encoder.texts(captions), torch.tensor(encoder.logit_scale()))
    image, text, scale = (x.clone().requires_grad_() for x in found)
    return image, text, scale


def rows(inputs: Inputs, tolerances: Sequence[float], seconds: float) -> list[str]:
    """A table."""
    exact = torch.autograd.grad(contrastive_loss(*inputs), inputs)
    turns, told = {"exact": Turn(contrastive_loss, inputs)}, {}
    for sorts in (False, True):
        for tolerance in tolerances:
            name = f"{'sorted' if sorts else 'as they come'} | {tolerance:g}"
            call = partial(approximate_contrastive_loss, tolerance=tolerance, sorts=sorts)
            loss, left_out = call(*inputs)
            found = torch.autograd.grad(loss, inputs)
            error = max(relative_error(a, b) for a, b in zip(found[:2], exact[:2], strict=True))
            bound = float(max(left_out.image, left_out.text))
            shares = f"{100 * left_out.early:.0f} % | {100 * left_out.late:.0f} %"
            told[name] = f"{shares} | {error:.1e} | {bound:.1e} | {bound / max(error, 1e-12):.1f}"
            turns[name] = Turn(lambda *x, call=call: call(*x)[0], inputs)
    samples, failures = interleave(turns, dict.fromkeys(turns, 1), seconds)
    if failures:
        raise next(iter(failures.values()))
    lines = ["| pairs | tolerance | left out early | late | error | bound | bound / error | times as fast |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, said in told.items():
        lines.append(f"| {name} | {said} | {ratio(samples['exact'], samples[name], 'both'):.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.skipping", description=__doc__)
    parser.add_argument("--checkpoint", default="", help="a run, a step folder or a file of weights (the newest run)")
    parser.add_argument("--data", default="", help="a folder that `fastclip data demo` wrote (that of the run)")
    parser.add_argument("--pairs", type=int, default=8192, metavar="N", help="in the batch (8192)")
    parser.add_argument("--scale", type=float, help="in place of the learned one")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds (60)")
    options = parser.parse_args(arguments)
    machine.settle_allocator()
    try:
        image, text, scale = features(options.checkpoint, options.data, options.pairs)
    except UserError as error:
        print(f"benchmarks.skipping: {error}", file=sys.stderr)
        return 2
    if options.scale:
        scale = torch.tensor(options.scale, requires_grad=True)
    loss = contrastive_loss(image, text, scale).item()
    print(f"{len(image)} pairs of {image.shape[1]} dimensions, scale {scale.item():.1f}, loss {loss:.3f}", flush=True)
    print(machine.machine_name("cpu"))
    print("\n".join(rows((image, text, scale), TOLERANCES, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
