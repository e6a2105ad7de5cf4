"""Which implementation of the sigmoid block runs where: modules with `losses` and `losses_and_gradients`."""

from fastclip.ops._pairs import IMPLS, PairOp
from fastclip.ops.sigmoid_loss.dense import MAX_ELEMENTS

__all__ = ["IMPLS", "explain", "implementation", "measured", "why_not"]

_OP = PairOp("sigmoid_loss", MAX_ELEMENTS)
why_not, implementation, explain = _OP.why_not, _OP.implementation, _OP.explain
measured = _OP.measured
