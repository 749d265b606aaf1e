"""Checks the files of a diffusers pipeline before any weight is loaded.

A pipeline is a directory with a folder for each component of its ``model_index.json``. What is
read here is small: names, JSON files, and the tables of tensors at the head of safetensors files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rl_edit.editors.location import INDEX, Location
from rl_edit.errors import InputError

_MOST_PROBLEMS = 3

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Names of weight files before any variant, by the library of the component."""

_VOCABULARIES = (
    *(("tokenizer.json",), ("vocab.json", "merges.txt")),
    *(("spiece.model",), ("tokenizer.model",), ("vocab.txt",)),
)
"""Files of which one set must be in a tokenizer's folder."""

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of a stored number by safetensors' names; 1 for all others."""

_QUANTISED = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8"})
"""Formats of quantised weights, by safetensors' names."""

_PARTS = ("scheduler", "transformer", "vae")
"""Components of every editor; those that read its text have other names in each family."""

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

_LFS = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class PipelineFiles:
    """The files that a pipeline is loaded from.

    Attributes:
        variant: diffusers' name of the weights to load, such as "fp16"; None for the plain ones.
        notes: what a person should know about the choice.
    """

    variant: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Component:
    """One folder of a pipeline; without a name, a directory that holds one model.

    Attributes:
        stem: of its weight files; "" for a component without weights.
    """

    name: str
    kind: str
    stem: str
    files: frozenset[str]

    @property
    def place(self) -> str:
        """Names the folder in a message."""
        return f"{self.name}/" if self.name else "the directory"

    def path(self, file: str) -> str:
        """Names a file of the folder within the pipeline."""
        return f"{self.name}/{file}" if self.name else file

    def variants(self) -> dict[str | None, str]:
        """Finds the complete weights: a file or an index for each variant; None is the plain one.

        Example:
            ``model.safetensors`` and ``model.safetensors.index.fp16.json`` give
            ``{None: "model.safetensors", "fp16": "model.safetensors.index.fp16.json"}``.
        """
        weights: dict[str | None, str] = {}
        single = re.compile(rf"{self.stem}(?:\.(\w+))?\.safetensors")
        index = re.compile(rf"{self.stem}\.safetensors\.index(?:\.(\w+))?\.json")
        for file in sorted(self.files):
            if match := single.fullmatch(file) or index.fullmatch(file):
                weights.setdefault(match[1], file)
        return weights


def pipeline_files(place: Location, *, dtype: str) -> PipelineFiles:
    """Finds the weights of a pipeline and checks that all its files are there and complete.

    Args:
        dtype: number format to load; among several variants it prefers that of its name.

    Raises:
        InputError: files are missing or damaged, or no one variant has every component.
    """
    names = place.files()
    # A hub that cannot be listed is asked again, file by file, when the editor is loaded.
    if names is None:
        return PipelineFiles()
    components = _components(place.read_json(INDEX), names)
    _refuse(
        place,
        [
            *_unnamed(components),
            *_unread(components),
            *(problem for part in components for problem in _missing(part)),
        ],
    )
    files = _chosen(place, components, dtype)
    _refuse(place, [problem for part in components for problem in _damaged(place, part, files)])
    return files


def model_problems(place: Location) -> list[str]:
    """Says what is missing or damaged in a directory of one model of transformers.

    The plain weights, the tokenizer and all JSON files are looked at; nothing is said of a model
    on the hub that cannot be listed.
    """
    names = place.files()
    if names is None:
        return [] if place.offers("config.json") else ["the hub does not answer or lacks it"]
    files = frozenset(name for name in names if "/" not in name)
    model = _Component(name="", kind="Model", stem=_STEMS["transformers"], files=files)
    tokenizer = _Component(name="", kind="Tokenizer", stem="", files=files)
    problems = [*_missing(model), *_missing(tokenizer)]
    if not problems and None not in model.variants():
        problems = [
            f"model.safetensors is missing, only variant {', '.join(map(str, model.variants()))} "
            "is there: rename it, or save the model again without a variant"
        ]
    return problems or list(_damaged(place, model, PipelineFiles()))


def pipeline_bytes(place: Location, *, dtype: str) -> int:
    """Counts the bytes of a pipeline's weights in a number format; 0 where they are not here."""
    names = place.files()
    if names is None:
        return 0
    components = _components(place.read_json(INDEX), names)
    files = _chosen(place, components, dtype)
    return _bytes(place, [part for part in components if part.stem], files, dtype)


