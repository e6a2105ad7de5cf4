"""What is measured: a problem (sizes, type, device), its implementations, and how right they must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

Loss = Callable[..., Tensor]  # the inputs of a case -> a scalar
PHASES = ("forward", "backward", "both")
MOST_SHAPES = 64  # that one function is compiled for


@dataclass(frozen=True)
class Problem:
    """One point of a sweep."""

    sizes: tuple[tuple[str, int], ...]  # by name; the first is the one that grows
    dtype: str  # "float32", "bfloat16", "float16"
    device: str = "cpu"
    rank: int = 0  # problems of lower rank come first, whatever their op: a run may be cut off
    impls: tuple[str, ...] = ()  # only these implementations beside the baseline; () for all
    is_timed: bool = True  # False: memory only
    has_peak: bool = True  # False: so small that its memory says nothing, or so large that measuring takes too long

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape_json(self) -> str:
        return json.dumps(dict(self.sizes))

    @property
    def label(self) -> str:
        return f"{'x'.join(str(size) for _, size in self.sizes)} {self.dtype} {self.device}"

    def capped(self, size: int) -> Problem:
        """The same with the first size at most `size`."""
        (name, first), *rest = self.sizes
        return replace(self, sizes=((name, min(first, size)), *rest))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Problem:
        fields = json.loads(text)
        fields["sizes"] = tuple((name, size) for name, size in fields["sizes"])
        return Problem(**fields | {"impls": tuple(fields["impls"])})


@dataclass(frozen=True)
class Budget:
    """How far a result may be from fp64: relative, in the Frobenius norm; absolute below 1 for a scalar's gradient."""

    loss: float
    gradient: float
    beside_baseline: float = 0.0  # or this many times the gradient error of the baseline on the same inputs


@dataclass(frozen=True)
class Variant:
    """One implementation, for one problem."""

    impl: str
    load: Callable[[], Loss]  # imports what it needs; called only where it is measured
    budget: Budget
    version: str  # distribution and version, and for ours what "auto" takes
    why_not: str | None = None  # the reason it cannot run
    is_baseline: bool = False
    is_quadratic: bool = False  # holds several N x N matrices
    compiles: bool = False  # the first call on a shape compiles
    without_gradient: tuple[int, ...] = ()  # the inputs it has no gradient for
    gradient_in_forward: bool = False  # its backward does no products


@dataclass(frozen=True)
class Case:
    """One op. Operations and bytes are the least that linear memory allows: one yardstick for all implementations."""

    op: str
    make_inputs: Callable[[Problem], tuple[Tensor, ...]]  # leaves that require a gradient
    exact: Loss  # the op's reference, for the inputs in fp64
    variants: Callable[[Problem], Sequence[Variant]]  # the baseline first
    operations: Callable[[Problem, str], float]  # by phase
    traffic: Callable[[Problem, str], float]  # bytes, by phase
    problems: Callable[[str], Sequence[Problem]]  # by device type
    quick: Callable[[str], Sequence[Problem]]  # the same in seconds
    has_products: bool = True  # False: elements alone, which every processor takes in 16 bits

    def variant(self, problem: Problem, impl: str) -> Variant:
        return next(variant for variant in self.variants(problem) if variant.impl == impl)


def compiled(load: Callable[[], Loss]) -> Callable[[], Loss]:
    """`load` through torch.compile, one compilation for each shape, as a training run of that shape has it."""

    def compile_it() -> Loss:
        torch._dynamo.config.recompile_limit = MOST_SHAPES
        return torch.compile(load(), dynamic=False)

    return compile_it
