"""Edit regions of rows without a mask: the base editor's edits, and agreement with true masks.

:func:`observe` runs the base editor; :mod:`rl_edit.data.mask_finding` makes regions of what it
shows; :func:`summarise` measures how far they agree with masks that people drew. ``rl-edit
find-masks`` does all of it and writes a dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rl_edit.data.canvas import task_without_mask
from rl_edit.data.mask_finding import Agreement, FoundRegions, NotFound
from rl_edit.data.rows import Request, Row
from rl_edit.editors import Editor
from rl_edit.evaluation.record import interval_json
from rl_edit.measures.intervals import bootstrap
from rl_edit.method.attention import MassTally
from rl_edit.method.exploration import NoiseSource
from rl_edit.method.rollout import denoise
from rl_edit.types import EditTask

MEASURES = ("iou", "precision", "recall", "same_number")
"""Fields of :class:`~rl_edit.data.mask_finding.Agreement`."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The base editor's edits of one request, on the canvas.

    Attributes:
        change: mean over edits and channels of ``|edit - source|``, intensities 0..1.
        attention: text-to-image mass by token, mean over edits.
        edit: the first edit.
    """

    change: Float[Tensor, "height width"]
    attention: Float[Tensor, "rows columns"]
    edit: UInt8[Tensor, "height width 3"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one row.

    Attributes:
        regions: their number.
        refusal: why there are none; None where there are some.
        agreement: None unless both masks exist.
    """

    request: Request
    regions: int
    refusal: NotFound | None
    agreement: Agreement | None

    def record(self) -> dict[str, Any]:
        """Returns the outcome as it stands in ``agreement.json``."""
        refusal, measured = self.refusal, self.agreement
        return {
            "task_id": self.request.task_id,
            "task_type": self.request.task_type,
            "regions": self.regions,
            **({"kind": refusal.kind, "reason": refusal.reason} if refusal else {}),
            **(asdict(measured) if measured else {}),
        }


@torch.no_grad()
def observe(
    editor: Editor, task: EditTask, *, samples: int, num_steps: int, seed: int
) -> Observation:
    """Edits a task from several noises by the deterministic ODE; averages change and attention."""
    conditioning = editor.encode(task)
    noise, shape = NoiseSource(seed, task.task_id, 0), editor.latent_shape(conditioning)
    # Noises are keyed by seed, task and sample: one row's edits do not depend on the others.
    initial = torch.stack([noise.normal("find masks", sample, shape) for sample in range(samples)])
    tally = MassTally()
    final = denoise(
        lambda x, s: editor.velocity(x, s, conditioning, tally),
        initial,
        editor.sigmas(num_steps, conditioning),
    ).final
    images = editor.decode(final, conditioning)
    return Observation(
        # |edit - source| in 0..1, mean over edits and channels.
        change=(images.float() - task.source.float()).abs().mean(dim=(0, 3)) / 255,
        attention=tally.mean().mean(dim=0).reshape(conditioning.grid),
        edit=images[0],
    )


def task_on_canvas(
    request: Request, source: UInt8[Tensor, "height width 3"], editor: Editor
) -> EditTask:
    """Makes a task of a request that has no mask, fitted to the editor's canvas."""
    return task_without_mask(
        source,
        request.instruction,
        task_id=request.task_id,
        task_type=request.task_type,
        resolution=editor.config.resolution,
        multiple=editor.pixels_per_token,
    )


def regions_at_size(
    result: FoundRegions | NotFound, height: int, width: int
) -> Bool[Tensor, "region height width"]:
    """Returns regions in pixels of the image itself; none where the finder refused."""
    if isinstance(result, NotFound):
        return torch.zeros(0, height, width, dtype=torch.bool)
    # Nearest, so that disjoint regions stay disjoint.
    resized = F.interpolate(result.regions[None].float(), (height, width), mode="nearest")
    return resized[0].bool()


def summarise(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Measures agreement over all rows ("all") and by task type; empty without true masks.

    Each measure has its mean and 95 % bootstrap interval. Rows without a found mask have no
    agreement; their number stands beside it (``not_found``). Rows that show one image are resampled
    together.
    """
    measured = [outcome for outcome in outcomes if isinstance(outcome.request, Row)]
    # A request without a mask has nothing to agree with.
    parts = {"all": measured}
    for name in sorted({outcome.request.task_type for outcome in measured}):
        parts[name] = [outcome for outcome in measured if outcome.request.task_type == name]
    return {name: _summary(part) for name, part in parts.items() if part}


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    pairs = [(o.request.group, o.agreement) for o in outcomes if o.agreement is not None]
    summary: dict[str, Any] = {"found": len(pairs), "not_found": len(outcomes) - len(pairs)}
    for name in MEASURES if pairs else ():
        values = [float(getattr(measured, name)) for _, measured in pairs]
        # Rows of one image are not independent; the bootstrap draws images.
        groups = [group for group, _ in pairs]
        summary[name] = interval_json(bootstrap(values, seed=0, groups=groups))
    return summary