def model_bytes(place: Location, *, dtype: str) -> int:
    """Counts the bytes of a model of transformers likewise; "auto" is the stored number format."""
    names = place.files()
    if names is None:
        return 0
    files = frozenset(name for name in names if "/" not in name)
    model = _Component(name="", kind="Model", stem=_STEMS["transformers"], files=files)
    return _bytes(place, [model], PipelineFiles(), dtype) if None in model.variants() else 0


def _bytes(
    place: Location, components: Collection[_Component], chosen: PipelineFiles, dtype: str
) -> int:
    """Adds up the tables of tensors; 0 where one of them is not on this machine."""
    total = 0
    for part in components:
        weights = part.variants()
        file = weights[chosen.variant if chosen.variant in weights else None]
        name = part.path(file)
        shards = [part.path(s) for s in _shards(place, name)] if name.endswith(".json") else [name]
        for path in map(place.local_path, shards):
            if path is None:
                return 0
            total += _table_bytes(path, None if dtype == "auto" else getattr(torch, dtype).itemsize)
    return total


def _table_bytes(path: Path, itemsize: int | None) -> int:
    """Adds up the tensors of a file.

    Args:
        itemsize: bytes of a number once loaded; None takes the stored ones.
    """
    with safe_open(path, framework="pt") as opened:
        slices = map(opened.get_slice, opened.keys())
        return sum(
            math.prod(part.get_shape()) * (itemsize or _ITEM_BYTES.get(part.get_dtype(), 1))
            for part in slices
        )


def _components(index: Any, names: Collection[str]) -> tuple[_Component, ...]:
    """Lists the components that ``model_index.json`` names; null entries are optional ones."""
    entries = index.items() if isinstance(index, dict) else ()
    return tuple(
        _Component(
            name=name,
            kind=entry[1],
            # A component of the pipeline's own code is saved as those of diffusers are.
            stem=_STEMS.get(entry[0], _STEMS["diffusers"]) if _has_weights(entry[1]) else "",
            files=frozenset(
                file.removeprefix(f"{name}/") for file in names if file.startswith(f"{name}/")
            ),
        )
        for name, entry in entries
        if isinstance(entry, list) and len(entry) == 2 and all(entry)
    )


def _has_weights(kind: str) -> bool:
    return not any(word in kind for word in ("Scheduler", "Tokenizer", "Processor", "Extractor"))


def _unnamed(components: Collection[_Component]) -> Iterator[str]:
    """Says which parts of every editor the index does not name, or names another kind for."""
    kinds = {part.name: part.kind for part in components}
    if absent := [name for name in _PARTS if name not in kinds]:
        yield f"{INDEX} names no {', no '.join(absent)}"
    # The noise levels of another scheduler would be taken for those of a straight flow, on which
    # velocity, step and likelihood rest.
    scheduler = kinds.get("scheduler", _SCHEDULER)
    if scheduler != _SCHEDULER:
        yield (
            f"its scheduler is a {scheduler}, whose noise levels are no straight flow's: these "
            f"editors are trained with a {_SCHEDULER}"
        )


def _unread(components: Collection[_Component]) -> Iterator[str]:
    """Says which processor lacks the vocabulary, where no tokenizer lies beside it."""
    if any("Tokenizer" in part.kind for part in components):
        return
    for part in components:
        if "Processor" in part.kind and part.files:
            # transformers would make a tokenizer of special tokens alone, without a word.
            yield from _without_vocabulary(part)


def _without_vocabulary(part: _Component) -> Iterator[str]:
    if not any(part.files >= set(files) for files in _VOCABULARIES):
        yield f"{part.place} has no vocabulary (tokenizer.json)"


def _missing(part: _Component) -> Iterator[str]:
    """Says which files of a component are not there."""
    if not part.files:
        yield f"the folder {part.name}/ is missing or empty" if part.name else "it holds no files"
        return
    expected = "scheduler_config.json" if "Scheduler" in part.kind else "config.json"
    if (part.stem or "Scheduler" in part.kind) and expected not in part.files:
        yield f"{part.path(expected)} is missing"
    if "Tokenizer" in part.kind:
        yield from _without_vocabulary(part)
    if part.stem and not part.variants():
        yield f"{part.place} has no weights: {_instead_of_weights(part)}"


def _instead_of_weights(part: _Component) -> str:
    if any(file.endswith(".gguf") for file in part.files):
        return (
            "only quantised ones (.gguf), which no adapter can be trained on: name the checkpoint "
            "in bf16, fp16 or fp32"
        )
    if any(file.endswith((".bin", ".ckpt", ".pt", ".pth")) for file in part.files):
        return (
            "only pickled ones (.bin), which can run code when they are read. Save it again with "
            "pipeline.save_pretrained(DIR, safe_serialization=True)"
        )
    if any(file.endswith(".safetensors") for file in part.files):
        return f"its parts lie there without their {part.stem}.safetensors.index.json"
    return f"{part.stem}.safetensors is missing"


