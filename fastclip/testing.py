"""Input makers, exact answers, the error budget, the offline compile: for tests, benchmarks and users with a kernel."""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LossInputs = tuple[Tensor, Tensor, Tensor]
# What a block of a kernel may take by compute capability: A100, H100 and H200, B200
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def clip_features(
    n: int,
    d: int,
    *,
    kind: str = "random",
    scale: float = 100.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> LossInputs:
    """Unit image features (n, d), text features (n, d) and a scale, as leaves that require a gradient.

    kind: "random" (as at initialisation: no pair is alike), "clip" (positives near cos 0.33, negatives near 0.15: a
        trained CLIP), "converged" (every text equals its image), "permuted" (every text equals another image: the loss
        is near its worst), "antipodal" (every text is opposite to its image: worse), "negative" (all cosines below 0),
        "duplicates" (all pairs the same), "zero" (random, with a zero vector in each tower).
    """
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "clip":
        shared, pair = (
            torch.randn(1, d, generator=generator, dtype=torch.float64),
            torch.randn(n, d, generator=generator, dtype=torch.float64),
        )
        image, text = (0.39 * shared + 0.42 * pair + 0.82 * noise for noise in (image, text))
    elif kind == "converged":
        text = image.clone()
    elif kind == "permuted":
        text = image.roll(1, 0)
    elif kind == "antipodal":
        text = -image
    elif kind == "negative":
        shared = torch.full((1, d), 3 / d**0.5, dtype=torch.float64)
        noise = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
        image, text = (sign * shared + x for sign, x in zip((1, -1), noise, strict=True))
    elif kind == "duplicates":
        image, text = image[:1].repeat(n, 1), text[:1].repeat(n, 1)
    elif kind == "zero":
        image[0], text[-1] = 0, 0
    elif kind != "random":
        kinds = "random, clip, converged, permuted, antipodal, negative, duplicates or zero"
        raise ValueError(f"kind is {kind!r}, must be {kinds}")
    image, text = (F.normalize(x, dim=1).to(device=device, dtype=dtype).requires_grad_() for x in (image, text))
    scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return image, text, torch.tensor(scale, dtype=scale_dtype, device=device, requires_grad=True)


def eager_contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The textbook loss with its N x N matrix, in the dtype given: what everybody writes."""
    logits = logit_scale * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def exact_contrastive_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """The truth, from fp64 features: 1 / 2N sum_i log1p(sum_{j != i} exp(z_ij - z_ii)) + log1p(sum_{j != i} exp(z_ji -
    z_ii)).

    Another formula than any implementation uses, exact for converged pairs too; overflows where logits differ by more
    than 700.
    """
    logits = logit_scale.double() * image_features.double() @ text_features.double().T
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    rows, columns = ((x - x.diagonal()[:, None]).exp().where(others, 0).sum(1).log1p() for x in (logits, logits.T))
    return (rows + columns).mean() / 2


def textbook_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    labels: Tensor | None = None,
    group_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    group_mode: str = "positive",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    directions: str = "both",
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`contrastive_loss` of one process as its docstring has it, with matrices of logits, targets and denominators."""
    image, text = image_features, text_features
    if normalize:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    z, n = logit_scale * image @ text.T, len(image)
    labels = torch.arange(n, device=z.device) if labels is None else labels
    image_ids, text_ids = group_ids if isinstance(group_ids, tuple) else (group_ids, group_ids)
    own = torch.zeros_like(z, dtype=torch.bool)
    own[torch.arange(n), labels] = True
    same = own if image_ids is None or text_ids is None else image_ids[:, None] == text_ids
    is_kept = own | ~same if group_mode == "ignore" else torch.ones_like(own)
    is_positive = own if group_mode == "ignore" else same

    def cross_entropy(logits: Tensor, positives: Tensor, kept: Tensor) -> Tensor:
        targets = positives.to(z.dtype) / positives.sum(1, keepdim=True)
        targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[1]
        expected = torch.where(kept, targets * logits, 0).sum(1)
        return logits.masked_fill(~kept, -torch.inf).logsumexp(1) - expected

    rows = cross_entropy(z, is_positive, is_kept)
    columns = cross_entropy(*(x.T[labels] for x in (z, is_positive, is_kept)))
    loss = {"both": (rows + columns) / 2, "image": rows, "text": columns}[directions]
    weights = torch.ones_like(loss) if weights is None else weights
    total = (weights * loss).sum()
    return {"none": weights * loss, "sum": total, "mean": total / weights.sum()}[reduction]


def value_and_gradients(
    loss: Callable[..., Tensor], inputs: LossInputs, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """loss(*inputs) and its gradient for each input, detached and in fp64; the inputs are first copied to `dtype`."""
    leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = loss(*leaves)
    return tuple(x.detach().double() for x in (value, *torch.autograd.grad(value, leaves)))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in the Frobenius norm; the absolute error where the exact value is zero."""
    norm = exact.norm().item()
    return (value - exact).norm().item() / (norm or 1.0)


def assert_within_budget(
    results: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    units: dict[str, float],
    floor: float = 5e-7,
) -> None:
    """Every result errs at most twice as much as eager code of the same dtype does against fp64, in the Frobenius norm.

    Args:
        results, eager, exact: values in the order of `units`, in fp64.
        units: by name, the norm of what is summed to give the value, however much of it cancels.
        floor: what the rounding of a few fp32 sums may do, in those units.
    """
    for (name, unit), value, plain, truth in zip(units.items(), results, eager, exact, strict=True):
        error, allowed = ((x - truth).norm().item() for x in (value, plain))
        assert error <= 2 * allowed + floor * unit, f"{name}: error {error:.2e}, eager {allowed:.2e}, unit {unit:.2e}"


def contrastive_loss_units(inputs: LossInputs) -> dict[str, float]:
    """`units` of the loss and of its gradients for (image features, text features, scale)."""
    image, text, scale = (x.detach().double() for x in inputs)
    per_pair = scale.item() / len(image)
    d_image, d_text = text.norm().item() * per_pair, image.norm().item() * per_pair
    loss = 1 + exact_contrastive_loss(image, text, scale).item()
    return {"loss": loss, "d_image_features": d_image, "d_text_features": d_text, "d_logit_scale": 1.0}


class Usage(NamedTuple):
    """What one thread, and one block, of a compiled kernel takes."""

    registers: int
    stack_bytes: int  # spilled registers live there: 0 is the aim
    shared_bytes: int


def compile_offline(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], capability: int
) -> Usage:
    """Compiles a Triton kernel for compute capability 80, 90 or 100 without a GPU; run without TRITON_INTERPRET.

    Args:
        kernel: the @triton.jit function.
        types: Triton type by argument name; pointers and `d` are taken as multiples of 16, as they are at run time.
        constants: the values of the constexpr arguments.
        options: num_warps, num_stages.
    """
    return usage_of(compiled_offline(kernel, types, constants, options, capability))


def compiled_offline(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], capability: int
) -> Any:
    """What Triton makes of it (`asm["ptx"]`, `asm["cubin"]`, `metadata`); arguments as `compile_offline`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or name == "d"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage_of(compiled: Any) -> Usage:
    """What `cuobjdump` says of a compiled kernel."""
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        command = [str(cuobjdump), "-res-usage", binary.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = dict(word.split(":")[:2] for word in report.split() if word.startswith(("REG:", "STACK:", "LOCAL:")))
    return Usage(int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"]), compiled.metadata.shared)
