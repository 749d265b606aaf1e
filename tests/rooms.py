"""The rooms of the house: the modules of the mathematics in their order, and the order of all rooms."""

MATHEMATICS = (
    "types",
    "messages",
    "method.plugins",
    "method.flow",
    "method.regions",
    "method.exploration",
    "method.attention",
    "method.advantages",
    "method.objectives",
    "method.algorithms",
    "method.rollout",
    "method.update",
)
"""Each may import what stands above it."""

LAYERS = (
    ("rl_edit.errors", "rl_edit.provenance", "rl_edit.files", "rl_edit.types", "rl_edit.messages"),
    ("rl_edit.method",),
    ("rl_edit.measures",),
    ("rl_edit.data",),
    ("rl_edit.editors",),
    ("rl_edit.wire",),
    ("rl_edit.rewards",),
    ("rl_edit.config", "rl_edit.presets"),
    ("rl_edit.evaluation",),
    ("rl_edit.report",),
    ("rl_edit.audit",),
    ("actors", "learner"),
    ("learner.controller",),
    ("rl_edit.training",),
    ("rl_edit.cli",),
    ("rl_edit.__main__",),
)
"""From the bottom up. A room may import its own layer's lower floors, never a floor above it; rooms of one floor do not
import each other, except on the lowest floor."""


def layer_of(module: str) -> int | None:
    """The floor of a dotted module name, the most particular room first; None outside the product."""
    rooms = sorted(
        ((room, floor) for floor, rooms in enumerate(LAYERS) for room in rooms),
        key=lambda r: -len(r[0]),
    )
    return next(
        (floor for room, floor in rooms if module == room or module.startswith(room + ".")), None
    )


def room_of(module: str) -> str | None:
    """The room a dotted module name lies in."""
    rooms = sorted((room for floor in LAYERS for room in floor), key=len, reverse=True)
    return next((room for room in rooms if module == room or module.startswith(room + ".")), None)
