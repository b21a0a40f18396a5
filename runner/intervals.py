"""95 % intervals of shares and means. Pure: what evaluates and what reports use the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
"""Half the width, in standard errors, of an interval that holds 95 % of a normal distribution."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` > 0 rows, inside 0..1 (Wilson 1927, formula 3).

    share  count  low     high
    0.5    240    0.4372  0.5628
    1.0    240    0.9842  1.0
    0.0    240    0.0     0.0158
    1.0    1      0.2065  1.0

    A tie is half a row, which makes the interval a little too wide.
    """
    spread = Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of a mean, from the spread of its values; nothing for fewer than two."""
    if len(values) < 2:
        return None, None
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return mean - half, mean + half
