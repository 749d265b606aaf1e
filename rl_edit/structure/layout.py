"""Places rooms and arrows: rooms in a column on their floors, arrows in lanes beside it.

Every importing room has a vertical lane. Its arrows leave the room, follow the lane and turn into
the imported rooms. Arrows that lead down use lanes on the right. An arrow that leads back up uses a
lane on the left, so that side is empty while the order holds.

All lengths are pixels, and y runs down.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rl_edit.structure.floors import Room, floor_of
from rl_edit.structure.imports import ImportGraph

MARGIN, HEADER, FOOTER = 20.0, 88.0, 66.0
FLOOR_LABEL = 34.0
BOX_WIDTH, MIN_BOX_HEIGHT = 250.0, 43.0
# Between the rooms of one floor, and between a floor's edge and its rooms.
ROOM_GAP, FLOOR_PADDING, FLOOR_GAP = 6.0, 5.0, 4.0
LANE, PORT = 20.0, 7.5
# The first lane keeps this distance from the boxes, so that tips have room.
LANE_OFFSET = 30.0
# Arrows arrive from the top of a box down, and its own leave below them. Its lane then begins below
# the arriving ones and crosses none of them.
FIRST_PORT, EXIT = 8.0, 8.0

Pair = tuple[Room, Room]


@dataclass(frozen=True, kw_only=True)
class Box:
    """Place of a room."""

    room: Room
    top: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Band:
    """Place of a floor."""

    floor: int
    top: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """Route of the imports of one room from another.

    Attributes:
        weight: number of imports.
        back_up: whether it leads up or stays on its floor.
        edge: x of the side of the boxes, where it begins and ends.
        lane: x of its vertical part.
        start, end: y of its beginning and of its tip.
    """

    importer: Room
    imported: Room
    weight: int
    back_up: bool
    edge: float
    lane: float
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Places of everything that is drawn.

    Attributes:
        left: x of the boxes.
        sources: rooms that have a lane on the right, from the top. Their order chooses colours.
    """

    bands: tuple[Band, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    sources: tuple[Room, ...]
    left: float
    width: float
    height: float


def lay_out(graph: ImportGraph) -> Layout:
    """Places rooms from the top down and routes arrows."""
    weights, up = graph.weights, graph.arrows_up
    down = tuple(pair for pair in weights if pair not in up)
    sources, climbers = _importers(graph, down), _importers(graph, up)
    # The two sides of a box number their arrivals separately.
    ports = _ports(graph, down, sources) | _ports(graph, up, climbers)
    bands, boxes = _place(graph, ports)
    # Without an arrow that leads up there is no room on the left to keep free.
    left = MARGIN + FLOOR_LABEL + (LANE_OFFSET + LANE * len(climbers) if climbers else 0)
    right = left + BOX_WIDTH
    # The highest importer has the outermost lane. A lower room then leaves without crossing it.
    lanes = {room: right + LANE_OFFSET + LANE * row for row, room in enumerate(reversed(sources))}
    lanes_up = {room: left - LANE_OFFSET - LANE * row for row, room in enumerate(climbers)}
    place = {box.room: box for box in boxes}
    arrows = tuple(
        Arrow(
            importer=importer,
            imported=imported,
            weight=weights[importer, imported],
            back_up=(importer, imported) in up,
            edge=left if (importer, imported) in up else right,
            lane=(lanes_up if (importer, imported) in up else lanes)[importer],
            start=place[importer].top + place[importer].height - EXIT,
            end=place[imported].top + FIRST_PORT + PORT * port,
        )
        for (importer, imported), port in ports.items()
    )
    return Layout(
        bands=bands,
        boxes=boxes,
        arrows=arrows,
        sources=sources,
        left=left,
        width=right + LANE_OFFSET + LANE * len(sources) + MARGIN,
        height=bands[-1].top + bands[-1].height + FOOTER,
    )


def _importers(graph: ImportGraph, pairs: tuple[Pair, ...]) -> tuple[Room, ...]:
    """Lists the rooms that begin an arrow, from the top."""
    return tuple(room for room in graph.rooms if any(importer == room for importer, _ in pairs))


def _ports(
    graph: ImportGraph, pairs: tuple[Pair, ...], importers: tuple[Room, ...]
) -> dict[Pair, int]:
    """Numbers the arrivals at each room, from its top.

    The innermost lane arrives first: where its lane ends, no other arrow has to cross it.
    """
    arrivals: Counter[Room] = Counter()
    ports: dict[Pair, int] = {}
    # Importers come from the top, and the lowest of them has the innermost lane.
    for importer in reversed(importers):
        for imported in graph.rooms:
            if (importer, imported) in pairs:
                ports[importer, imported] = arrivals[imported]
                arrivals[imported] += 1
    return ports


def _place(graph: ImportGraph, ports: dict[Pair, int]) -> tuple[tuple[Band, ...], tuple[Box, ...]]:
    """Stacks floors and rooms. A box is high enough for its name and for all that arrives."""
    bands: list[Band] = []
    boxes: list[Box] = []
    y = HEADER
    for floor in dict.fromkeys(floor_of(room) for room in graph.rooms):
        top = y
        y += FLOOR_PADDING
        for room in (room for room in graph.rooms if floor_of(room) == floor):
            arriving = [port for (_, imported), port in ports.items() if imported == room]
            needed = FIRST_PORT + PORT * (max(arriving, default=-1) + 1) + EXIT
            boxes.append(Box(room=room, top=y, height=max(MIN_BOX_HEIGHT, needed)))
            y += boxes[-1].height + ROOM_GAP
        # After the last room of a floor there is no gap but the padding.
        y += FLOOR_PADDING - ROOM_GAP
        bands.append(Band(floor=floor, top=top, height=y - top))
        y += FLOOR_GAP
    return tuple(bands), tuple(boxes)
