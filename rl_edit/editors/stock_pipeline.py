"""Loads a stock pipeline of diffusers, and refuses models that lack some of their tensors."""

from __future__ import annotations

from typing import Any

import torch

from rl_edit.editors.component_files import pipeline_files
from rl_edit.editors.family import Dtype
from rl_edit.editors.location import INDEX, Location
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

    # Models are loaded one by one: the pipeline's own loading does not report which tensors a
    # file lacked, and transformers fills those with random numbers.
    models = {
        part: whole_model(place, part, model, dtype)
        for part, model in _model_classes(place).items()
        if part not in components
    }
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(
            place.name,
            revision=place.revision,
            dtype=getattr(torch, dtype),
            local_files_only=place.local,
            **models,
            **components,
        )
    except Exception as error:
        raise place.unreachable(error) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def whole_model(place: Location, part: str, kind: Any, dtype: Dtype) -> Any:
    """Loads one model of a pipeline.

    Args:
        part: its folder.
        kind: its class in diffusers or transformers, or one like those.

    Raises:
        InputError: it cannot be loaded, or the files lack tensors of its configuration.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    variant = pipeline_files(place, dtype=dtype).variant
    names = place.files() or ()
    # A component that does not have the variant is loaded from its plain weights.
    if not any(name.startswith(f"{part}/") and f".{variant}." in name for name in names):
        variant = None
    # The same options as those of a pipeline, so that the weights have the same bits.
    try:
        model, report = kind.from_pretrained(
            place.name,
            subfolder=part,
            variant=variant,
            revision=place.revision,
            local_files_only=place.local,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
        )
    except Exception as error:
        raise place.unreachable(error) from error
    # The libraries leave such tensors random. No editor reads the words that a text encoder would
    # say, so its last layer may be left out.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("lm_head."))
    if missing:
        raise InputError(
            f"{part}/ of {place.name} lacks {len(missing)} tensors of its own configuration "
            f"(first: {missing[0]}): copy or save the editor again"
        )
    return model


def _model_classes(place: Location) -> dict[str, Any]:
    """Finds the classes of a pipeline's models, by folder, among those of the two libraries."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    # A name is looked up in the two libraries alone: code that lies in the directory is never run.
    # What is found in neither is left to the pipeline, which says so.
    classes = {
        part: getattr(libraries[entry[0]], entry[1], None)
        for part, entry in place.read_json(INDEX).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] in libraries
    }
    # Tokenizers, processors and schedulers have no tensors that could be missing.
    models = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return {
        part: kind
        for part, kind in classes.items()
        if isinstance(kind, type) and issubclass(kind, models)
    }
