"""Which implementation of the contrastive block runs where: modules with `statistics` and `negative_gradients`."""

from fastclip.ops._pairs import IMPLS, PairOp
from fastclip.ops.contrastive_loss.dense import MAX_ELEMENTS

__all__ = ["IMPLS", "explain", "implementation", "measured", "why_not"]

_OP = PairOp("contrastive_loss", MAX_ELEMENTS)
why_not, implementation, explain = _OP.why_not, _OP.implementation, _OP.explain
measured = _OP.measured
