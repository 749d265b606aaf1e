"""Says from what terms declare whether a run's rewards ask for the edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rl_edit.rewards import Reward
from rl_edit.rewards.composite import Composite

REMEDY = (
    "Add a reward that looks at the requested edit: editscore or region_judge, or clip where the "
    "data has captions, or give the data targets"
)


def asks_for_edit(term: Reward) -> bool | None:
    """Tests whether a term rewards the requested edit; None where only its user knows."""
    # A composite is about what it wraps, although a corrupted background cannot lower it.
    scoring = term.of if isinstance(term, Composite) else term
    if scoring.responds_to is not None:
        return scoring.responds_to != "outside"
    return False if scoring.needs_attention else None


def unrewarded(terms: Sequence[Reward], left_out: Mapping[str, str]) -> str:
    """Says why no weighted term asks for the edit; "" where one does, or may do.

    Args:
        terms: those that the data can feed.
        left_out: the reason for each term that it cannot.
    """
    weighted = [term for term in terms if term.weight > 0]
    if any(asks_for_edit(term) is not False for term in weighted):
        return ""
    names = ", ".join(term.name for term in weighted)
    missing = "; ".join(f"{name} is left out: {why}" for name, why in left_out.items())
    return (
        f"nothing in this run's rewards asks for the edit: {names} "
        f"{'score' if len(weighted) > 1 else 'scores'} what should stay, or where the editor looks "
        f"({missing or 'no other reward has a weight'}). An editor that changes nothing would get "
        "the highest reward"
    )
