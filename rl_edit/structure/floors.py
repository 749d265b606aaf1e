"""Lists the rooms of the project on their floors. An import may only lead down.

A new module goes into the lowest room that can hold it. A new room is a line in ``FLOORS``.
"""

from __future__ import annotations

from dataclasses import dataclass

MATHEMATICS = (
    "scores",
    "types",
    "messages",
    "method.plugins",
    "method.flow",
    "method.regions",
    "method.exploration",
    "method.step_noise",
    "method.attention",
    "method.advantages",
    "method.objectives",
    "method.algorithms",
    "method.rollout",
    "method.update",
)
"""Modules of the mathematics, without ``rl_edit.``. Each may import those before it."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """Modules that may import each other.

    Attributes:
        name: as a path, for people.
        holds: the contents in a few words, short enough to stand in a box of the drawing.
        modules: dotted names. Everything below a name belongs to the room too, unless another room
            names it more precisely.

    Example:
        ``Room(name="rl_edit/data", holds="loaders, canvas", modules=("rl_edit.data",))``
    """

    name: str
    holds: str
    modules: tuple[str, ...]


def _room(name: str, holds: str) -> Room:
    # A path and a dotted name differ by their separators only.
    return Room(name=name, holds=holds, modules=(name.removesuffix(".py").replace("/", "."),))


FLOORS: tuple[tuple[Room, ...], ...] = (
    (
        Room(
            name="rl_edit/cli",
            holds="commands, options, messages",
            modules=("rl_edit.cli", "rl_edit.__main__"),
        ),
    ),
    (
        Room(
            name="rl_edit/training.py",
            holds="the life of a run directory",
            modules=("rl_edit.training", "rl_edit.run_end", "rl_edit.last_resort"),
        ),
    ),
    (
        Room(
            name="preparation",
            holds="checks before a run starts",
            modules=("rl_edit.preparation", "rl_edit.readiness", "rl_edit.device_settings"),
        ),
    ),
    (_room("learner/controller", "loop, ledger, checkpoints"),),
    (_room("actors", "rollout, rewards, executors"), _room("learner", "policy, optimizer, ranks")),
    (_room("rl_edit/audit", "audits of rewards"),),
    (
        _room("rl_edit/report", "pages and charts"),
        _room("rl_edit/structure", "this drawing"),
        _room("rl_edit/jobs", "what a job takes along"),
    ),
    (_room("rl_edit/evaluation", "base against trained"),),
    (_room("rl_edit/config", "the run as one value"),),
    (_room("rl_edit/rewards", "terms, judges, backends"),),
    (_room("rl_edit/wire.py", "records as bytes"),),
    (_room("rl_edit/editors", "families of editors, LoRA"),),
    (_room("rl_edit/data", "loaders, canvas, built-in scenes"),),
    (_room("rl_edit/measures", "pixels, attention, statistics"),),
    (_room("rl_edit/method", "the mathematics"),),
    (_room("rl_edit/messages.py", "controller to workers and back"),),
    (_room("rl_edit/types.py", "the chain of records"),),
    (_room("rl_edit/scores.py", "scores by region, measures"),),
    (
        Room(
            name="foundation",
            holds="errors, files, provenance",
            modules=(
                "rl_edit.errors",
                "rl_edit.files",
                "rl_edit.lease_holder",
                "rl_edit.provenance",
                "rl_edit.run_directory",
                "rl_edit.run_record",
            ),
        ),
    ),
)
"""From the top, the command line, down. Rooms of one floor do not import each other."""


def room_of(module: str) -> Room | None:
    """Finds the room of a dotted module name; None outside the project and for its root."""
    rooms = [(name, room) for floor in FLOORS for room in floor for name in room.modules]
    matches = [(name, room) for name, room in rooms if _lies_in(module, name)]
    # ``learner.controller.loop`` lies in ``learner`` too: the longest name is the most precise.
    return max(matches, key=lambda match: len(match[0]), default=(None, None))[1]


def floor_of(room: Room) -> int:
    """Counts floors from the bottom, which is 0."""
    return next(number for number, floor in enumerate(reversed(FLOORS)) if room in floor)


def runs_back_up(importer: Room, imported: Room) -> bool:
    """Tests for an import that does not lead down.

    An import of another room of the same floor counts as leading up.
    """
    # Within a room any order goes: its files are read together.
    return importer != imported and floor_of(imported) >= floor_of(importer)


def _lies_in(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")
