"""How EditScore composes sub-scores into one number (arXiv 2509.23909, after VIEScore): a geometric mean of minima."""

from __future__ import annotations

import math
from collections.abc import Sequence


def overall(sc: Sequence[float], pq: Sequence[float]) -> float:
    """``sqrt(min(sc) * min(pq))``, in the unit of its arguments.

    Args:
        sc: semantic consistency: instruction followed, not over-edited.
        pq: perceptual quality: natural, free of artefacts.
    """
    if any(not math.isfinite(score) or score < 0 for score in (*sc, *pq)):
        raise ValueError(
            f"sub-scores must be finite and not negative, got SC {list(sc)} and PQ {list(pq)}"
        )
    return math.sqrt(min(sc) * min(pq))
