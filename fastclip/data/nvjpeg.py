"""nvJPEG through torchvision, which is no dependency: looked for, and tried, where a run asks for `gpu_decode`."""

from importlib.util import find_spec

import torch
from torch import Tensor

from fastclip.data.device_decode import DeviceDecoder
from fastclip.data.files import synthetic_jpeg
from fastclip.errors import UserError, in_a_line


def nvjpeg_decoder(device: torch.device) -> DeviceDecoder:
    """A decoder on a CUDA `device`. Errors: `UserError` where there is none, or what it needs does not work."""
    if device.type != "cuda":
        raise UserError(f"gpu_decode: needs a CUDA device, was {device}: leave it out; fast_decode is for CPUs")
    if find_spec("simplejpeg") is None:
        raise UserError("gpu_decode: needs simplejpeg, by which workers read headers: pip install simplejpeg")
    file = torch.frombuffer(bytearray(synthetic_jpeg(0, 16)), dtype=torch.uint8)
    try:
        _decode([file], device)
    except Exception as error:  # the import of one for another torch may raise anything
        raise UserError(
            f"gpu_decode: needs a torchvision built for torch {torch.__version__} with nvJPEG, and the one here does "
            f"not decode ({in_a_line(error)}): install that, or leave gpu_decode out"
        ) from error
    return DeviceDecoder(device, _decode)


def _decode(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """See `device_decode.Decode`."""
    from torchvision.io import ImageReadMode, decode_jpeg

    # nvJPEG writes from a stream of its own, or none, into memory that kernels waiting on ours may still read
    # (pytorch/vision#9606, torchcodec#1634).
    torch.cuda.current_stream(device).synchronize()
    return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
