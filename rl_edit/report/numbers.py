"""Numbers as text, for pages and tables."""

from __future__ import annotations


def format_number(value: float, digits: int | None = None) -> str:
    """Writes a number with ``digits`` decimals, or about four significant ones.

    The minus sign is a real one (U+2212), and a value that rounds to zero has none.
    """
    # Without given decimals: four significant digits, whole numbers from 10,000 on, and powers of
    # ten where either would be long.
    if digits is not None:
        text = f"{value:.{digits}f}"
    elif value == 0.0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    else:
        text = f"{value:.2e}"
    # "-0.00" would claim a direction that the shown digits do not have.
    if float(text) == 0.0:
        text = text.removeprefix("-")
    return text.replace("-", "\u2212", 1) if text.startswith("-") else text


def format_signed(value: float, digits: int) -> str:
    """Writes a number with its sign always shown; a value that rounds to zero has none."""
    text = format_number(value, digits)
    return f"+{text}" if value > 0 and float(text) != 0.0 else text
