"""Linear probe: logistic regression on image features that are computed once (Radford et al. 2021, appendix A.3).

minimise over W, b:  1/2 |W|^2 + C sum_i cross_entropy(W x_i + b, y_i),  by scikit-learn's L-BFGS, 1,000 iterations.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.errors import UserError

DECADES = 6  # C between 10^-6 and 10^6
STEPS_PER_DECADE = 8  # the paper's resolution: 96 steps in all
COARSE = 2 * STEPS_PER_DECADE  # the sweep begins at every second power of ten
SHOTS = (1, 2, 4, 8, 16)
VALIDATION = 0.2
ITERATIONS = 1000


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, seed: int = 0
) -> dict[str, Any]:
    """Accuracy on the test part with the C that did best on a fifth of the training part, and with few images a class.

    {"top1", "C", "sweep": [[C, validation accuracy]...], "few_shot": [[shots, mean, lowest, highest]...], counts}.
    After the sweep the classifier is fitted on the whole training part, as in the paper.

    Args:
        train_features, test_features: (N, D), of unit length.
        train_labels, test_labels: (N,) int64.
        seed: draws the validation part and the few-shot images.
    """
    x, y = train_features.double().numpy(), train_labels.numpy()
    x_test, y_test = test_features.double().numpy(), test_labels.numpy()
    if len(x) != len(y) or len(x_test) != len(y_test):
        raise ValueError(f"{len(x)} and {len(x_test)} features need as many labels, had {len(y)} and {len(y_test)}")
    if len(np.unique(y)) < 2:
        raise ValueError("train_labels must hold two classes at least")
    held, kept = _split(y, seed)
    swept = sweep(x[kept], y[kept], x[held], y[held])
    best = max(swept, key=lambda C: (swept[C], -C))  # of equals the strongest regularisation
    few_shot = []
    for shots in SHOTS:
        drawn = [_accuracy(x[part], y[part], x_test, y_test, best) for part in _draws(y, shots, seed)]
        if drawn:
            few_shot.append([shots, sum(drawn) / len(drawn), min(drawn), max(drawn)])
    return {
        "top1": _accuracy(x, y, x_test, y_test, best),
        "C": best,
        "sweep": [[C, swept[C]] for C in sorted(swept)],
        "few_shot": few_shot,
        "train_images": len(x),
        "test_images": len(x_test),
        "classes": len(np.unique(y)),
    }


def sweep(x: np.ndarray, y: np.ndarray, x_held: np.ndarray, y_held: np.ndarray) -> dict[float, float]:
    """Validation accuracy by C: every second power of ten, then between the best and its neighbours, step halved until
    there are eight steps a decade (the paper's parametric binary search)."""
    last = 2 * DECADES * STEPS_PER_DECADE
    found: dict[int, float] = {}

    def measure(places: list[int]) -> None:
        for place in places:
            if 0 <= place <= last and place not in found:
                found[place] = _accuracy(x, y, x_held, y_held, _strength(place))

    measure(list(range(0, last + 1, COARSE)))
    step = COARSE // 2
    while step:
        best = min(found, key=lambda place: (-found[place], place))
        measure([best - step, best + step])
        step //= 2
    return {_strength(place): accuracy for place, accuracy in found.items()}


def _strength(place: int) -> float:
    return float(10.0 ** (place / STEPS_PER_DECADE - DECADES))


def _accuracy(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, C: float) -> float:
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise UserError("a linear probe needs scikit-learn: pip install 'fastclip-kernels[eval]'") from error
    # One thread: the products are small, and the threads of several ranks would wait for each other.
    with warnings.catch_warnings(), threadpool_limits(limits=1):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the paper stops after 1,000 iterations too
        model = LogisticRegression(C=C, max_iter=ITERATIONS).fit(x, y)
    return float((model.predict(x_test) == y_test).mean())


def _split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a fifth of each class, at least one where it has two, and of the others."""
    held = [part[: max(1, round(VALIDATION * len(part)))] for part in _shuffled(labels, seed) if len(part) > 1]
    if not held:
        raise ValueError("train_labels must hold two images of a class at least, to choose C on one of them")
    chosen = np.sort(np.concatenate(held))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)


def _draws(labels: np.ndarray, shots: int, seed: int, draws: int = 3) -> list[np.ndarray]:
    """Some draws of `shots` images of each class; none where a class has fewer."""
    if np.unique(labels, return_counts=True)[1].min() < shots:
        return []
    return [np.concatenate([part[:shots] for part in _shuffled(labels, seed + 1 + draw)]) for draw in range(draws)]


def _shuffled(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The numbers of each class's images, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [part[torch.randperm(len(part), generator=generator).numpy()] for part in places]
