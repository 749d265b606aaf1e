"""Loads a stock pipeline of diffusers."""

from __future__ import annotations

from typing import Any

import torch

from rl_edit.editors.component_files import pipeline_files
from rl_edit.editors.family import Dtype
from rl_edit.editors.location import Location
from rl_edit.errors import InputError


def stock_pipeline(place: Location, kind: str, dtype: Dtype, **components: Any) -> Any:
    """Loads a pipeline without a word on the terminal, which belongs to the run's own display.

    Args:
        kind: name of the pipeline's class in diffusers.
        components: parts that are used instead of those of the place; None leaves one out.

    Raises:
        InputError: it cannot be loaded, with what to do.
    """
    import diffusers
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(
            place.name,
            revision=place.revision,
            variant=pipeline_files(place, dtype=dtype).variant,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            local_files_only=place.local,
            **components,
        )
    except InputError:
        raise
    except Exception as error:
        raise place.unreachable(error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
