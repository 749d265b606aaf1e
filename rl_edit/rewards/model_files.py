"""Checks the model directories of rewards before anything is loaded or started."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl_edit.editors.component_files import model_bytes, model_problems
from rl_edit.editors.location import Location
from rl_edit.errors import InputError, ModelUnusable, brief, did_you_mean, lacks_memory


def require_model(path: str, *, reward: str) -> dict[str, Any]:
    """Checks a directory or hub id of a model, its tokenizer and its weights.

    Args:
        reward: what needs the model, for the message.

    Returns:
        the content of its ``config.json``.

    Raises:
        InputError: it is not there, or its files are not complete.
    """
    place = Location(name=path, local=Path(path).is_dir())
    if not place.local:
        _require_id(path, reward)
    elif (Path(path) / "adapter_config.json").is_file() and not (
        Path(path) / "config.json"
    ).is_file():
        raise InputError(
            f"{path}, the model of {reward}, holds a LoRA without its base. Make a complete model "
            f"of both: rl-edit merge-judge BASE {path} DIR"
        )
    if problems := model_problems(place):
        raise InputError(
            f"{path}, the model of {reward}, cannot be loaded: {'; '.join(problems[:3])}. "
            f"{'Copy it again' if place.local else f'Download it: hf download {path}'}"
        )
    content = place.read_json("config.json")
    return content if isinstance(content, dict) else {}


def stored_bytes(path: str, dtype: str) -> int:
    """Counts the bytes of a model's weights once loaded; 0 where they are not on this machine."""
    return model_bytes(Location(name=path, local=Path(path).is_dir()), dtype=dtype)


def require_image_processor(path: str, *, reward: str) -> None:
    """Refuses a model that lacks the settings by which its images are prepared."""
    place = Location(name=path, local=Path(path).is_dir())
    if not any(place.offers(f"{name}_config.json") for name in ("preprocessor", "processor")):
        raise InputError(
            f"{path}, the model of {reward}, has no preprocessor_config.json, so no image could be "
            "prepared for it. Copy it from the checkpoint that this one was made from"
        )


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Turns every error of a library that loads a model into one line.

    Raises:
        ModelUnusable: with the cause. A lack of memory passes, which another worker may not have.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModelUnusable) or lacks_memory(error):
            raise
        raise ModelUnusable(
            f"{path}, the model of a reward, cannot be loaded ({brief(error)}), so nothing would "
            "have a score. Copy or download it again, or give another one"
        ) from error


def require_complete(path: str, report: Mapping[str, Any]) -> None:
    """Refuses a model of which some weights were drawn at random for want of fitting ones.

    Args:
        report: what transformers returns for ``output_loading_info=True``.
    """
    # Of a tensor of another size, the library gives name and sizes.
    misfits = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    for names, what in ((report["missing_keys"], "lacks"), (misfits, "has in other sizes")):
        if names:
            raise ModelUnusable(
                f"{path}, the model of a reward, {what} {len(names)} of the tensors that its "
                f"config.json asks for (first: {min(names)}): random numbers would stand in their "
                "place and give scores. Copy weights and config.json again, from one model"
            )


def _require_id(path: str, reward: str) -> None:
    """Refuses a path that is neither a directory nor an id that the hub can have."""
    if Path(path).exists():
        raise InputError(f"{path}, the model of {reward}, is a file: give its directory")
    parent = Path(path).expanduser().parent
    # ORG/NAME may be on the hub; every other form was meant as a path.
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        siblings = (
            [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
        )
        hint = did_you_mean(Path(path).name, siblings)
        raise InputError(
            f"there is no model of {reward} at {path}{hint or '.'} Give an existing directory, or "
            "an id of the Hugging Face hub such as ORG/NAME"
        )