def _chosen(place: Location, components: Collection[_Component], dtype: str) -> PipelineFiles:
    """Chooses the variant that completes every component; the plain weights where they do."""
    lacking = {part.name: part.variants() for part in components if part.stem}
    lacking = {name: weights for name, weights in lacking.items() if None not in weights}
    if not lacking:
        return PipelineFiles()
    shared = set.intersection(*(set(weights) for weights in lacking.values()))
    if not shared:
        seen = "; ".join(
            f"{name}: {', '.join(map(str, weights))}" for name, weights in lacking.items()
        )
        raise InputError(
            f"the editor {place.name} has weights of different variants ({seen}), and no one of "
            "them loads every component. Save it with pipeline.save_pretrained(DIR)"
        )
    preferred = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "fp32")
    # The name decides between two, so that the choice is the same on every machine.
    variant = min(shared, key=lambda name: (name != preferred, str(name)))
    note = (
        f"{', '.join(lacking)} of the editor {place.name} exist only as variant {variant}: these "
        f"weights are loaded, converted to editor.dtype {dtype}"
    )
    return PipelineFiles(variant=variant, notes=(note,))


def _damaged(place: Location, part: _Component, files: PipelineFiles) -> Iterator[str]:
    """Says what is wrong with the small files and the tables of a component."""
    for file in sorted(part.files):
        path = place.local_path(part.path(file))
        if file.endswith(".json") and "index" not in file and path is not None:
            yield from _unreadable_json(path, part.path(file))
    if not part.stem:
        return
    weights = part.variants()
    # diffusers takes the plain weights of a component that does not have the variant.
    file = weights[files.variant if files.variant in weights else None]
    if not file.endswith(".json"):
        yield from _problem_of_table(place, part.path(file))
        return
    shards = _shards(place, part.path(file))
    if absent := sorted(set(shards) - part.files):
        yield (
            f"{part.path(file)} names {len(shards)} files, of which {len(absent)} are missing "
            f"(first: {absent[0]})"
        )
        return
    for shard, tensors in shards.items():
        yield from _problem_of_table(place, part.path(shard), expected=tensors)


def _shards(place: Location, index: str) -> dict[str, set[str]]:
    """Reads which tensors each file of divided weights holds."""
    content = place.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise InputError(
            f"{index} of the editor {place.name} has no weight_map, so its weights cannot be "
            "located: copy the file again"
        )
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(str(shard), set()).add(str(tensor))
    return shards


def _unreadable_json(path: Path, name: str) -> Iterator[str]:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield f"{name} is no JSON ({_pointer(path) or error})"


def _problem_of_table(
    place: Location, file: str, *, expected: Collection[str] = ()
) -> Iterator[str]:
    """Reads a table of tensors; the file's length must agree with it."""
    path = place.local_path(file)
    if path is None:  # on the hub and not here yet
        return
    try:
        with safe_open(path, framework="pt") as opened:
            stored = set(opened.keys())
            formats = {opened.get_slice(name).get_dtype() for name in stored}
    # safetensors raises errors of its own and of the system.
    except Exception as error:
        yield f"{file} is damaged or cut short ({_pointer(path) or error})"
        return
    if quantised := sorted(formats & _QUANTISED):
        yield (
            f"{file} is quantised ({', '.join(quantised)}), which no adapter can be trained on: "
            "name the checkpoint in bf16, fp16 or fp32"
        )
    if absent := sorted(set(expected) - stored):
        yield f"{file} lacks {len(absent)} tensors that its index names (first: {absent[0]})"


def _pointer(path: Path) -> str:
    """Recognises the text that Git leaves where git lfs has not fetched a file."""
    try:
        with path.open("rb") as file:
            return "a Git LFS pointer: run git lfs pull" if file.read(32).startswith(_LFS) else ""
    except OSError:
        return ""


def _refuse(place: Location, problems: list[str]) -> None:
    if not problems:
        return
    more = f"; and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
    remedy = (
        "Copy or save the editor again, with all its files"
        if place.local
        else f"Download it completely: hf download {place.name}"
    )
    raise InputError(
        f"the editor {place.name} cannot be loaded: "
        f"{'; '.join(problems[:_MOST_PROBLEMS])}{more}. {remedy}."
    )
