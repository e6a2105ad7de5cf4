"""The contrastive block with the texts of all ranks gathered on each: O(N D) memory, the fewest messages.

Text features and O(N) statistics of the columns travel forward; gradients of the texts travel home in fp32.
"""

from torch import Tensor

from fastclip.distributed import gather_rows, merge_log_sum, reduce_scatter_rows, sum_over_ranks
from fastclip.losses.blocks import Mask, Problem, block_gradients, block_statistics


def statistics(problem: Problem) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(rows (n,), columns (m,) of this rank's texts over all images, what `gradients` wants kept)."""
    layout = problem.layout
    text, text_ids = _gathered(problem)
    rows, columns, kept = block_statistics(problem, text, text_ids, _mask(problem))
    if layout.group is None:
        return rows, columns, [*columns[:2], kept]
    col_max, col_log_sum = merge_log_sum(columns[0], columns[1], layout.group)
    columns = [col_max, col_log_sum, *(sum_over_ranks(x, layout.group) for x in columns[2:])]
    own = slice(layout.first_text, layout.first_text + problem.text.shape[0])
    return rows, [x[own] for x in columns], [col_max, col_log_sum, kept, text]


def gradients(
    problem: Problem,
    kept: list[Tensor],
    row_lse: tuple[Tensor, Tensor],
    d_positive: Tensor,
    d_rows: list[Tensor],
    d_columns: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """dz @ text (n, D) and dz^T @ image (m, D) over all ranks."""
    layout = problem.layout
    if layout.group is None:
        col_max, col_log_sum, logits = kept
        lse = (*row_lse, col_max, col_log_sum)
        return block_gradients(
            problem, problem.text, problem.text_ids, _mask(problem), lse, logits, d_positive, d_rows, d_columns
        )
    col_max, col_log_sum, logits, text = kept
    _, text_ids = _gathered(problem, text)
    d_columns = [gather_rows(x, layout.texts, layout.group) for x in d_columns]
    lse = (*row_lse, col_max, col_log_sum)
    grad_image, grad_text = block_gradients(
        problem, text, text_ids, _mask(problem), lse, logits, d_positive, d_rows, d_columns
    )
    return grad_image, reduce_scatter_rows(grad_text, layout.texts, layout.group)


def _gathered(problem: Problem, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    layout, text_ids = problem.layout, problem.text_ids
    if layout.group is None:
        return problem.text, text_ids
    text = gather_rows(problem.text, layout.texts, layout.group) if text is None else text
    return text, None if text_ids is None else gather_rows(text_ids, layout.texts, layout.group)


def _mask(problem: Problem) -> Mask:
    first, labels = problem.layout.first_text, problem.labels
    return (first, None) if labels is None else (0, labels + first)
