"""The cross-entropy of a teacher's probabilities to a student's, row by row, without either's n x M logits.

With z = scale * rows @ columns^T of each model and p its softmax over the M columns:

    loss_i = -sum_j p_teacher_ij log p_student_ij = lse(z_student_i) - sum_j p_teacher_ij z_student_ij
"""

from fastclip.ops.distill_loss.op import distill_rows

__all__ = ["distill_rows"]
