"""The positives' part of the block's gradient, which is O(N D)."""

import torch
from torch import Tensor

from fastclip.ops._rows import add_scaled, parts


def add_positives(
    grad_image: Tensor,
    grad_text: Tensor,
    d_positive: Tensor,
    image_features: Tensor,
    text_features: Tensor,
    offset: int,
    labels: Tensor | None,
) -> None:
    """d_positive_i text_j is added to row i of grad_image, d_positive_i image_i to row j of grad_text; j is i's own."""
    n, m = image_features.shape[0], text_features.shape[0]
    if labels is None:
        own = slice(offset, offset + n)
        if offset < m:
            add_scaled(grad_image, d_positive, text_features[own])
            add_scaled(grad_text[own], d_positive, image_features)
        return
    weight = torch.where((labels >= 0) & (labels < m), d_positive, 0)
    labels = labels.clamp(0, m - 1)
    add_scaled(grad_image, weight, text_features[labels])
    # one at most has a weight in each row of the text, so that the order of the sum does not matter
    for rows in parts(grad_image):
        grad_text.index_add_(0, labels[rows], weight[rows, None] * image_features[rows].to(grad_text.dtype))
