"""From files to batches: shards, transforms, tokenizers, the resumable loader, held-out sets, the embedded data set.

Reading order: `shards` (places of samples in tar files), `transforms`, `tokenizer`, `loader` (training), `eval_set`
(evaluation), `demo` (data that needs no download), `streams` (random numbers that belong to names).
"""

from fastclip.data.eval_set import EvalSet
from fastclip.data.loader import Loader
from fastclip.data.shards import ShardIndex, expand_shards, write_shard
from fastclip.data.tokenizer import Tokenizer, clip_tokenizer, get_tokenizer, train_tokenizer
from fastclip.data.transforms import Preprocess, normalize_image

__all__ = [
    "EvalSet",
    "Loader",
    "Preprocess",
    "ShardIndex",
    "Tokenizer",
    "clip_tokenizer",
    "expand_shards",
    "get_tokenizer",
    "normalize_image",
    "train_tokenizer",
    "write_shard",
]
