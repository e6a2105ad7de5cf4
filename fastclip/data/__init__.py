"""From files to batches: sources, order, transforms, tokenizers, the resumable loader, held-out sets, embedded data.

Reading order: `tar` and `scan` (places of samples in a file nobody vouches for), `shards`, `sources` (all that samples
come from), `order` (which sample stands where in an epoch), `reader` (a worker's part) and `loader` (training),
`eval_set` (evaluation), `decode` and `transforms`, `device_decode` and `nvjpeg` (JPEGs on a GPU), `captions`,
`tokenizer`, `faults` (what is wrong, counted), `demo` (data that needs no download), `streams` (random numbers that
belong to names).
"""

from fastclip.data.eval_set import EvalSet
from fastclip.data.loader import Loader
from fastclip.data.options import DataOptions
from fastclip.data.shards import ShardIndex, expand_shards, write_shard
from fastclip.data.tokenizer import Tokenizer, clip_tokenizer, get_tokenizer, train_tokenizer
from fastclip.data.transforms import Preprocess, normalize_image

__all__ = [
    "DataOptions",
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
