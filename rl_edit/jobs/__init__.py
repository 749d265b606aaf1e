"""Jobs for a Ray cluster: what one takes along, and nothing else.

:func:`packed` collects the files of a command; :meth:`Package.write` puts them into a folder that
Ray can upload. Nothing here imports Ray.
"""

from __future__ import annotations

from rl_edit.jobs.package import LIMIT_MIB, RAY_LIMIT_MIB, Package, packed

__all__ = ["LIMIT_MIB", "RAY_LIMIT_MIB", "Package", "packed"]
