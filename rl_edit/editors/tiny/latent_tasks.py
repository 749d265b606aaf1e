"""Tasks of the shapes world as the transformer sees them: packed latents and token ids."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, FluxKontextPipeline
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer, T5TokenizerFast

from rl_edit.data import shapes
from rl_edit.editors.tiny.recipe import (
    LATENT_CHANNELS,
    MAX_TEXT_TOKENS,
    PIXELS_PER_TOKEN,
    FlowStage,
    PretrainConfig,
)
from rl_edit.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class LatentTasks:
    """Pretraining tasks in memory.

    Attributes:
        sources, targets: packed normalised latents.
        edit_masks: True for latents that the edit mask touches.
        t5_ids, clip_ids: padded token ids of the instructions.
    """

    sources: Float[Tensor, "task token channel"]
    targets: Float[Tensor, "task token channel"]
    edit_masks: Bool[Tensor, "task token channel"]
    t5_ids: Int[Tensor, "task text"]
    clip_ids: Int[Tensor, "task clip_text"]


def step_generator(seed: int, stream: int, step: int) -> torch.Generator:
    """Returns the random numbers of one step, independent of every step before it.

    A run that is stopped and started again draws the same batches for this reason.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw(start: int, count: int, config: PretrainConfig) -> shapes.ShapesBatch:
    """Draws tasks ``start`` to ``start + count`` of the pretraining split."""
    return shapes.batch("pretrain", start, count, config.seed)


def pixels(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Converts bytes to the autoencoder's range [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def pack(
    latents: Float[Tensor, "batch channel rows columns"],
) -> Float[Tensor, "batch token packed"]:
    """Packs 2 x 2 latent patches into tokens, row-major, as the stock pipeline does."""
    batch, channels, rows, columns = latents.shape
    packed: Tensor = FluxKontextPipeline._pack_latents(latents, batch, channels, rows, columns)
    return packed


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: UInt8[Tensor, "batch height width 3"]
) -> Float[Tensor, "batch token channel"]:
    """Encodes images as the stock pipeline encodes a source: packed, normalised posterior modes."""
    # The mode and not a sample: encoding must be deterministic, as in the stock pipeline.
    mode = vae.encode(pixels(images)).latent_dist.mode()
    return pack((mode - vae.config.shift_factor) * vae.config.scaling_factor)


def latent_tasks(
    pipeline: FluxKontextPipeline,
    stage: FlowStage,
    config: PretrainConfig,
    report: Callable[[str, int, int], None],
) -> LatentTasks:
    """Draws and encodes the pretraining tasks of a stage.

    There are ``config.num_tasks`` of them, or as many as the stage's steps can visit.

    Args:
        report: takes what is done, the chunks done and their total.
    """
    # Images are drawn in chunks and only their latents stay in memory.
    chunk, num_tasks = 256, min(config.num_tasks, stage.steps * config.batch)
    starts = range(0, num_tasks, chunk)
    columns: dict[str, list[Tensor]] = {field.name: [] for field in fields(LatentTasks)}
    texts: list[str] = []
    # A stream of its own, so that the texts are the same in both stages.
    writing = torch.Generator().manual_seed(config.seed)
    batches = ahead(starts, lambda start: draw(start, min(chunk, num_tasks - start), config))
    for step, tasks in enumerate(batches):
        targets = tasks.target
        if stage.flawed:
            targets = flawed(tasks, config, step_generator(config.seed, 4, step))
        columns["sources"].append(encode_images(pipeline.vae, tasks.source))
        columns["targets"].append(encode_images(pipeline.vae, targets))
        # Max pooling: a latent counts as edited where any pixel under it is.
        edited = functional.max_pool2d(tasks.mask[:, None].float(), PIXELS_PER_TOKEN // 2)
        columns["edit_masks"].append(pack(edited.expand(-1, LATENT_CHANNELS, -1, -1)).bool())
        texts += [_as_people_write(text, writing) for text in tasks.instructions]
        report(f"encode for {stage.name}", step + 1, len(starts))
    clip_length = pipeline.tokenizer.model_max_length
    columns["t5_ids"].append(_token_ids(pipeline.tokenizer_2, texts, MAX_TEXT_TOKENS))
    columns["clip_ids"].append(_token_ids(pipeline.tokenizer, texts, clip_length))
    return LatentTasks(**{name: torch.cat(parts) for name, parts in columns.items()})


def flawed(
    tasks: shapes.ShapesBatch, config: PretrainConfig, generator: torch.Generator
) -> UInt8[Tensor, "batch height width 3"]:
    """Returns targets with the flaws of machine-made pairs.

    Some show no edit (the source), some have a colour cast, some both.
    """
    count = len(tasks.source)
    failed, cast = (
        torch.rand(count, generator=generator) < share
        for share in (config.failed_share, config.cast_share)
    )
    # One shift per channel for the complete image, uniform in +-cast_size.
    shift = (2 * torch.rand(count, 1, 1, 3, generator=generator) - 1) * config.cast_size
    images = torch.where(failed[:, None, None, None], tasks.source, tasks.target)
    shifted = (images.float() + shift).round().clamp(0, 255).byte()
    return torch.where(cast[:, None, None, None], shifted, images)


def _as_people_write(text: str, generator: torch.Generator) -> str:
    """Varies an instruction, so that neither form surprises the editor.

    One in four starts with a capital, one in four ends with a full stop.
    """
    capital, stop = (torch.rand(2, generator=generator) < 0.25).tolist()
    return (text[:1].upper() + text[1:] if capital else text) + ("." if stop else "")


def _token_ids(
    tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str], length: int
) -> Int[Tensor, "text length"]:
    """Returns ids padded to ``length`` as inference pads them.

    Raises:
        InputError: a text does not fit. It would be learned cut.
    """
    # Padding is read by the model: FLUX has no text mask.
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=False).input_ids
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > length:
        raise InputError(
            f"the instruction {texts[longest]!r} has {len(ids[longest])} tokens and {length} fit: "
            "its end would never be learned. Shorten the world's instructions or raise "
            "MAX_TEXT_TOKENS."
        )
    return torch.tensor(ids)


def ahead(items: Iterable[Item], make: Callable[[Item], Result]) -> Iterator[Result]:
    """Maps ``make`` over items, two results ahead on one thread: drawing hides behind training."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            # Two at most, because a batch in waiting holds memory.
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
