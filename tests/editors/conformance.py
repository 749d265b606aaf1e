"""A family of editors as the conformance suite sees it, and the inputs of its checks.

A family registers itself by one :class:`Family` in a file of its own, which ``families.py`` lists.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rl_edit.editors import Editor, editor_config, load_editor
from rl_edit.types import Conditioning, EditTask

INSTRUCTION = "remove the red circle"


@dataclass(frozen=True, kw_only=True)
class StockResult:
    """A stock pipeline's edit from given latents.

    Attributes:
        latents: the last ones, packed ``[batch, token, channel]``.
        images: ``[batch, height, width, 3]``, 0..255.
    """

    latents: Tensor
    images: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Published:
    """A released checkpoint's transformer.

    Attributes:
        name: of the repository.
        config: the released ``transformer/config.json``, without the private keys.
        parameters: their number, which agrees with the published size (12B, 4B, 9B, ...) and with
            the size of its files. The index of its tensors cannot be had without a download.
    """

    name: str
    config: Mapping[str, Any]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the checks need to know of a family.

    Attributes:
        kind: of the editor's settings; the tiny editor is that of ``write_tiny``.
        pipeline: class in ``model_index.json``.
        stock: edits with the stock pipeline, or with an independent reference where there is none:
            ``stock(editor, task, latents, num_steps)``.
        settings: of the tiny editor.
        guided: settings under which a velocity takes further forwards, each checked against the
            stock pipeline; empty where the family has no such guidance.
        embedded: settings of another scale that the transformer takes as an input; empty where it
            takes none.
        sizes: (height, width) of three canvases.
        read_words: decodes the marked text rows: ``read_words(editor, instruction, rows)``.
        attention: module whose ``dispatch_attention_fn`` the transformer calls once per layer with
            queries and keys ``[batch, position, head, dim]``; "" where a family records its own.
        target_last: do the joint sequence's keys end with the target? Else it follows the text.
        long_instruction: one that is over the limit of the tiny editor.
        load_adapter: puts an adapter's directory and file into a fresh editor as users of the stock
            pipeline do.
        build: makes the transformer of a configuration that names its class.
        vae: the editor's VAE, whose ``decode`` takes unpacked latents.
        without_gradient: modules whose result nothing reads, such as the text of a last block.
        published: released checkpoints.
    """

    kind: str
    pipeline: str
    stock: Callable[[Any, EditTask, Tensor, int], StockResult]
    read_words: Callable[[Any, str, Tensor], str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    guided: tuple[Mapping[str, Any], ...] = ()
    embedded: Mapping[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (64, 96), (128, 64))
    attention: str = ""
    target_last: bool = False
    long_instruction: str = " ".join([INSTRUCTION] * 200)
    load_adapter: Callable[[Any, Path, str], None] = lambda editor, directory, file: (
        editor.pipeline.load_lora_weights(directory, weight_name=file)
    )
    build: Callable[[Mapping[str, Any]], torch.nn.Module] = lambda config: getattr(
        diffusers, config["_class_name"]
    ).from_config({key: value for key, value in config.items() if key != "_class_name"})
    vae: Callable[[Any], torch.nn.Module] = lambda editor: editor.pipeline.vae
    without_gradient: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()

    def __str__(self) -> str:
        return self.kind


def loaded(family: Family, directory: Path, **changes: Any) -> Any:
    """The family's tiny editor, loaded as a real one is."""
    settings = {"device": "cpu", "dtype": "float32", "attention_layers": 2}
    return load_editor(
        editor_config({"path": str(directory), **settings, **family.settings, **changes})
    )


def with_settings(editor: Any, **changes: Any) -> Any:
    """The same weights run another way."""
    settings = {**editor.config.model_dump(), **changes}
    return type(editor)(editor.pipeline, type(editor.config).model_validate(settings))


def task_of(
    height: int = 64, width: int = 64, instruction: str = INSTRUCTION, seed: int = 0
) -> EditTask:
    """A task with a smooth random image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].permute(
        1, 2, 0
    )
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:8, :8] = True
    return EditTask(
        task_id=f"t{seed}",
        task_type="edit",
        source=(image * 255).byte(),
        instruction=instruction,
        edit_mask=mask,
    )


def image_of(task: EditTask) -> Image.Image:
    return Image.fromarray(task.source.numpy())


def noise_for(editor: Editor, conditioning: Conditioning, rows: int, seed: int = 0) -> Tensor:
    return torch.randn(
        rows, *editor.latent_shape(conditioning), generator=torch.Generator().manual_seed(seed)
    )


@contextmanager
def attention_calls(family: Family) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects queries and keys of every attention of a forward, after their rotary embedding."""
    module = importlib.import_module(family.attention)
    stock, calls = module.dispatch_attention_fn, []

    def recorded(query: Tensor, key: Tensor, *arguments: Any, **more: Any) -> Tensor:
        calls.append((query.detach(), key.detach()))
        return stock(query, key, *arguments, **more)

    module.dispatch_attention_fn = recorded
    try:
        yield calls
    finally:
        module.dispatch_attention_fn = stock


@contextmanager
def vae_inputs(vae: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects the unpacked latents that a VAE decodes."""
    inputs: list[Tensor] = []
    decode = vae.decode

    def recorded(latents: Tensor, *arguments: Any, **more: Any) -> Any:
        inputs.append(latents.detach().clone())
        return decode(latents, *arguments, **more)

    vae.decode = recorded  # type: ignore[method-assign]
    try:
        yield inputs
    finally:
        del vae.decode  # the class's own again
