"""Real handwritten digits: the 1,797 of scikit-learn's `load_digits` (UCI Optical Recognition of Handwritten Digits,
test part; 8 x 8 pixels, 17 grey levels), enlarged to the size of the scenes.
"""

import numpy as np

from fastclip.data.demo.render import IMAGE_SIZE
from fastclip.data.streams import Stream, permutation


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels 0..16 float64 (1797, 8, 8) and labels int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits of the demo come from scikit-learn: pip install scikit-learn") from error
    data = load()
    return data.images, data.target.astype(np.int64)


def split_digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers for training (80 %) and for the test (20 %), both in random order."""
    order = permutation(count, "digits", seed)
    return order[: count * 4 // 5], order[count * 4 // 5 :]


def _cubic(t: np.ndarray) -> np.ndarray:
    """Catmull-Rom kernel."""
    t = np.abs(t)
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def enlarge(digit: np.ndarray, stream: Stream | None = None) -> np.ndarray:
    """A digit (8, 8) as white ink on black, uint8 (64, 64, 3), by separable cubic interpolation.

    With a stream the digit is also moved by up to 3 px and scaled by 0.88 to 1.06 in each direction: the repetitions
    in the training part are not copies.
    """
    weights = []
    for _ in range(2):
        zoom = stream.uniform(0.88, 1.06) if stream else 1.0
        shift = stream.uniform(-3.0, 3.0) if stream else 0.0
        pixels = np.arange(IMAGE_SIZE) + 0.5 - IMAGE_SIZE / 2 - shift
        source = pixels * 8 / IMAGE_SIZE / zoom + 3.5
        weights.append(_cubic(source[:, None] - np.arange(8)))
    ink = weights[0] @ digit @ weights[1].T * (255 / 16)
    gray = np.clip(np.round(ink), 0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)
