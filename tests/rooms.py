"""The modules of the mathematics: what the walls order, and whose shapes are checked in tests."""

MATHEMATICS = (
    "types",
    "plugged",
    "flow",
    "regions",
    "exploration",
    "attention",
    "automask",
    "advantages",
    "objectives",
    "algorithms",
    "rollout",
    "update",
)
"""In this order: each may import what stands to its left."""
