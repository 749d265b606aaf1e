"""Rewards: what a finished edit is worth, term by term.

A term turns ``Candidates`` into one ``Score`` each. ``score_candidates`` runs the terms of a run
and checks every value. The built-in kinds are listed in ``kinds.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import Field

from rl_edit.errors import InputError
from rl_edit.method.plugins import Plugin
from rl_edit.rewards.composite import Composite
from rl_edit.rewards.kinds import Term
from rl_edit.rewards.scoring import require_distinct_names, score_candidates
from rl_edit.rewards.term import RewardTerm

__all__ = ["Reward", "RewardTerm", "available", "score_candidates"]

Reward = Annotated[Term | Composite, Field(discriminator="kind"), Plugin("rewards", RewardTerm)]
"""Seam: a term of a run's reward. A class of yours is one, named ``module:Class`` as ``kind``."""


def available(
    terms: Sequence[Reward], fields: Collection[str]
) -> tuple[tuple[Reward, ...], dict[str, str]]:
    """Selects the terms that a dataset can feed.

    Args:
        fields: the optional fields of its tasks: "target", "caption", "regions".

    Returns:
        The usable terms, and the reason for each term that is left out, by name.

    Raises:
        InputError: a field is missing and its term does not say ``when: if_available``; no term is
            left, or none that has a weight.
    """
    require_distinct_names(terms)
    usable: list[Reward] = []
    left_out: dict[str, str] = {}
    for term in terms:
        missing = " and ".join(sorted(term.requires - set(fields)))
        if not missing:
            usable.append(term)
        elif term.when == "if_available":
            left_out[term.name] = f"the data has no {missing}"
        else:
            raise InputError(
                f"Reward {term.name!r} needs the field {missing} of every task and the data does "
                f"not have it, so nothing could be scored. Add {missing} to the data, set 'when: "
                "if_available' on this reward, or remove it."
            )
    if not usable:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise InputError(
            f"No reward is left for this data ({reasons or 'none is configured'}), so there is "
            "nothing to learn from. Add one, such as preservation."
        )
    # What is only measured gives no advantage: the run would train nothing and end well.
    if all(term.weight == 0 for term in usable):
        names = ", ".join(term.name for term in usable)
        raise InputError(
            f"Every usable reward ({names}) has weight 0, so every advantage would be zero. Give "
            "at least one a positive weight."
        )
    return tuple(usable), left_out
