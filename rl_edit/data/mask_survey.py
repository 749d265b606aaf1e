"""Surveys the masks of a dataset: one reading each, what is said about them, what is refused."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rl_edit.data.mask_evidence import (
    MARKED,
    MIN_AGREEMENT,
    Evidence,
    MaskRecord,
    decide,
    remark_of,
)
from rl_edit.data.masks import MaskForm, MaskFrom, MaskPolarity, Reading
from rl_edit.data.notices import NUM_EXAMPLES, Notice
from rl_edit.errors import InputError

EQUAL_MASKS = 64
"""So many rows with one and the same edit share are no coincidence."""

FORMS: dict[MaskForm, str] = {
    "luminance": "black and white",
    "alpha": "transparency",
    "labels": "label maps, in which every value but 0 is marked",
    "painted": "paint on a copy of the image",
}


class MaskedRow(Protocol):
    """A row, as far as its mask goes."""

    @property
    def task_id(self) -> str: ...

    @property
    def where(self) -> str: ...

    @property
    def mask(self) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The masks of a dataset.

    Attributes:
        readings: one for each row, in order.
        records: the same for people, with the edit share.
        notices: what is to be said before training.
    """

    readings: tuple[Reading, ...]
    records: tuple[MaskRecord, ...]
    notices: tuple[Notice, ...]


def survey(
    rows: Sequence[MaskedRow],
    evidence: Sequence[Evidence],
    *,
    source: str,
    polarity: MaskPolarity,
    mask_from: MaskFrom,
) -> Survey:
    """Decides the reading of every mask.

    Args:
        source: the dataset as the user named it.

    Raises:
        InputError: most masks contradict the usual reading, or are no masks, and the user named
            no reading.
    """
    doubtful = [item.doubt for item in evidence if item.doubt]
    if 2 * len(doubtful) > len(evidence) and mask_from == "auto":
        raise InputError(
            f"{source}: {len(doubtful)} of {len(evidence)} masks do not look like masks: the first "
            f"such is {doubtful[0]}. Draw the region in white on black, or name the form with "
            "data.mask_from if it is one after all."
        )
    readings = decide(evidence, polarity)
    if isinstance(readings, str):
        listed = _listed(rows, [f"{item.white.share:.0%}" for item in evidence])
        raise InputError(
            f"{source}: {readings}. Share per row: {listed}. To see them on their images: rl-edit "
            f"dataset check {shlex.quote(source)} data.mask_polarity=edit_white --out sheets"
        )
    records = tuple(
        MaskRecord(
            id=row.task_id,
            where=row.where,
            mask=str(row.mask),
            form=reading.form,
            polarity=reading.polarity,
            edit_share=item.side(reading.polarity).share,
            remark=remark_of(item, reading),
        )
        for row, item, reading in zip(rows, evidence, readings, strict=True)
    )
    named = _Named(polarity=polarity != "auto", form=mask_from != "auto")
    notices = [
        *_about_forms(records, named),
        *_about_shares(records),
        *_about_values(records, evidence),
    ]
    return Survey(readings=tuple(readings), records=records, notices=tuple(notices))


@dataclass(frozen=True, kw_only=True)
class _Named:
    """Settings that the user named, which need no notice."""

    polarity: bool
    form: bool


def _about_forms(records: Sequence[MaskRecord], named: _Named) -> list[Notice]:
    """Says which form was recognised, unless the user named it."""
    notices: list[Notice] = []
    counts = Counter(record.form for record in records)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        forms = " and ".join(f"{count} of {form}" for form, count in counts.most_common())
        message = (
            f"The masks differ in form ({forms}), and each is read in its own. One among many is "
            "often a mistake: look at masks.png, or set data.mask_from to the form of all."
        )
        others = [record for record in records if record.form != usual]
        notices.append(_notice("mask-forms-differ", others, message))
    for form in counts:
        group = [record for record in records if record.form == form]
        polarity = group[0].polarity
        # White on black with white to edit is what everyone expects.
        turned = polarity == "edit_black" and not named.polarity
        recognised = form != "luminance" and not named.form
        if turned or recognised:
            message = (
                f"{len(group)} masks are read as {FORMS[form]}: {MARKED[form, polarity]} pixels "
                f"may change. If that is right, set data.mask_from={form} "
                f"data.mask_polarity={polarity}; if not, the other data.mask_polarity."
            )
            notices.append(_notice("mask-form", group, message))
    return notices


def _about_shares(records: Sequence[MaskRecord]) -> list[Notice]:
    """Says which edit regions are implausible, and where all are equal."""
    notices: list[Notice] = []
    shares = [record.edit_share for record in records]
    if odd := [record for record in records if record.remark]:
        other = "edit_black" if odd[0].polarity == "edit_white" else "edit_white"
        remedy = (
            f"Most are, so the polarity may be wrong: then set data.mask_polarity={other}."
            if 2 * len(odd) > len(records)
            else "Look at them in masks.png and draw them again where they are the wrong way round."
        )
        message = (
            f"{len(odd)} of {len(records)} masks are unusual (the edit region covers "
            f"{statistics.median(shares):.0%} in the median). Of the first, {odd[0].remark}. "
            f"{remedy}"
        )
        notices.append(_notice("mask-share", odd, message))
    if len(set(shares)) == 1 and len(records) >= EQUAL_MASKS:
        message = (
            f"All {len(records)} masks cover the same {shares[0]:.1%} of their images, as a "
            "template does and drawn regions do not. Check that they belong to these images."
        )
        notices.append(_notice("equal-masks", records, message))
    return notices


def _about_values(records: Sequence[MaskRecord], evidence: Sequence[Evidence]) -> list[Notice]:
    """Says which masks hold other values than black and white."""
    pairs = list(zip(records, evidence, strict=True))
    notices: list[Notice] = []
    # Such masks look black in a viewer, so the user may take them for empty.
    if zero_one := [record for record, item in pairs if item.zero_one]:
        one = "edit" if zero_one[0].polarity == "edit_white" else "keep"
        message = (
            f"{len(zero_one)} masks hold only the values 0 and 1; 1 is read as {one}. Save masks "
            "as black and white to be sure."
        )
        notices.append(_notice("zero-one-masks", zero_one, message))
    if soft := [record for record, item in pairs if item.agreement < MIN_AGREEMENT]:
        message = (
            f"{len(soft)} masks have wide soft edges and are split at half: another threshold "
            "would give another region. Save them as black and white where the edge matters."
        )
        notices.append(_notice("soft-masks", soft, message))
    if several := [record for record, item in pairs if len(item.labels) > 2]:
        message = (
            f"{len(several)} masks hold several labels, and all but 0 are read as one region to "
            "edit. Save masks with only the label to edit if that is too much."
        )
        notices.append(_notice("label-maps", several, message))
    return notices


def _notice(kind: str, rows: Sequence[MaskRecord], message: str) -> Notice:
    """Makes a notice whose examples are masks with their edit share."""
    examples = tuple(f"{row.mask} {row.edit_share:.0%}" for row in rows[:NUM_EXAMPLES])
    return Notice(kind=kind, count=len(rows), message=message, examples=examples)


def _listed(rows: Sequence[MaskedRow], shares: Sequence[str], limit: int = 8) -> str:
    pairs = [f"{row.task_id} {share}" for row, share in zip(rows, shares, strict=True)]
    more = f" and {len(pairs) - limit} more" if len(pairs) > limit else ""
    return ", ".join(pairs[:limit]) + more
