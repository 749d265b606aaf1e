"""The seam of editors: what a family of editors offers, and what one of its editors does.

A family is one file with two classes. Its settings (a frozen :class:`EditorSettings`) are the value
of ``editor:`` in a run's configuration; they inspect, name and load an :class:`Editor`. Everything
outside this package sees the members below and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

from jaxtyping import Float, UInt8
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from rl_edit.data.editor_text import TextReading
from rl_edit.editors.location import BUILTIN, identity_of
from rl_edit.editors.lora_targets import ATTENTION_PROJECTIONS
from rl_edit.method.attention import HeadAverage, MassTally
from rl_edit.types import Conditioning, EditTask

Dtype = Literal["float32", "bfloat16", "float16"]


class EditorSettings(BaseModel):
    """Settings that every family of editors has, and what follows from them.

    Every field changes numbers, so all of them are part of a run's identity. A family adds a
    ``kind``, settings of its own, :meth:`inspect` and :meth:`load`. The defaults below are those of
    the built-in editor; :meth:`defaults` gives those of any other.

    Attributes:
        path: ``builtin:tiny-kontext``, a directory written by ``save_pretrained``, or a Hugging
            Face repository id.
        revision: commit of a repository id. Pin it for runs that you want to repeat.
        resolution: canvas side in pixels. A task is fitted to about ``resolution ** 2`` pixels; its
            aspect is preserved. By default 64 for the built-in editor, else what the editor's VAE
            was made for (``sample_size`` of its configuration; FLUX.1-Kontext: 1024).
        micro_batch: rows per forward, in rollout and in training alike; shorter batches are padded.
            The same row then has the same bits in both, which makes the policy ratio exactly 1.
            Multiples of 4 are exact on CPU.
        attention_layers: the last so many layers are read for attention concentration (the L of
            RC-GRPO-Editing). 0 reads none.
        attention_average: order of averaging heads and renormalising over the target's tokens. The
            paper leaves it open, and candidates rank differently by it. "renormalised": all heads
            weigh the same. "joint": a head weighs as much as it attends to the target at all.
        dtype: of the frozen base. The adapter is always fp32. By default float32 for the built-in
            editor, else what its text encoder is stored in (FLUX.1-Kontext: bfloat16).
        device: where actors and learner run it. "auto" takes a GPU when there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    head_averages: ClassVar[tuple[HeadAverage, ...]] = ("renormalised",)
    """Orders that the family can measure."""
    released: ClassVar[tuple[str, ...]] = ()
    """Ids of the released checkpoints on the hub: by them the family is known offline."""
    # The place of the weights.
    path: str = BUILTIN
    revision: str | None = None
    # The numbers of every forward: they are the same in rollout and learner, or the ratio is not 1.
    resolution: int = Field(default=64, ge=16)
    micro_batch: int = Field(default=4, ge=1)
    attention_layers: int = Field(default=2, ge=0)
    attention_average: HeadAverage = "renormalised"
    dtype: Dtype = "float32"
    device: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, settings: Any) -> Any:
        """Fills in what was left out, so that a run records the numbers it used."""
        if not isinstance(settings, Mapping):
            return settings
        path = settings.get("path", cls.model_fields["path"].default)
        return {**(cls.defaults(path) if isinstance(path, str) else {}), **settings}

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.attention_average not in self.head_averages:
            raise ValueError(
                f"attention_average is {self.attention_average!r}, and this family of editors "
                f"measures {', '.join(self.head_averages)}: use that"
            )
        return self

    @classmethod
    def defaults(cls, path: str) -> dict[str, Any]:
        """Returns defaults of the editor at a path that are others than the family's fields.

        Reads small files on this machine at most: a configuration is read without a network.
        """
        return {}

    @property
    def guided(self) -> bool:
        """Does a velocity take a second forward, of a negative prompt?"""
        return False

    @property
    def edit_steps(self) -> int:
        """Solver steps of one edit where none are asked for."""
        return 28

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Layers that get an adapter where ``lora.targets`` is left out: attention projections."""
        return ATTENTION_PROJECTIONS

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...] | None:
        """Reads instructions as the editor will, without its weights.

        Returns:
            what it makes of each text; None where the family does not say, so nothing is checked.
        """
        return None

    def misfit(self, height: int, width: int) -> str:
        """Says why images of this size are nothing for this editor; "" where they are."""
        return ""

    def identity(self) -> str:
        """Names the frozen base: a hash of its directory's files, or repository id and revision."""
        return identity_of(self.path, self.revision)

    def skeleton(self) -> nn.Module | None:
        """Builds the transformer without its weights; None where the family cannot.

        LoRA targets and adapters are then checked before the weights are loaded.
        """
        return None

    def weight_bytes(self) -> int:
        """Counts the bytes of all weights once loaded; 0 where they are not on this machine.

        Processes that share a GPU are refused by it where they cannot fit.
        """
        return 0

    def evaluation_settings(self) -> dict[str, Any]:
        """Settings that an evaluation records and compares; None where the family has none."""
        # The keys of evaluation.json. A family of yours that has settings beyond them puts them
        # into identity().
        names = ("guidance", "true_cfg", "negative_prompt", "dtype", "max_text_tokens")
        return {name: getattr(self, name, None) for name in names}


