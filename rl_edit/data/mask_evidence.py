"""Decides which side of the masks of a dataset may change, and says what is odd about them.

One mask proves little: a large one may belong to a new background. So each row gives evidence
(its form, the share of the image and of its edges, pixels that its target changes, its label map
of regions), and the rows decide together. Training on the negative of a mask looks like training,
so doubt is said before it begins, and refused where most rows contradict the usual reading.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_edit.data.mask_pixels import Pixels, brightest, edge_values
from rl_edit.data.masks import Foreground, MaskForm, MaskPolarity, Polarity, Reading

LARGE_SHARE = 0.6
"""An edit region above this share of the image is said, unless a background is to change."""

EDGE_SHARE = 0.7
"""The same for the share of the image's outermost pixels: the background touches all sides."""

MIN_AGREEMENT = 0.7
"""Below this IoU between thresholds a mask is said to be soft."""

_CHANGED = 30
"""Levels by which a pixel of the target differs where it was edited, above what JPEG changes."""

_BACKGROUND = re.compile(r"\b(background|backdrop|scenery|surroundings)\b", re.I)


MARKED: dict[tuple[MaskForm, Polarity], str] = {
    ("luminance", "edit_white"): "white",
    ("luminance", "edit_black"): "black",
    ("alpha", "edit_white"): "opaque",
    ("alpha", "edit_black"): "transparent",
    ("labels", "edit_white"): "labelled",
    ("labels", "edit_black"): "unlabelled",
    ("painted", "edit_white"): "painted",
    ("painted", "edit_black"): "unpainted",
}
"""The pixels that may change, in words."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """The edit region under one polarity, as shares of the image and of its outermost pixels."""

    share: float
    edges: float

    @property
    def plausible(self) -> bool:
        """True for a region that an instruction about an object may have."""
        return self.share <= LARGE_SHARE and self.edges < EDGE_SHARE


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Evidence of a row about its mask.

    Attributes:
        white, black: the edit region under either polarity.
        target: the polarity under which the target changes the edit region; None if it says
            nothing.
        regions: the polarity under which the label map of regions agrees; None without one.
        background: the instruction names the background, so a large region is no surprise.
    """

    form: MaskForm
    white: Side
    black: Side
    zero_one: bool
    labels: tuple[int, ...]
    agreement: float
    bright: bool
    doubt: str
    target: Polarity | None
    regions: Polarity | None
    background: bool

    @property
    def decisive(self) -> Polarity | None:
        """Polarity that other files of the row prove."""
        return self.regions or self.target

    @property
    def geometric(self) -> Polarity | None:
        """Polarity that the shape suggests: the side that is not all around the image."""
        if self.white.plausible == self.black.plausible or self.background:
            return None
        return "edit_white" if self.white.plausible else "edit_black"

    def side(self, polarity: Polarity) -> Side:
        """Returns the edit region under a polarity."""
        return self.white if polarity == "edit_white" else self.black


@dataclass(frozen=True, kw_only=True)
class MaskRecord:
    """The reading of one row's mask, a line of ``data_masks.json``.

    Attributes:
        mask: the file.
        remark: what is odd about it, or "".
    """

    id: str
    where: str
    mask: str
    form: MaskForm
    polarity: Polarity
    edit_share: float
    remark: str

    def content(self) -> dict[str, Any]:
        """Returns the record as JSON."""
        return {**asdict(self), "edit_share": round(self.edit_share, 4)}


def evidence_of(
    foreground: Foreground,
    *,
    instruction: str,
    target: Polarity | None,
    regions: Polarity | None,
) -> Evidence:
    """Measures a mask. The pixels themselves are not kept."""
    return Evidence(
        form=foreground.form,
        white=_side(foreground.edit("edit_white")),
        black=_side(foreground.edit("edit_black")),
        zero_one=foreground.zero_one,
        labels=foreground.labels,
        agreement=foreground.agreement,
        bright=foreground.bright,
        doubt=foreground.doubt,
        target=target,
        regions=regions,
        background=_BACKGROUND.search(instruction) is not None,
    )


