"""Says once for a dataset what an editor cannot do with its images."""

from __future__ import annotations

from PIL import Image

from rl_edit.data import Dataset, RowsDataset
from rl_edit.editors.family import EditorFamily

_LOOKED_AT = 64
"""First images whose size is read: a folder of photographs shows it at once."""


def misfit_note(config: EditorFamily, dataset: Dataset) -> str:
    """Names the images that are nothing for this editor, and why; "" where all fit."""
    if not isinstance(dataset, RowsDataset):
        return ""
    misfits = []
    for row in dataset.rows[:_LOOKED_AT]:
        try:
            with Image.open(row.source) as image:
                width, height = image.size
        # An image that cannot be opened is refused, by name, where it is read.
        except OSError:
            continue
        if reason := config.misfit(height, width):
            misfits.append(f"{row.source.name}: {reason}")
    if not misfits:
        return ""
    looked_at = min(len(dataset), _LOOKED_AT)
    return (
        f"{len(misfits)} of the {looked_at} images looked at do not suit the editor: {misfits[0]}"
    )
