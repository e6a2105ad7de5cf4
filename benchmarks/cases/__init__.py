"""The cases: the losses, one file an op, and the ops of the encoders."""

from benchmarks.case import Case
from benchmarks.cases import attention, block_ops, contrastive_loss, sigmoid_loss

LOSSES: dict[str, Case] = {case.op: case for case in (contrastive_loss.CASE, sigmoid_loss.CASE)}
ENCODERS: dict[str, Case] = {case.op: case for case in (*attention.CASES, *block_ops.CASES)}
CASES = LOSSES | ENCODERS
