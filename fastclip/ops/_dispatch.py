"""The one rule that picks an implementation.

Every op names its implementations, the order in which `impl="auto"` tries them for the tensors at hand, and a function
that says why one of them cannot run. An explicit name runs or raises with that reason; there is no silent fallback.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple


class Verdict(NamedTuple):
    """One implementation of an op for one kind of input: whether `auto` takes it, and why it does not."""

    impl: str
    chosen: bool
    reason: str


@cache
def has_package(name: str) -> bool:
    """Whether a top-level package can be imported; looked up once per process, without importing it."""
    return find_spec(name) is not None


def pick(op: str, impl: str, names: Sequence[str], order: Sequence[str], why_not: Callable[[str], str | None]) -> str:
    """The implementation to run.

    Args:
        op: name of the op, for messages.
        impl: what the caller asked for: "auto" or one of `names`.
        names: every implementation of the op.
        order: what "auto" tries, best first, for the tensors at hand.
        why_not: maps a name to the reason it cannot run on them, or None.

    Raises:
        ValueError: unknown name, or one that cannot run, with the reason.
    """
    if impl == "auto":
        for name in order:
            if why_not(name) is None:
                return name
        reasons = "; ".join(f"{name}: {why_not(name)}" for name in order)
        raise ValueError(f"{op}: no implementation can run ({reasons})")
    if impl not in names:
        raise ValueError(f"{op}: impl is {impl!r}, must be one of {', '.join(('auto', *names))}")
    reason = why_not(impl)
    if reason is not None:
        raise ValueError(f"{op}: impl={impl!r} cannot run: {reason}")
    return impl


FIRST = "first that can run"


def explain(
    op: str, names: Sequence[str], order: Sequence[str], why_not: Callable[[str], str | None], because: str = FIRST
) -> list[Verdict]:
    """What `pick` would say of every implementation, for people to read (`fastclip doctor`); `because` is said of the
    one that is taken."""
    chosen = pick(op, "auto", names, order, why_not)
    verdicts = []
    for name in names:
        reason = why_not(name) or (because if name == chosen else f"auto prefers {chosen} here")
        verdicts.append(Verdict(name, name == chosen, reason))
    return verdicts
