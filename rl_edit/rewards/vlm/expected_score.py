"""The expected score: what a judge would have said on average, from the probabilities of the tokens it did not say.

At each number of an answer, with the judge's own words before it, every whole number k of the scale has a probability p(k): that of the
token that spells it, or, where the tokenizer spells it in several, the product along them. The score is ``sum k p(k) / sum p(k)``.
Two parts of the probability are left out of both sums: tokens that are no number of the scale (or rarer than the alternatives the
transport lists), and a beginning the judge did not choose that could go on in several ways ("1" of 1, 10 .. 19), for what would have
followed it was never asked. What remains, ``sum p(k)``, is the mass; where it is small the score would be a guess and is refused.
A scale of 0..9 is one token a number everywhere, and nothing is left open.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rl_edit.rewards.vlm.backends import Token
from rl_edit.rewards.vlm.prompts import Unreadable

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Expected scores in the order of the said ones. ``mass``: the smallest share of probability that any of them rests on."""

    scores: tuple[float, ...]
    mass: float


def expected_scores(
    tokens: Sequence[Token], said: Sequence[float], *, top: int, min_mass: float
) -> Expected:
    """The expected value of each score that an answer says.

    Args:
        tokens: the answer, token by token, with alternatives.
        said: its scores, as read from the text.
    """
    spelled = "".join(token.text for token in tokens)
    # Digits within the reasoning are no scores. Blanks keep the offsets.
    bare = _STRING.sub(lambda string: " " * len(string[0]), spelled)
    places = [(number.start(), int(number[0])) for number in _NUMBER.finditer(bare)]
    if [number for _, number in places] != list(said):
        raise Unreadable(
            "the answer's tokens do not spell its scores as whole numbers, so no expectation can be formed"
        )
    scores, masses = [], []
    for place, _ in places:
        offset = index = 0
        while offset + len(tokens[index].text) <= place:
            offset += len(tokens[index].text)
            index += 1
        chances = _chances(tokens[index:], tokens[index].text[: place - offset], "", top)
        mass = sum(chances.values())
        if mass < min_mass:
            raise Unreadable(
                f"only {mass:.2f} of the probability is on known numbers of 0..{top}, below {min_mass:g}"
            )
        scores.append(sum(number * chance for number, chance in chances.items()) / mass)
        masses.append(mass)
    return Expected(scores=tuple(scores), mass=min(masses, default=1.0))


def _chances(tokens: Sequence[Token], lead: str, digits: str, top: int) -> dict[int, float]:
    """Probability of each number that begins with ``digits``, given them, at the first token.

    Args:
        lead: what the token holds before its first digit, such as a bracket.
    """
    chances: dict[int, float] = defaultdict(float)
    here = tokens[0]
    for text, logprob in here.alternatives:
        if not text.startswith(lead):
            continue
        chance, rest = math.exp(logprob), text[len(lead) :]
        begun = _NUMBER.match(rest)
        whole = digits + (begun[0] if begun else "")
        if not whole or int(whole) > top or whole != str(int(whole)):
            continue
        ended = begun is None or len(begun[0]) < len(rest)
        if ended or whole == "0" or 10 * int(whole) > top:
            chances[int(whole)] += chance
        elif text == here.text and len(tokens) > 1:
            for number, further in _chances(tokens[1:], "", whole, top).items():
                chances[number] += chance * further
    return chances
