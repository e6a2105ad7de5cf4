"""The losses people train with: functions and modules over the operators in `fastclip.ops` and a process group.

Reading order: `contrastive` (the function), `clip` (open_clip's module over it), `checks`.
"""

from fastclip.losses.clip import ClipLoss
from fastclip.losses.contrastive import ContrastiveStats, contrastive_loss

__all__ = ["ClipLoss", "ContrastiveStats", "contrastive_loss"]
