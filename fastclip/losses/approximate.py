"""`approximate_contrastive_loss`: below the four products of an exact gradient, with a bound on what it lacks."""

from torch import Tensor

from fastclip.losses.checks import check_inputs
from fastclip.ops._at_once import mean_at_once
from fastclip.ops.contrastive_loss.skipping import LeftOut, mean_and_gradients, similar_first, why_not


def approximate_contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    tolerance: float = 1e-3,
    *,
    sorts: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, LeftOut]:
    """`contrastive_loss`'s mean, exact, with a gradient that leaves out what weighs next to nothing.

    With a sharp temperature and trained features most of dz, the gradient for the logits, is nearly zero. Of its blocks
    of negatives, 128 x 64 (32 x 64 up to 1,024 pairs), those are left out whose part is bounded below a like share of

        tolerance * sum_ij |dz_ij|

    so that what is left out is at most 1.1 tolerance of that sum. What it was is returned with the loss: a bound for
    the error of each gradient, relative for the features' and absolute for the scale's, which holds for features of any
    length. The loss itself, and the positives' part of the gradient, are exact.

    One process, on the CPU, computing in fp32. The gradient is made in the forward pass; differentiable once.

    Args:
        image_features, text_features: (n, D), L2-normalised, fp32 or bf16; text i for image i.
        logit_scale: exponentiated, 0-dim or (1,), above 0.
        tolerance: at least 0; 0 leaves out nothing but exact zeros.
        sorts: put similar pairs beside each other first, so that whole blocks fall away. It changes nothing else.
        impl: "auto" or "cpu".

    Returns:
        (the loss in fp32, LeftOut).

    Raises:
        ValueError: inputs that do not fit, naming the argument, or features no kernel can take here, with the reason.
    """
    check_inputs(image_features, text_features, logit_scale, "both", "mean", False)
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}, must be at least 0")
    if (logit_scale <= 0).any():
        raise ValueError(f"logit_scale is {logit_scale.item():g}, must be above 0: the exponentiated scale")
    reason = why_not(image_features, impl)
    if reason is not None:
        raise ValueError(f"approximate_contrastive_loss cannot run here: {reason}")
    left_out: list[LeftOut] = []

    def kernel(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        order = similar_first(image, text) if sorts and len(image) > 1 else None
        *results, lacks = mean_and_gradients(image, text, scale, tolerance, order)
        left_out.append(lacks)
        return tuple(results)

    loss = mean_at_once(kernel, image_features, text_features, logit_scale.reshape(()))
    return loss, left_out[0]
