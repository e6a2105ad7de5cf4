"""The global contrastive loss: the negatives of the whole data set, estimated from small batches."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastclip.distributed import all_reduce_sum
from fastclip.losses.checks import agreed_layout, check_contrastive, check_index
from fastclip.losses.normalisers import Normalisers
from fastclip.losses.terms import Pairing, contrastive_terms


class GlobalContrastiveLoss(nn.Module):
    """The contrastive loss against all pairs of a data set (SogCLR, Yuan et al. 2022, arXiv 2202.12387; FastCLIP, Wei
    et al. 2024, arXiv 2407.01445), in O(N) memory: what a small batch lacks in negatives, earlier batches have seen.

    With z_ij = logit_scale * image_i . text_j over the N images and M texts of the whole group, text i that of image i:

        g_i = mean_{j != i} exp(z_ij - z_ii)        u_i <- (1 - gamma) u_i + gamma g_i      j are texts
        h_i = mean_{k != i} exp(z_ki - z_ii)        v_i <- (1 - gamma) v_i + gamma h_i      k are images

    where u and v, one of each for every sample of the data set, are what these means have been; the first time they are
    g and h themselves. The value and the estimate of its gradient, in which u and v are constants:

        A = 1/2N sum_i log(eps + u_i) + log(eps + v_i)
        dA = 1/2N sum_i dg_i / (eps + u_i) + dh_i / (eps + v_i)

        rho=None    A                                  the unscaled loss (FastCLIP-v0)
        rho=r       (A + r) / logit_scale              the robust one with a learned temperature (FastCLIP-v3); with a
                                                       scale that has no gradient SogCLR's (v1), whatever r is

    Gradients across ranks are as `contrastive_loss`'s "mean". Every call updates u and v, so call it once a step; a
    sample whose features are not finite leaves its own as they were. `state_dict` is this rank's part of them.

    Args:
        samples: of the data set; 8 bytes for each are kept, spread over the ranks, on the module's device.
        gamma: in (0, 1], the share of the batch in u and v. An attribute: FastCLIP begins with 1 and goes down to 0.2.
        rho: as above; FastCLIP takes 6.5 for CC3M.
        eps: added to u and v.
        ring: as `contrastive_loss`.
        impl: as `contrastive_loss`.
        group: process group, None for this process alone.
    """

    def __init__(
        self,
        samples: int,
        gamma: float = 0.2,
        rho: float | None = None,
        eps: float = 1e-14,
        ring: bool = False,
        impl: str = "auto",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma is {gamma}, must be above 0 and at most 1")
        if not eps > 0:
            raise ValueError(f"eps is {eps}, must be above 0")
        self.gamma, self.rho, self.eps = gamma, rho, eps
        self.ring, self.impl, self.group = ring, impl, group
        self.normalisers = Normalisers(samples, group)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        index: Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or {"contrastive_loss": loss}.

        Args:
            image_features: (n, D), L2-normalised.
            text_features: (m, D), m >= n: text i for image i, the others negatives of all images.
            logit_scale: exponentiated, 0-dim or (1,).
            index: (n,) int64, which sample of the data set each pair is; on a GPU values out of range make the loss
                NaN.

        Raises:
            ValueError: shapes, types or values that do not fit, naming the argument.
        """
        image, text, scale = image_features, text_features, logit_scale
        options: tuple[Any, ...] = (None, None, "positive", None, 0.0, "both", "mean", 0, self.group, self.ring, False)

        def check() -> dict[str, Tensor]:
            return check_contrastive(image, text, scale, *options) | check_index(index, image, self.normalisers.samples)

        layout, faults = agreed_layout(check, image, text, self.group, False)
        images, texts = sum(layout.images), sum(layout.texts)
        if images < 2:
            raise ValueError("image_features has 1 row over all ranks, must have at least 2: a mean over the others")
        pairing = Pairing(None, None, None, False, layout)
        terms = contrastive_terms(image, text, scale.reshape(()), pairing, (), False, self.ring, 0, self.impl)
        log_g = (terms.row_max - terms.positive) + terms.row_log_sum - math.log(texts - 1)
        log_h = (terms.col_max - terms.positive) + terms.col_log_sum - math.log(images - 1)
        now = torch.stack((log_g, log_h))
        known = index.clamp(0, self.normalisers.samples - 1)
        log_u = self.normalisers.update(known, now.detach(), self.gamma, layout.images).to(now.dtype)
        log_u = torch.logaddexp(log_u, torch.full_like(log_u, math.log(self.eps)))
        slope = (now.detach() - log_u).exp() * now  # its gradient is dg / (eps + u)
        total = (log_u + (slope - slope.detach())).sum() / 2
        loss = (total if self.group is None else all_reduce_sum(total, self.group)) / images
        if self.rho is not None:
            loss = (loss + self.rho) / scale.reshape(())
        for is_so in faults.values():
            loss = loss * torch.where(is_so, torch.nan, 1.0)
        return {"contrastive_loss": loss} if output_dict else loss