@dataclass(frozen=True, kw_only=True)
class EditorFacts:
    """Facts of an editor that are known without its weights.

    Attributes:
        pixels_per_token: side of the square of pixels that one packed token covers. Canvases are
            multiples of it.
        notes: what a person should know about how it will be loaded, a sentence each.
    """

    pixels_per_token: int
    notes: tuple[str, ...] = ()


class Editor(Protocol):
    """An image editor on its device, frozen.

    Attributes:
        config: the settings it was loaded with.
        transformer: the module that makes the velocity. Adapters are attached to its linear layers,
            so its parameters take no gradient of their own.
        pixels_per_token: as in :class:`EditorFacts`.
    """

    # Read-only, so that a class may have a narrower type there.
    @property
    def config(self) -> EditorFamily: ...

    @property
    def transformer(self) -> nn.Module: ...

    @property
    def pixels_per_token(self) -> int: ...

    def encode(self, task: EditTask) -> Conditioning:
        """Encodes text and source of a task that already lies on the canvas.

        Everything that :meth:`velocity` and :meth:`decode` need goes into the record, on the CPU:
        it travels to other processes, and only an editor of the same settings reads it again.
        """
        ...

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        """Returns (token, channel) of the packed target latents."""
        ...

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        """Returns the scheduler's noise levels for this canvas, from 1 to 0."""
        ...

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """Predicts the velocity ``noise - clean`` under the adapter that is switched on.

        A row's bits must not depend on the batch it is in. Gradients flow to the adapter where
        they are enabled.

        Args:
            conditioning: one for the complete batch, or one per row on one canvas.
            tally: takes the attention mass of the forward that reads the instruction, NaN where
                none is measured.
        """
        ...

    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        """Decodes clean packed latents to images on the canvas."""
        ...


@runtime_checkable
class EditorFamily(Protocol):
    """Settings of an editor family, as the rest of the program sees them.

    :class:`EditorSettings` has all of them but :meth:`inspect` and :meth:`load`.
    """

    @property
    def kind(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def resolution(self) -> int: ...

    @property
    def micro_batch(self) -> int: ...

    @property
    def attention_layers(self) -> int: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def device(self) -> str: ...

    @property
    def guided(self) -> bool:
        """Does a velocity take a second forward, of a negative prompt?"""
        ...

    @property
    def edit_steps(self) -> int:
        """Solver steps of one edit where none are asked for."""
        ...

    def read_text(self, texts: Sequence[str]) -> tuple[TextReading, ...] | None:
        """Reads instructions as the editor will; None where it does not say how it reads."""
        ...

    def misfit(self, height: int, width: int) -> str:
        """Says why images of this size are nothing for this editor; "" where they are."""
        ...

    def identity(self) -> str:
        """Names the frozen base; equal names promise equal weights."""
        ...

    def evaluation_settings(self) -> dict[str, Any]:
        """Settings that an evaluation records and compares; None where the family has none."""
        ...

    def inspect(self) -> EditorFacts:
        """Reads the editor's configuration and the names of its files, and no weights.

        What passes here should load: a dry run asks nothing else of the editor.

        Raises:
            InputError: it cannot be found or reached, a file is missing, or a setting does not fit.
        """
        ...

    def load(self) -> Editor:
        """Loads the editor, frozen, on its device. Model libraries are imported here, not before.

        Raises:
            InputError: it cannot be found or reached, with what to do.
        """
        ...
