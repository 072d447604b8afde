"""The noise scales of NCSNv2: how far they reach, how dense they are, and the steps at each.

As Song & Ermon (2020, "Improved Techniques for Training Score-Based Generative Models") choose them, sigma_max is
the largest distance between two data points (Technique 1); in d dimensions the ratio r of two neighbouring levels
solves, with Phi the standard normal distribution function (Technique 2),

    Phi(sqrt(2 d) (r - 1) + 3 r) - Phi(sqrt(2 d) (r - 1) - 3 r) = 1/2,      (1)

and the step size e of T Langevin steps a level is such that a Gaussian of variance (r sigma)^2 ends with
variance s^2 nearest sigma^2 (Technique 4).  In the notation of `samplers.langevin`, whose e is twice the paper's, and
with c the variance that further steps would lead to,

    s^2/sigma^2 = (1 - e / (2 sigma_L^2))^(2 T) (r^2 - c) + c,    c = 1 / (1 - e / (4 sigma_L^2)).  (2)
"""

import math

import numpy as np

__all__ = ["langevin_step_size", "largest_distance", "level_ratio"]


def largest_distance(x: np.ndarray, *, block: int = 2048) -> float:
    """The largest Euclidean distance between two examples, NCSNv2's sigma_max (Technique 1), in the units of x.

    Args:
      x: `[n, *event]` on the host, of any type; blocks of it are converted to float32, the whole is not.
      block: examples in a block; the memory is that of two blocks and their distances.

    Raises:
      ValueError: for fewer than 2 examples.
    """
    if len(x) < 2:
        raise ValueError(f"a distance needs at least 2 examples, got {len(x)}")

    def rows(start: int) -> np.ndarray:
        part = x[start : start + block]
        return np.asarray(part, np.float32).reshape(len(part), -1)

    # Distances from the centre are smaller numbers, and lose less to rounding.
    centre = rows(0).mean(axis=0, keepdims=True)
    largest = 0.0
    for i in range(0, len(x), block):
        a = rows(i) - centre
        for j in range(i, len(x), block):
            b = rows(j) - centre
            square = np.sum(a**2, axis=1)[:, None] + np.sum(b**2, axis=1)[None, :] - 2 * a @ b.T
            largest = max(largest, float(square.max()))
    return math.sqrt(largest)


def level_ratio(dimension: int) -> float:
    """The ratio of neighbouring noise levels in `dimension` dimensions (Eq. 1, NCSNv2's Technique 2), above 1.

    Raises:
      ValueError: for fewer than 5 dimensions, where Eq. 1 does not determine it.
    """
    # The overlap falls with the ratio as soon as sqrt(2 d) > 3, and from almost 1.
    if dimension < 5:
        raise ValueError(f"the ratio of noise levels is defined from 5 dimensions on, got {dimension}")

    def distribution(value: float) -> float:
        return 0.5 * math.erfc(-value / math.sqrt(2))

    def overlap(ratio: float) -> float:
        far = math.sqrt(2 * dimension) * (ratio - 1)
        return distribution(far + 3 * ratio) - distribution(far - 3 * ratio)

    low, high = 1.0, 1e6
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if overlap(middle) > 0.5 else (low, middle)
    return low


def langevin_step_size(sigma_min: float, ratio: float, num_steps: int) -> float:
    """The step size at the last level (Eq. 2, NCSNv2's Technique 4) that brings s^2/sigma^2 nearest 1.

    Args:
      sigma_min: the smallest noise level.
      ratio: of neighbouring levels, above 1.
      num_steps: Langevin steps at each level.

    Returns:
      `step_size` of `annealed_langevin`, in the square of sigma_min's units: twice the published notation's.

    Raises:
      ValueError: if `sigma_min` is not positive, the ratio not above 1, or there is no step.
    """
    if sigma_min <= 0 or ratio <= 1 or num_steps < 1:
        raise ValueError(
            f"a step size needs sigma_min > 0, ratio > 1 and num_steps >= 1, got {sigma_min}, {ratio} and {num_steps}"
        )
    e = np.geomspace(1e-6, 2.0, 200_001)  # In units of sigma_min^2; at 2 a step forgets where it came from.
    stationary = 1 / (1 - e / 4)
    variance = (1 - e / 2) ** (2 * num_steps) * (ratio**2 - stationary) + stationary
    return float(e[np.argmin(np.abs(variance - 1))]) * sigma_min**2
