"""Evaluation of CLIP models on held-out data: zero-shot classification, retrieval, search.

Reading order: `encoder` (features over all ranks), `zero_shot`, `retrieval`, `suite` (every held-out set of a folder),
`gallery` (what a person looks at), `search`.
"""

from fastclip.evaluation.encoder import Encoder
from fastclip.evaluation.retrieval import retrieval
from fastclip.evaluation.suite import eval_sets, evaluate_folder
from fastclip.evaluation.zero_shot import zero_shot, zero_shot_classifier

__all__ = ["Encoder", "eval_sets", "evaluate_folder", "retrieval", "zero_shot", "zero_shot_classifier"]
