"""Learns from refusals what a server does not take, once for each server.

A refusal of a part of the request that an answer can do without is learnt: the part is left out, or
sent in another way, from then on. Whatever may change the meaning of a score is said in a note. A
refusal of anything else stays an error.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rl_edit.rewards.vlm.backends.completion import ServerError
from rl_edit.rewards.vlm.backends.transport import shortened

SYSTEM_ROLE = "system"
"""The name in ``transport.omit`` that puts the system text before the question."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Lists parts of a request that a server does not take.

    Attributes:
        omitted: parts of the request that are left out.
        max_completion_tokens: whether ``max_tokens`` has this name there.
        max_images: images per request; more are joined. None where no limit is known.
        notes: a sentence for each limit that was learnt.
    """

    omitted: frozenset[str] = frozenset()
    max_completion_tokens: bool = False
    max_images: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Server:
    """One model of one server, under the limits that its settings declare."""

    base_url: str
    model: str
    declared: Limits


LEARNT: dict[Server, Limits] = {}
"""The limits of every server that this process has asked."""
_WRITING = threading.Lock()

# A message may name a part in several spellings.
_PARTS: dict[str, str] = {
    "seed": r"\bseed\b",
    "top_k": r"\btop[_ -]?k\b",
    "response_format": (
        r"response[_ ]?format|json_schema|guided[_ ]json|guided decoding|structured[_ ]outputs?"
    ),
    "top_p": r"\btop[_ -]?p\b",
    "temperature": r"\btemperature\b",
}
_CONSEQUENCES: dict[str, str] = {
    "seed": "the same question gets another answer each time, so scores have noise that no seed "
    "repeats; measure it with 'rl-edit judge test' or repeat_every",
    "top_k": "the server's own value samples the answers",
    "response_format": "the server does not hold answers to their form, and those in another form "
    "give no score",
    "top_p": "the server's own value samples the answers",
    "temperature": "the server's own temperature samples the answers, which may make scores "
    "noisier",
}
# The part itself is refused, and not its value.
_REFUSES = re.compile(
    r"unsupported|not support|n[o']t supported|unknown|unrecogni[sz]ed|unexpected|not permitted"
    r"|extra (field|input)|extra_forbidden|not allowed|cannot find field|no such|only the default"
    r"|not (yet )?(implemented|available|enabled)|invalid (parameter|argument|field)|disabled"
    r"|deprecated|cannot (both )?be (specified|set|used)|requires .* to be (installed|enabled)",
    re.IGNORECASE,
)
# What follows lists what to use instead, which is not refused.
_ALTERNATIVES = re.compile(
    r"\b((supported|allowed|valid|permitted|known) (parameters|fields|arguments|values)"
    r"|expected one of|instead|use )\b",
    re.IGNORECASE,
)
# Here a refused value, such as json_schema, is as good as a refused part.
_OTHER_FORMAT = re.compile(
    r"(response_format|json_schema).*(invalid|must be|only|unavailable)"
    r"|(invalid|unavailable|only).*(response_format|json_schema)",
    re.IGNORECASE | re.DOTALL,
)
_TOO_LARGE = re.compile(
    r"too large|context length|maximum context|exceed|less than|at most", re.IGNORECASE
)
_SYSTEM = re.compile(
    r"\bsystem\b.*\b(role|message|prompt|instruction)|\b(role|message)\w*\b.*\bsystem\b"
    r"|roles must alternate|developer instruction is not enabled",
    re.IGNORECASE | re.DOTALL,
)
_NO_IMAGES = re.compile(
    r"at most 0 image|not (a )?multi-?modal"
    r"|(does not|doesn't|not) support (image|vision|multi-?modal)"
    # Where several are refused, one may be taken.
    r"|(?<!multiple )(image|vision)[\w ]* (is|are) not supported"
    r"|no (endpoints|models?) .*support image"
    r"|image_url.*(not supported|expected|only)|only supports? text",
    re.IGNORECASE,
)
_FEW_IMAGES = re.compile(
    r"at most \d+ image|(maximum|limit|max|up to)[\w ]* \d+ images?|number of images"
    r"|only (supports? |accepts? |takes? )?(one|1|a single) image|images? per (prompt|request)"
    r"|only (provide|send|include|attach|use) (one|1|a single) image|single image only"
    r"|multiple images|multi-image|more than (one|1) image|too many images",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?:at most|limit|maximum|max|up to)[a-z ]*:? ?(\d+)", re.IGNORECASE)


def limits_of(server: Server) -> Limits:
    """Returns what is known of a server."""
    return LEARNT.get(server, server.declared)


def learn(
    server: Server, used: Limits, error: ServerError, body: Mapping[str, Any], num_images: int
) -> Limits | None:
    """Returns the limits to ask again under; None when the refusal stands.

    Args:
        used: the limits that the refused request was made under.
        body: the refused request.
        num_images: of the question, before any were joined.
    """
    with _WRITING:
        known = limits_of(server)
        # Another request of the same moment has been refused for the same reason.
        if known != used:
            return known
        learnt = _next(known, error, body, num_images)
        if learnt is not None:
            LEARNT[server] = learnt
        return learnt


def takes_no_images(message: str) -> bool:
    """Checks whether the model of a server sees no images."""
    return _NO_IMAGES.search(message) is not None


def _next(
    known: Limits, error: ServerError, body: Mapping[str, Any], num_images: int
) -> Limits | None:
    message = error.message
    if takes_no_images(message):
        return None
    if "max_tokens" in body and not known.max_completion_tokens and _renames(error):
        note = "max_tokens is sent as max_completion_tokens" + _because(message)
        return replace(known, max_completion_tokens=True, notes=(*known.notes, note))
    if _FEW_IMAGES.search(message):
        return _with_fewer_images(known, message, num_images)
    if body["messages"][0]["role"] == "system" and _SYSTEM.search(message):
        note = "the system text stands before the question" + _because(message)
        omitted = known.omitted | {SYSTEM_ROLE}
        return replace(known, omitted=omitted, notes=(*known.notes, note))
    name = _refused_part(error, body)
    # Left out already: the user's extra_body sends it.
    if name is None or name in known.omitted:
        return None
    note = f"{name} is left out{_because(message)}: {_CONSEQUENCES[name]}"
    return replace(known, omitted=known.omitted | {name}, notes=(*known.notes, note))


def _renames(error: ServerError) -> bool:
    """Checks whether ``max_tokens`` is refused as a name, and not for its value."""
    named = error.parameter == "max_tokens" and _REFUSES.search(error.message)
    suggested = "max_completion_tokens" in error.message
    return bool(named or suggested) and not _TOO_LARGE.search(error.message)


def _with_fewer_images(known: Limits, message: str, num_images: int) -> Limits | None:
    stated = _NUMBER.search(message)
    number = int(stated[1]) if stated else 1
    if number >= num_images:
        number = 1
    # A single image was refused, or the limit is known already: joining does not help.
    if num_images <= 1 or number < 1 or (known.max_images or num_images) <= number:
        return None
    note = (
        f"images are joined side by side into one where a question has more than {number}"
        f"{_because(message)}: a joined image may be shrunk by the server, so compare its scores "
        "only with others of this judge"
    )
    return replace(known, max_images=number, notes=(*known.notes, note))


def _refused_part(error: ServerError, body: Mapping[str, Any]) -> str | None:
    """Returns the part of a request that the server refuses; None when it names none."""
    message = error.message
    if "response_format" in body and _OTHER_FORMAT.search(message):
        return "response_format"
    if not _REFUSES.search(message):
        return None
    if error.parameter in _PARTS and error.parameter in body:
        return error.parameter
    refused = _ALTERNATIVES.split(message, maxsplit=1)[0]
    named = {
        name: place.start()
        for name, spelling in _PARTS.items()
        if name in body and (place := re.search(spelling, refused, re.IGNORECASE))
    }
    # Where two cannot stand together, the one that matters less comes first in _PARTS.
    return min(named, key=lambda name: list(_PARTS).index(name)) if named else None


def _because(message: str) -> str:
    return f" (the server says: {shortened(message)})"
