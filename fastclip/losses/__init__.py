"""The losses people train with: functions and modules over the operators in `fastclip.ops` and a process group.

Reading order: `contrastive` (the function), `clip` (open_clip's module over it), `sigmoid` and `siglip` (the same for
SigLIP), `coca` and `distill` (open_clip's two over `clip`), `global_contrastive` (all of a data set as negatives),
`approximate` (a gradient below four products),
`checks`, `ranks`.
"""

from fastclip.losses.approximate import approximate_contrastive_loss
from fastclip.losses.clip import ClipLoss
from fastclip.losses.coca import CoCaLoss, caption_loss
from fastclip.losses.contrastive import ContrastiveStats, contrastive_loss
from fastclip.losses.distill import DistillClipLoss
from fastclip.losses.global_contrastive import GlobalContrastiveLoss
from fastclip.losses.siglip import SigLipLoss
from fastclip.losses.sigmoid import sigmoid_loss

__all__ = [
    "ClipLoss",
    "CoCaLoss",
    "ContrastiveStats",
    "DistillClipLoss",
    "GlobalContrastiveLoss",
    "SigLipLoss",
    "approximate_contrastive_loss",
    "caption_loss",
    "contrastive_loss",
    "sigmoid_loss",
]
