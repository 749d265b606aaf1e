"""Editors: the only home of diffusers. An editor encodes a task, gives velocities, decodes latents, and shows attention."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from rl_edit.method.attention import MassTally
from rl_edit.types import Conditioning, EditTask

BUILTIN = "builtin:tiny-kontext"
BUILTIN_WEIGHTS = Path(__file__).parent / "tiny" / "weights"


class EditorConfig(BaseModel):
    """Which editor, and how it is run. Every field changes numbers, so all of them are part of a run's identity.

    Attributes:
        path: ``builtin:tiny-kontext``, a directory written by ``save_pretrained``, or a Hugging Face repository id.
        revision: commit of a repository id; pin it for runs you want to repeat.
        resolution: canvas side in pixels; a task is fitted to about ``resolution ** 2`` pixels, aspect kept.
        guidance: embedded guidance scale, the same in rollout, training and evaluation (FLUX.1-Kontext: 2.5).
        true_cfg: scale of true classifier-free guidance, ``velocity = negative + true_cfg * (positive - negative)``; two forwards a
            velocity. 1 is off: the positive forward alone.
        negative_prompt: what the negative forward reads instead of the instruction.
        detach_negative: whether the negative forward is without gradient, as in flow_grpo's training of SD3. By default both
            branches have theirs (our choice): the gradient is then that of the velocity which is rolled out.
        max_text_tokens: T5 length; FLUX applies no text mask, so it is part of the function.
        micro_batch: rows per transformer call, in rollout and in training alike; shorter batches are padded. The
            same row then has the same bits in both, which makes the policy ratio exactly 1. Multiples of 4 are exact on CPU.
        attention_layers: the last so many joint layers are read for attention concentration (the paper's L).
        dtype: of the frozen base; the adapter is always fp32.
        device: where actors and learner run it; "auto" takes a GPU when there is one.
        gradient_checkpointing: trade compute for memory in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    path: str = BUILTIN
    revision: str | None = None
    resolution: int = Field(default=64, ge=16)
    guidance: float = Field(default=2.5, ge=0)
    true_cfg: float = Field(default=1.0, ge=1)
    negative_prompt: str = ""
    detach_negative: bool = False
    max_text_tokens: int = Field(default=32, ge=4)
    micro_batch: int = Field(default=4, ge=1)
    attention_layers: int = Field(default=2, ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> EditorConfig:
        if self.true_cfg == 1 and (self.negative_prompt or self.detach_negative):
            raise ValueError(
                f"negative_prompt {self.negative_prompt!r} and detach_negative {self.detach_negative} speak of a negative forward, which "
                "true_cfg 1 leaves out: raise true_cfg above 1, or leave them out."
            )
        return self


class Editor(Protocol):
    """What the system asks of an image editor."""

    config: EditorConfig
    transformer: nn.Module
    pixels_per_token: int

    def encode(self, task: EditTask) -> Conditioning:
        """Text and source encodings of a task that already lies on the canvas."""
        ...

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        """(token, channel) of the packed target latents."""
        ...

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        """The scheduler's grid from 1 to 0 for this canvas."""
        ...

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Guided velocity under the loaded weights; one conditioning for the whole batch, or one per row on one canvas.

        The tally records attention of the forward that reads the instruction.
        """
        ...

    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Images of clean packed latents."""
        ...


@dataclass(frozen=True)
class EditorFacts:
    """What can be known of an editor without loading its weights.

    Attributes:
        pixels_per_token: side of the square of pixels that one packed token covers; canvases are multiples of it.
    """

    pixels_per_token: int


def inspect_editor(config: EditorConfig) -> EditorFacts:
    """Finds an editor and reads its configuration only (on the hub: three small files).

    Raises:
        InputError: when it cannot be found or reached, with what to do.
    """
    from rl_edit.editors.flux_kontext import inspect

    return inspect(config)


def editor_identity(config: EditorConfig) -> str:
    """What names the frozen base: a hash of its directory's files, or repository id and revision.

    Files above 64 MiB enter with their size and first MiB, which holds a safetensors file's table of tensors.
    """
    where = BUILTIN_WEIGHTS if config.path == BUILTIN else Path(config.path)
    if not where.is_dir():
        return f"{config.path}@{config.revision or 'main'}"
    sha = hashlib.sha256()
    for file in sorted(
        path
        for path in where.rglob("*")
        if path.suffix in (".safetensors", ".json", ".txt", ".model")
    ):
        size = file.stat().st_size
        sha.update(f"{file.relative_to(where)}:{size};".encode())
        with file.open("rb") as stream:
            sha.update(stream.read() if size <= 64 << 20 else stream.read(1 << 20))
    return sha.hexdigest()


def load_editor(config: EditorConfig) -> Editor:
    """The editor of a config, on its device, frozen.

    Raises:
        InputError: when it cannot be found, with what to do.
    """
    from rl_edit.editors.flux_kontext import FluxKontextEditor

    return FluxKontextEditor.load(config)
