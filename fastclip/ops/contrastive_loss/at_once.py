"""The plain mean loss and its gradient in one call of the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.ops._at_once import mean_at_once


def contrastive_mean_at_once(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """`mean_at_once` of the contrastive loss: on the CPU fp32 or bf16 features, on a GPU 16-bit ones."""
    if image_features.is_cuda:
        from fastclip.ops.contrastive_loss.cuda import mean_and_gradients as kernel
    else:
        kernel = torch.ops.fastclip_cpu.contrastive_loss_mean
    return mean_at_once(kernel, image_features, text_features, logit_scale)
