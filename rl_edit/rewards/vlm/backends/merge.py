"""Merges a judge's LoRA into its base: one checkpoint that any server loads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from rl_edit.errors import InputError
from rl_edit.files import new_directory
from rl_edit.rewards.vlm.backends.transport import shortened

ADAPTER = "adapter_model.safetensors"
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
)


def merge_judge(base: str, lora: str, out: Path, *, say: Callable[[str], None]) -> None:
    """Writes ``base`` with ``lora`` added to its weights to ``out``.

    The base's tokenizer and processor files are copied. ``out`` appears completely or not at all.

    Args:
        say: receives a line per step.

    Raises:
        InputError: when ``out`` exists, a part is missing, or the LoRA does not fit the base.
    """
    if out.exists():
        raise InputError(
            f"{out} exists, and a checkpoint that is in use must not change. Give another "
            "directory or remove it."
        )
    # Both are found before anything is loaded, which takes minutes.
    say(f"Finding {base} and {lora}")
    base_dir, lora_dir = _directory(base, missing="config.json"), _directory(lora, missing=ADAPTER)
    with new_directory(out) as unfinished:
        _write_merged(base_dir, lora_dir, unfinished, say=say)
        for file in sorted(base_dir.iterdir()):
            # Weights are new; all other files of the base are needed to load it.
            if (
                file.is_file()
                and not (unfinished / file.name).exists()
                and not any(file.match(weights) for weights in _WEIGHTS)
            ):
                shutil.copyfile(file, unfinished / file.name)


def _write_merged(base: Path, lora: Path, out: Path, *, say: Callable[[str], None]) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText

    say("Reading the base")
    # Weights in any other format would have to be unpickled.
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", use_safetensors=True)
    say("Merging")
    try:
        adapted = PeftModel.from_pretrained(model, lora)
    except ValueError as error:
        raise InputError(
            f"The LoRA in {lora} does not fit {base}: {error}. Give the base it was trained on."
        ) from error
    # PEFT passes over tensors whose names it does not find in the model, and the merged model would
    # not be the judge.
    left_out = sorted(set(load_file(lora / ADAPTER)) ^ set(get_peft_model_state_dict(adapted)))
    if left_out:
        raise InputError(
            f"{len(left_out)} tensors of the LoRA in {lora} do not match {base} (the first is "
            f"{left_out[0]}), so the merged model would not be the judge. Give the base it was "
            "trained on."
        )
    merged = adapted.merge_and_unload()
    say(f"Writing to {out.parent}")
    merged.save_pretrained(out)


def _directory(name: str, *, missing: str) -> Path:
    """Finds a directory with the file ``missing``, here or on the hub."""
    path = Path(name)
    if not path.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            path = Path(
                snapshot_download(name, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"])
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise InputError(
                f"{name} is no directory here and cannot be had from the hub "
                f"({shortened(str(error))}). Give a directory or a hub name."
            ) from error
    if not (path / missing).is_file():
        raise InputError(
            f"{name} has no {missing}, so it cannot be merged. Give the directory that holds it."
        )
    return path
