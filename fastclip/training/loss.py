"""The sum of losses that a run trains on."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fastclip.losses import DistillClipLoss, GlobalContrastiveLoss, caption_loss, contrastive_loss, sigmoid_loss
from fastclip.losses.normalisers import Normalisers
from fastclip.training.config import TrainConfig
from fastclip.training.processes import Processes


class Loss:
    """The weighted sum of the losses over all ranks, remembering what it saw.

    data_size: samples in the data, which the global contrastive loss must know.
    """

    def __init__(self, config: TrainConfig, processes: Processes, data_size: int = 0) -> None:
        self.config, self.group = config, processes.group
        self.over_all_data: GlobalContrastiveLoss | None = None
        if config.global_weight:
            rho, group = config.global_rho or None, processes.group
            loss = GlobalContrastiveLoss(data_size, rho=rho, impl=config.loss_impl, group=group)
            self.over_all_data = loss.to(processes.device)
        self.distill = DistillClipLoss(
            local_loss=True,
            gather_with_grad=True,
            rank=processes.rank,
            world_size=processes.world_size,
            group=processes.group,
        )
        self.logit_scale = torch.tensor(float("nan"))
        self.is_finite = torch.tensor(True)  # this rank's features, the last time

    def begin(self, epoch: int) -> None:
        """What changes with the epoch of a batch: gamma_t = gamma + (1 - gamma) (1 + cos(pi t / T)) / 2, t < T."""
        if self.over_all_data is not None:
            gamma, epochs = self.config.global_gamma, self.config.global_gamma_epochs
            rest = (1 + math.cos(math.pi * epoch / epochs)) / 2 if epoch < epochs else 0.0
            self.over_all_data.gamma = gamma + (1 - gamma) * rest

    @property
    def normalisers(self) -> Normalisers | None:
        """What the global contrastive loss remembers of every sample, which goes on with a run."""
        return None if self.over_all_data is None else self.over_all_data.normalisers

    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
        negative_text_features: Tensor | None = None,
        caption_losses: Tensor | None = None,
        caption_tokens: Tensor | None = None,
        teacher_image: Tensor | None = None,
        teacher_text: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The loss, with the features of further texts that are no image's as negatives of all images, what a decoder
        says of the captions, the features of a teacher, and the numbers of the samples in the data."""
        config, group = self.config, self.group
        self.logit_scale = logit_scale.detach()
        self.is_finite = image_features.detach().isfinite().all() & text_features.detach().isfinite().all()
        total = logit_scale.new_zeros(())
        if config.sigmoid_weight:
            bias = logit_scale.new_zeros(()) if logit_bias is None else logit_bias
            total = config.sigmoid_weight * sigmoid_loss(image_features, text_features, logit_scale, bias, group=group)
        if caption_losses is not None and caption_tokens is not None:
            total = total + config.caption_weight * caption_loss(caption_losses, caption_tokens, group)
        if config.distill_weight:
            teacher = (normalize(x.float(), dim=-1) for x in (teacher_image, teacher_text) if x is not None)
            scale = logit_scale.new_tensor(config.distill_scale)
            _, distilled = self.distill(image_features, text_features, logit_scale, *teacher, scale)
            total = total + config.distill_weight * distilled
        if negative_text_features is not None:
            text_features = torch.cat((text_features, negative_text_features))
        if config.contrastive_weight:
            loss = contrastive_loss(image_features, text_features, logit_scale, group=group, impl=config.loss_impl)
            total = total + config.contrastive_weight * loss
        if self.over_all_data is not None and index is not None:
            loss = self.over_all_data(image_features, text_features, logit_scale, index)
            total = total + config.global_weight * loss
        return total
