"""Reads LoRA files in the forms of other trainers, exactly as stock diffusers applies them.

The conversions are diffusers' and PEFT's own; nothing here scales a tensor. A form that they leave
out is refused by its name. Model libraries are imported where a file is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rl_edit.editors.adapter_config import (
    AdapterConfig,
    idle_patterns,
    require_applicable,
    require_pairs,
    without_effect,
)
from rl_edit.editors.adapter_kinds import METHODS, MODELS, NAMING, TEXT_ENCODERS, recognised
from rl_edit.errors import InputError
from rl_edit.files import nearest_path

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_SETTINGS = "adapter_config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")

PREFIX = "transformer."
METADATA = "lora_adapter_metadata"
"""Prefix of tensors, and key of PEFT's settings, in a LoRA file of diffusers."""

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class _File:
    """Content of an adapter file, as it is stored."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def find_file(place: Path) -> Path:
    """Returns the adapter file of a directory, or the file itself.

    Raises:
        InputError: there is none, or several that could be meant.
    """
    if place.is_dir():
        for name in (WEIGHTS_FILE, PEFT_FILE):
            if (place / name).is_file():
                return place / name
        candidates = sorted(p for p in place.iterdir() if p.suffix in (".safetensors", *PICKLED))
        if len(candidates) > 1:
            raise InputError(
                f"{len(candidates)} files in {place} could be the adapter "
                f"({', '.join(p.name for p in candidates[:3])}, ...): name one of them"
            )
        place = candidates[0] if candidates else place
    if not place.is_file() or place.suffix not in (".safetensors", *PICKLED):
        raise InputError(
            f"no adapter at {place}: expected {WEIGHTS_FILE} (a diffusers LoRA) or {PEFT_FILE} (a "
            f"PEFT folder). {_meant(place)}"
        )
    return place


def _meant(place: Path) -> str:
    """Says where the adapter may be that was not found at a place."""
    inner = place / "adapter"
    near = (inner if inner.is_dir() else None) if place.is_dir() else nearest_path(place)
    return f"Did you mean {near}?" if near else "Point --adapter at RUN/adapter."


def read_form(path: Path, *, pipeline: str) -> tuple[dict[str, Tensor], AdapterConfig]:
    """Reads tensors, under their names in the transformer, and settings of a LoRA file.

    Args:
        pipeline: class of the editor that it is for, whose converters are used.

    Raises:
        InputError: it cannot be read, or is an adapter that diffusers does not apply.
    """
    file = _stored(path)
    _require_lora(file, pipeline)
    _require_scales(file)
    try:
        # Of the libraries' warnings, those that matter are said as notes and refusals.
        with _library_messages() as messages:
            tensors, config = _applied(file, pipeline)
    except InputError:
        raise
    except Exception as error:
        _require_converted(file)
        raise InputError(
            f"{path} cannot be converted by diffusers or PEFT ({_line(error)}): the file is "
            "damaged, or of another model or a newer trainer. Copy it again, or save it with "
            "diffusers' save_lora_weights"
        ) from error
    left_out = tuple(f"{path.name}: diffusers says: {words}" for words in messages)
    return tensors, config.model_copy(update={"notes": (*config.notes, *left_out)})


def _stored(path: Path) -> _File:
    """Reads a file's tensors and metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    if path.suffix in PICKLED:
        # Pickled files can run code when they are read.
        raise InputError(
            f"{path} is a pickled file ({path.suffix}), which may run code when it is read: write "
            "it as safetensors, with safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=True), 'adapter.safetensors')"
        )
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except Exception as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({_line(error)}): {_remedy_of(path)}"
        ) from error
    return _File(path=path, tensors=tensors, metadata=metadata)


def _remedy_of(path: Path) -> str:
    """Says what to do about a file that is no safetensors file, from its first bytes."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(64).lstrip().lower()
        if start.startswith(b"version https://git-lfs"):
            return "it is a Git LFS pointer. Run git lfs pull in its repository"
        if start.startswith((b"<!doctype", b"<html")):
            return "it is a web page, as a download link without a login gives. Download it again"
    return "copy the adapter again"


def _require_scales(file: _File) -> None:
    """Refuses alphas on which diffusers' conversion of kohya's files would never end."""
    for name, alpha in file.tensors.items():
        if name.endswith(".alpha") and not (alpha.double() >= 0).all():
            raise InputError(
                f"{file.path}: {name} is {alpha.double().flatten().tolist()[:1]}, and diffusers "
                "converts scales of at least 0 alone: the file is damaged, or its trainer turned "
                "the sign. Merge it in its own trainer, or copy it again"
            )


def _require_lora(file: _File, pipeline: str) -> None:
    """Refuses what its tensor names show to be no LoRA of the editor's transformer."""
    names = file.tensors.keys()
    if not names:
        raise InputError(
            f"{file.path} holds no tensors at all: its trainer saved no adapter. Save it again"
        )
    kind = recognised(names, METHODS) or recognised(names, (TEXT_ENCODERS,))
    others = tuple(model for model in MODELS if pipeline not in model.pipelines)
    kind = kind or recognised(names, others)
    if kind is not None:
        raise InputError(f"{file.path} is {kind.name}: {kind.remedy}")
    if not any("lora" in name for name in names):
        raise InputError(
            f"{file.path} holds no transformer LoRA (keys start with {next(iter(names), '')!r}): "
            "train one with rl-edit train"
        )


