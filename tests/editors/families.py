"""The families that the conformance suite checks; a new family is one line here."""

from __future__ import annotations

import flux2_family
import klein_family
import kontext_family
import omnigen2_family
import qwen_family
from conformance import Family

FAMILIES: tuple[Family, ...] = (
    kontext_family.FAMILY,
    flux2_family.FAMILY,
    klein_family.FAMILY,
    omnigen2_family.FAMILY,
    qwen_family.EDIT,
    qwen_family.PLUS,
)
