"""Our kernels inside other people's code: drop-ins that are switched on by name, and back off.

    from fastclip.interop import open_clip_losses, open_clip_encoders

    open_clip_losses().enable()             # until .disable()
    with open_clip_encoders(model): ...     # inside the block

Each is a `DropIn`. Importing this costs torch only, and replaces nothing.
"""

from fastclip.interop.attention import fast_attention
from fastclip.interop.drop_in import DropIn
from fastclip.interop.open_clip_encoder import open_clip_encoders
from fastclip.interop.open_clip_loss import open_clip_losses
from fastclip.interop.sentence_transformers_loss import sentence_transformers_losses
from fastclip.interop.transformers_loss import transformers_losses

__all__ = [
    "DropIn",
    "fast_attention",
    "open_clip_encoders",
    "open_clip_losses",
    "sentence_transformers_losses",
    "transformers_losses",
]