def _require_converted(file: _File) -> None:
    """Names the form of a LoRA of which diffusers reads nothing."""
    kind = recognised(file.tensors, NAMING)
    if kind is not None:
        raise InputError(f"{file.path} is {kind.name}: {kind.remedy}")


def _applied(file: _File, pipeline: str) -> tuple[dict[str, Tensor], AdapterConfig]:
    """Returns the tensors and settings that the libraries make of a file."""
    notes: list[str] = []
    folder = (file.path.parent / PEFT_SETTINGS).is_file()
    if folder and all(name.startswith(PEFT_PREFIX) for name in file.tensors):
        tensors = {name.removeprefix(PEFT_PREFIX): t for name, t in file.tensors.items()}
        config = _peft_settings(file.path.parent / PEFT_SETTINGS)
    else:
        tensors, config, notes = _as_diffusers(file, pipeline)
    settings = {
        # Sets are written in another order each time, and no JSON holds them.
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }
    require_applicable(file.path, settings)
    require_pairs(file.path, settings, tensors)
    _require_numbers(file.path, tensors)
    # Dropout acts in training only. PEFT's new layers would begin in training mode.
    settings["lora_dropout"] = 0.0
    # Converters let several modules share one tensor, which no file can hold.
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    modules = sorted({name.split(".lora_")[0] for name in tensors})
    notes += idle_patterns(file.path, settings, modules)
    notes += without_effect(file.path, settings, tensors)
    # Stored as JSON beside the adapter when it is saved again.
    settings = json.loads(json.dumps(settings, default=str))
    return tensors, AdapterConfig(settings=settings, modules=tuple(modules), notes=tuple(notes))


