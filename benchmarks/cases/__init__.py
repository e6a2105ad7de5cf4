"""The cases, one file an op."""

from benchmarks.case import Case
from benchmarks.cases import contrastive_loss, sigmoid_loss

CASES: dict[str, Case] = {case.op: case for case in (contrastive_loss.CASE, sigmoid_loss.CASE)}
