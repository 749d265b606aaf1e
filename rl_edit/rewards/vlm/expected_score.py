"""Computes expected scores: the mean of all answers a judge could have given, by probability.

At each number of an answer, with the judge's own words before it, every whole number k of the scale
has a probability p(k). It is that of the token that spells k, or the product along the tokens where
the tokenizer needs several. The score is ``sum k p(k) / sum p(k)``.

Two parts of the probability are left out of both sums. One is tokens that are no number of the
scale, or are rarer than the alternatives the transport lists. The other is a beginning that the
judge did not choose and that could go on in several ways ("1" of 1, 10 .. 19): its continuations
are unknown. The remainder, ``sum p(k)``, is the mass. Where it is small the score would be a guess
and is refused. A scale of 0..9 is one token per number everywhere, and nothing is left open.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl_edit.rewards.vlm.answers import Unreadable, answer_in
from rl_edit.rewards.vlm.backends import Token

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Expected scores, in the order in which the answer states them.

    Attributes:
        mass: the smallest share of probability that any of them rests on.
    """

    scores: tuple[float, ...]
    mass: float


def expected_scores(
    tokens: Sequence[Token],
    stated: Sequence[float],
    *,
    schema: dict[str, Any],
    top: int,
    min_mass: float,
) -> Expected:
    """Computes the expected value of each score that an answer states.

    Args:
        tokens: the answer, token by token, with alternatives; thinking before it is read past.
        stated: its scores, as read from the text.
        schema: form of the answer.
        top: of the scale 0..top.
        min_mass: share of probability that every score must rest on.

    Raises:
        Unreadable: the tokens do not spell the scores, or the mass is too small.
    """
    places = _places("".join(token.text for token in tokens), stated, schema)
    scores, masses = [], []
    for place in places:
        # The token in which the number begins; it may hold other characters before.
        offset = index = 0
        while offset + len(tokens[index].text) <= place:
            offset += len(tokens[index].text)
            index += 1
        chances = _chances(tokens[index:], tokens[index].text[: place - offset], "", top)
        mass = sum(chances.values())
        if mass < min_mass:
            raise Unreadable(
                f"only {mass:.2f} of the probability is on known numbers of 0..{top}, below "
                f"{min_mass:g}"
            )
        # E[k | k is known] = sum k p(k) / sum p(k).
        scores.append(sum(number * chance for number, chance in chances.items()) / mass)
        masses.append(mass)
    return Expected(scores=tuple(scores), mass=min(masses, default=1.0))


def _places(spelled: str, stated: Sequence[float], schema: dict[str, Any]) -> list[int]:
    """Returns the offset of each score in the text that the tokens spell."""
    try:
        answer = answer_in(spelled, schema)
    except Unreadable:
        numbers = []
    else:
        # Digits within the reasoning are no scores. Blanks keep the offsets.
        inside = _STRING.sub(lambda text: " " * len(text[0]), spelled[answer.start : answer.end])
        numbers = [(number.start(), int(number[0])) for number in _NUMBER.finditer(inside)]
    if not numbers or [number for _, number in numbers] != list(stated):
        raise Unreadable(
            "the answer's tokens do not spell its scores as whole numbers, so no expectation can "
            "be formed"
        )
    return [answer.start + place for place, _ in numbers]


def _chances(tokens: Sequence[Token], lead: str, digits: str, top: int) -> dict[int, float]:
    """Computes p(k) of each number k that begins with ``digits``, given them.

    Args:
        tokens: from the one that continues the number.
        lead: characters of the token before its first digit, such as a bracket.
    """
    chances: dict[int, float] = defaultdict(float)
    here = tokens[0]
    for text, logprob in here.alternatives:
        if not text.startswith(lead):
            continue
        chance, rest = math.exp(logprob), text[len(lead) :]
        begun = _NUMBER.match(rest)
        number = digits + (begun[0] if begun else "")
        # "07" is no number of the scale, and one above the top is none either.
        if not number or int(number) > top or number != str(int(number)):
            continue
        ended = begun is None or len(begun[0]) < len(rest)
        # No further digit can follow: a character does, or ten times the number is off the scale.
        if ended or number == "0" or 10 * int(number) > top:
            chances[int(number)] += chance
        # Only along the judge's own words are the following tokens known.
        elif text == here.text and len(tokens) > 1:
            for longer, further in _chances(tokens[1:], "", number, top).items():
                chances[longer] += chance * further
    return chances
