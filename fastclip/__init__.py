"""FastCLIP: kernels, encoders, gradient caching and DeepSpeed training for CLIP.

Importing costs torch only: no triton, deepspeed, compile or CUDA start happens here.
"""

from fastclip._version import __version__

__all__ = ["__version__"]