def _peft_settings(path: Path) -> PeftLoraConfig:
    """Reads ``adapter_config.json`` of a PEFT folder."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftConfig

    try:
        kind = json.loads(path.read_text()).get("peft_type", "LORA")
        if kind != "LORA":
            raise InputError(
                f"{path.parent} is a PEFT adapter of type {kind}, and LoRA alone is applied here: "
                "convert it to a LoRA with peft.save_as_lora (PEFT)"
            )
        config = PeftConfig.from_pretrained(str(path.parent))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is not readable ({_line(error)}): copy the adapter's folder again"
        ) from error
    assert isinstance(config, PeftLoraConfig)
    return config


def _as_diffusers(
    file: _File, pipeline: str
) -> tuple[dict[str, Tensor], PeftLoraConfig, list[str]]:
    """Does what the pipeline's ``load_lora_weights`` does up to the transformer."""
    from diffusers.utils import convert_unet_state_dict_to_peft

    stored, alphas = _converted(file, pipeline)
    tensors = {
        name.removeprefix(PREFIX): value
        for name, value in stored.items()
        if name.startswith(PREFIX)
    }
    if tensors and not any("lora_A" in name for name in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    if not any(name.endswith("lora_B.weight") for name in tensors):
        _require_converted(file)
        raise InputError(
            f"{file.path} holds no transformer LoRA that diffusers reads (keys start with "
            f"{next(iter(file.tensors), '')!r}): save it with diffusers' save_lora_weights"
        )
    notes = _unread_alphas(file, tensors)
    tensors = {name: value for name, value in tensors.items() if not name.endswith(".alpha")}
    other = [name for name in tensors if ".lora_" not in name]
    if other and all(name.endswith(".bias") for name in other):
        raise InputError(
            f"{file.path} holds {len(other)} biases of the editor itself ({other[0]}, ...; PEFT's "
            "bias setting), which stays frozen here: train it with bias='none', or delete them"
        )
    if other:
        raise InputError(
            f"{file.path} is a control LoRA: beside the LoRA it replaces {len(other)} tensors of "
            f"the editor itself ({other[0]}, ...), which stays frozen here. Merge it into the "
            "editor with diffusers (fuse_lora, save_pretrained) and name that as editor.path"
        )
    return tensors, *_with_settings(file, tensors, alphas, notes)


def _converted(file: _File, pipeline: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Returns tensors under diffusers' names, and the alphas that stand beside them."""
    converted_names = all(
        name.startswith(PREFIX) and (".lora_A." in name or ".lora_B." in name)
        for name in file.tensors
    )
    if converted_names:
        # No converter changes these. A family of yours may have any module names.
        return file.tensors, None
    import diffusers

    convert = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    if convert is None:
        return file.tensors, None
    # A copy: the converters take tensors out of it. Only FLUX.1's give alphas beside the tensors;
    # others fold them in.
    converted = convert(dict(file.tensors), return_alphas=True)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    return state, alphas


def _with_settings(
    file: _File, tensors: dict[str, Tensor], alphas: dict[str, Tensor] | None, notes: list[str]
) -> tuple[PeftLoraConfig, list[str]]:
    """Returns PEFT's settings: those of the metadata, else those diffusers infers."""
    from peft import LoraConfig as PeftLoraConfig

    raw = file.metadata.get(METADATA)
    if raw:
        if alphas:
            raise InputError(
                f"{file.path} has .alpha tensors and settings in its metadata, which may disagree "
                "(diffusers refuses it too): delete one of the two"
            )
        return PeftLoraConfig(**_metadata_settings(file.path, raw)), notes
    from diffusers.utils import get_peft_kwargs

    ranks = {
        f"^{name}": value.shape[1]
        for name, value in tensors.items()
        if "lora_B" in name and value.ndim > 1
    }
    of_transformer = {
        k.removeprefix(PREFIX): v for k, v in (alphas or {}).items() if k.startswith(PREFIX)
    }
    inferred = get_peft_kwargs(ranks, of_transformer, tensors)
    if of_transformer:
        inferred |= _numbers(inferred, tensors)
    elif not any("alpha" in name for name in file.tensors):
        notes.append(
            f"{file.path.name} has no settings: alpha is taken as the rank, as diffusers does. If "
            "it was trained with another alpha, save it with its metadata"
        )
    return PeftLoraConfig(**inferred), notes


def _unread_alphas(file: _File, tensors: Mapping[str, Tensor]) -> list[str]:
    """Notes alphas that diffusers does not use in this form, although the file has them."""
    count = sum(name.endswith(".alpha") for name in tensors)
    if not count:
        return []
    return [
        f"{file.path.name} has {count} .alpha tensors that diffusers leaves out in this form "
        "(transformer. with lora_down and lora_up): alpha is taken as the rank, as there"
    ]


def _metadata_settings(path: Path, raw: str) -> dict[str, Any]:
    """Reads PEFT's settings of the transformer from a file's metadata."""
    try:
        stored = json.loads(raw)
        return {
            key.removeprefix(PREFIX): value
            for key, value in stored.items()
            if key.startswith(PREFIX)
        }
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"the settings in the metadata of {path} are not readable ({_line(error)}): copy the "
            "adapter again"
        ) from error


def _numbers(inferred: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Turns alphas that are tensors into numbers with the same scale for each module."""
    from peft.utils.other import get_pattern_key

    alphas: dict[str, float] = {}
    for module in sorted({name.split(".lora_")[0] for name in tensors}):
        rank, alpha = (
            inferred[pattern].get(get_pattern_key(inferred[pattern], module), inferred[default])
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        # An alpha in 16 bits makes a scale of 16 bits in diffusers: 16 / 20 is not 0.8.
        alphas[module] = float(alpha / rank) * rank
    common = Counter(alphas.values()).most_common(1)[0][0]
    pattern = {f"^{module}": alpha for module, alpha in alphas.items() if alpha != common}
    return {"lora_alpha": common, "alpha_pattern": pattern}


def _require_numbers(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors that would make every image black or noise."""
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise InputError(
                f"{path}: {name} is {str(value.dtype).removeprefix('torch.')}, and a LoRA has "
                "floating-point numbers: it is quantised or damaged. Use the unquantised file"
            )
        # As fp32: formats of 8 bits have no such test.
        if not bool(value.float().isfinite().all()):
            raise InputError(
                f"{path}: {name} holds NaN or infinite values, so that every image would be "
                "spoilt: the training diverged. Use an earlier checkpoint of it"
            )


@contextlib.contextmanager
def _library_messages() -> Iterator[list[str]]:
    """Keeps the libraries' words from the terminal, and lists what converters left out."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(" ".join(record.getMessage().split())[:200])

    # Converters say there, and nowhere else, which tensors they did not take.
    source = logging.getLogger("diffusers.loaders.lora_conversion_utils")
    before = source.level, source.propagate
    listener = Listener()
    source.addHandler(listener)
    source.setLevel(logging.INFO)
    source.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        source.removeHandler(listener)
        source.setLevel(before[0])
        source.propagate = before[1]


def _line(error: BaseException) -> str:
    """Returns an error of a library as one short line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