def shows_no_edit(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> bool:
    """True when a target is a copy of its source, up to what compression changes."""
    return float(_changed_pixels(source, target).mean()) <= _VISIBLE


def _changed_pixels(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.asarray(brightest(np.abs(source.astype(np.int16) - target)) > _CHANGED)


def changed_side(
    source: NDArray[np.uint8], target: NDArray[np.uint8], foreground: Foreground
) -> Polarity | None:
    """Finds the polarity under which a target changes the edit region.

    None where source and target differ nowhere, everywhere, or alike on both sides.
    """
    changed = _changed_pixels(source, target)
    if not _VISIBLE < changed.mean() < 0.7:
        return None
    shares = {
        polarity: float(changed[foreground.edit(polarity)].mean())
        for polarity in ("edit_white", "edit_black")
    }
    # A model that made the target moves pixels everywhere, so a ratio decides.
    if shares["edit_white"] > 3 * shares["edit_black"]:
        return "edit_white"
    return "edit_black" if shares["edit_black"] > 3 * shares["edit_white"] else None


def decide(evidence: Sequence[Evidence], polarity: MaskPolarity) -> list[Reading] | str:
    """Returns a reading of each mask, or the reason why none can be given.

    Masks of one form are read alike.

    Args:
        polarity: of the user; "auto" lets the rows decide.
    """
    decided: dict[MaskForm, Polarity] = {}
    for form in {item.form for item in evidence}:
        if polarity != "auto":
            decided[form] = polarity
            continue
        group = [item for item in evidence if item.form == form]
        vote = _vote(group, usual=None if form == "alpha" else "edit_white")
        if vote is None:
            return _undecided(group, form)
        decided[form] = vote
    return [_reading(item, decided[item.form]) for item in evidence]


def _reading(item: Evidence, polarity: Polarity) -> Reading:
    # White strokes on a transparent ground are an ordinary mask, read as it ever was.
    ordinary = item.form == "alpha" and item.bright and polarity == "edit_white"
    return Reading(form="luminance" if ordinary else item.form, polarity=polarity)


def _vote(group: Sequence[Evidence], usual: Polarity | None) -> Polarity | None:
    """Returns the polarity of masks of one form; None where the rows leave it open.

    Args:
        usual: the polarity that needs no proof. Transparency has none.
    """
    proofs = Counter(item.decisive for item in group if item.decisive)
    if proofs["edit_white"] != proofs["edit_black"]:
        return "edit_white" if proofs["edit_white"] > proofs["edit_black"] else "edit_black"
    shapes = Counter(item.geometric for item in group)
    if usual is not None:
        return usual if 2 * shapes["edit_black"] < len(group) and not proofs else None
    for polarity in ("edit_white", "edit_black"):
        if 2 * shapes[polarity] > len(group):
            return polarity
    return None


def _undecided(group: Sequence[Evidence], form: MaskForm) -> str:
    share = statistics.median(item.white.share for item in group)
    marked = MARKED[form, "edit_white"]
    return (
        f"the masks leave open which side may change: {marked} pixels cover {share:.0%} of the "
        f"image in the median of {len(group)}, and nothing else in the rows decides. Training on "
        f"the wrong side would change what should stay. Set data.mask_polarity=edit_white if "
        f"{marked} pixels may change, data.mask_polarity=edit_black if they should stay"
    )


def remark_of(item: Evidence, reading: Reading) -> str:
    """Says what is odd about a mask under its reading, or ""."""
    side = item.side(reading.polarity)
    if item.doubt:
        return item.doubt
    if item.target is not None and item.target != reading.polarity:
        return "the target changes pixels outside the edit region rather than inside"
    if item.decisive == reading.polarity or (item.background and side.share < 0.97):
        return ""
    if not side.plausible:
        return (
            f"the edit region covers {side.share:.0%} of the image and {side.edges:.0%} of its "
            "outermost pixels"
        )
    return ""


def _side(edit: Pixels) -> Side:
    edges = edge_values(edit)
    return Side(share=float(edit.mean()), edges=float(edges.mean()))


_VISIBLE = 0.0005
"""Share of changed pixels up to which a target shows no edit."""
