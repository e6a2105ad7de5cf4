"""The choices of a training stream beyond its files: how samples are drawn, captioned, augmented, and given up."""

from dataclasses import dataclass, field

from fastclip.data.augment import ColorAugment, RandomErase
from fastclip.data.captions import CaptionChoice
from fastclip.data.device_decode import DeviceDecoder
from fastclip.data.fetch import Fetcher
from fastclip.data.order import WINDOW
from fastclip.data.transforms import RATIO


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Errors: `ValueError` for a value out of range."""

    upsampling: tuple[float, ...] = ()
    """How often an epoch holds each sample of each source (1 by default); with `resampled` their relative chance."""
    resampled: int = 0
    """0: every sample once an epoch. Else: epochs of that many samples, drawn with replacement."""
    window: int = WINDOW
    """Samples that are shuffled together, at least; a set that fits in one window is shuffled as a whole."""
    text_keys: str = ""
    """Captions by key and weight, "txt=1::synthetic=3"; see `captions.CaptionChoice`."""
    image_key: str = ""
    """Column of a table that names the image files."""
    caption_key: str = ""
    """Column of a table that holds the captions."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the share of an image that the training crop keeps."""
    crop_ratio: tuple[float, float] = RATIO
    """Range of the crop's aspect ratio, width over height."""
    color: ColorAugment = field(default_factory=ColorAugment)
    """Colour augmentation."""
    erase: RandomErase = field(default_factory=RandomErase)
    """Random erasing."""
    fast_decode: bool = False
    """Decode JPEGs at a reduced scale and resize with SIMD: faster, some values off by one or two of 255."""
    decoder: DeviceDecoder | None = None
    """Decodes JPEGs in the process that takes the batches, whose images then lie on its device; None: workers do."""
    arrays: tuple[str, ...] = ()
    """Suffixes of stored arrays ("teacher.npy") that a batch holds, under their names without ".npy"."""
    strict: bool = False
    """The first sample that cannot be used is an error."""
    max_broken: float = 0.5
    """Largest share of broken samples; more is an error, told with a summary."""
    fetcher: Fetcher = field(default_factory=Fetcher)
    """Time-out, tries and cache of remote shards."""

    def __post_init__(self) -> None:
        if any(factor < 0 for factor in self.upsampling) or (self.upsampling and not any(self.upsampling)):
            raise ValueError(f"upsampling: must be at least 0, and not all 0, was {self.upsampling}")
        for name, low in {"resampled": 0, "window": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be at least {low}, was {getattr(self, name)}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: must be 0 < low <= high <= 1, was {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio: must be 0 < low <= high, was {self.crop_ratio}")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken: must be in [0, 1], was {self.max_broken}")
        color, erase = self.color, self.erase
        if self.decoder and (color.jitter_prob or color.gray_prob or erase.prob or self.fast_decode):
            raise ValueError(
                "gpu_decode: jitter, greys, erasing and fast_decode are the workers', who decode nothing then: must be "
                f"0 and False, were color_jitter_prob {color.jitter_prob:g}, gray_scale_prob {color.gray_prob:g}, "
                f"erase_prob {erase.prob:g} and fast_decode {self.fast_decode}; set them so, or gpu_decode to False"
            )
        CaptionChoice(self.text_keys)
