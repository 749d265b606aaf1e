"""Loads the stock FLUX.1-Kontext pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from rl_edit.editors.component_files import pipeline_files
from rl_edit.editors.family import Dtype
from rl_edit.editors.location import Location
from rl_edit.errors import InputError

if TYPE_CHECKING:
    from diffusers import FluxKontextPipeline


def stock_pipeline(place: Location, dtype: Dtype) -> FluxKontextPipeline:
    """Loads the pipeline without a word on the terminal, which belongs to the run's own display.

    Raises:
        InputError: it cannot be loaded, with what to do.
    """
    from diffusers import FluxKontextPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        pipeline = FluxKontextPipeline.from_pretrained(
            place.name,
            revision=place.revision,
            variant=pipeline_files(place, dtype=dtype).variant,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            local_files_only=place.local,
        )
    except InputError:
        raise
    except Exception as error:
        raise place.unreachable(error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
