"""The transformer of OmniGen2 (arXiv 2506.18871), with the names of its released tensors.

Text, references and target pass through refiners of their own, then as one sequence
``[text, references, target]`` through joint blocks of self-attention. Blocks are those of
Lumina-Image 2.0: sandwich norms, gates behind tanh, grouped keys, gated MLP. All rows of a batch
have texts of one length and images of one size, so that nothing is padded and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import RMSNorm as HeadNorm
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

Grid = tuple[int, int]
"""(rows, columns) of an image's tokens."""

_THETA = 10_000
_FREQUENCIES = 256
_CONDITION = 1024
"""The most numbers of the embedding of time."""


def positions(num_text: int, references: Sequence[Grid], target: Grid) -> Int[Tensor, "all 3"]:
    """Places tokens on three axes: order, row, column.

    A word has its place in the text on each axis. An image has one place in the order; the next
    image's lies behind it by its longer side.
    """
    text = torch.arange(num_text)
    parts, order = [text[:, None].expand(-1, 3)], num_text
    for rows, columns in (*references, target):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place = torch.full_like(row, order)
        parts.append(torch.stack([place, row, column], dim=-1).flatten(0, 1))
        order += max(rows, columns)
    return torch.cat(parts)


def rotary(places: Int[Tensor, "all 3"], widths: Sequence[int]) -> Complex[Tensor, "all half"]:
    """Returns the rotations of places; each axis turns its own part of a head, in double."""
    angles = []
    for axis, width in enumerate(widths):
        # Frequencies fall from 1 to 1/theta over the pairs of an axis.
        steps = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles.append(places[:, axis, None] * (1.0 / _THETA**steps))
    angle = torch.cat(angles, dim=-1)
    return torch.polar(torch.ones_like(angle), angle)


class Rotation(nn.Module):
    """Turns queries and keys. A module, so that a hook can read them as attention does."""

    def forward(
        self, query: Tensor, key: Tensor, turns: Complex[Tensor, "token half"]
    ) -> tuple[Tensor, Tensor]:
        """Turns neighbouring pairs of numbers, all heads alike."""
        return self._turned(query, turns), self._turned(key, turns)

    @staticmethod
    def _turned(values: Float[Tensor, "batch token head dim"], turns: Tensor) -> Tensor:
        # A pair is a complex number, which a rotation multiplies.
        pairs = torch.view_as_complex(values.float().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * turns[:, None]).flatten(-2)
        return turned.to(values.dtype)


class SelfAttention(nn.Module):
    """Self-attention with normalised queries and keys; several query heads share a key."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.to_q = nn.Linear(width, heads * self.head_width, bias=False)
        self.to_k = nn.Linear(width, key_heads * self.head_width, bias=False)
        self.to_v = nn.Linear(width, key_heads * self.head_width, bias=False)
        # A list, as the released name is to_out.0.
        self.to_out = nn.ModuleList([nn.Linear(heads * self.head_width, width, bias=False)])
        # Each head is normalised by itself.
        self.norm_q = HeadNorm(self.head_width, eps=1e-5)
        self.norm_k = HeadNorm(self.head_width, eps=1e-5)
        # It has no tensors, so the names of the others stay as released.
        self.rotation = Rotation()

    def forward(self, hidden: Float[Tensor, "batch token width"], turns: Tensor) -> Tensor:
        """Mixes all tokens."""
        query, key, value = (
            project(hidden).unflatten(-1, (-1, self.head_width))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        query, key = self.rotation(self.norm_q(query), self.norm_k(key), turns)
        shared = query.shape[2] // key.shape[2]
        # Repeated by hand: not every kernel knows shared keys.
        key, value = (part.repeat_interleave(shared, dim=2) for part in (key, value))
        # [batch, token, head, dim], as diffusers hands it to every kernel.
        mixed: Tensor = dispatch_attention_fn(query, key, value)
        out: Tensor = self.to_out[0](mixed.flatten(-2))
        return out


class FeedForward(nn.Module):
    """A gated MLP (SwiGLU)."""

    def __init__(self, width: int, multiple_of: int, factor: float | None) -> None:
        super().__init__()
        inner = 4 * width if factor is None else int(factor * 4 * width)
        # Rounded up to a multiple.
        inner = -(-inner // multiple_of) * multiple_of
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(inner, width, bias=False)
        self.linear_3 = nn.Linear(width, inner, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Gates in fp32."""
        gate = nn.functional.silu(self.linear_1(hidden).float()).to(hidden.dtype)
        out: Tensor = self.linear_2(gate * self.linear_3(hidden))
        return out


class ModulatedNorm(nn.Module):
    """A norm that the time scales; it also gives the block's gates."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(min(width, _CONDITION), 4 * width)
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(self, hidden: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the scaled input, the gates of attention and MLP, and the scale of the MLP."""
        # [batch, 1, 4 width]: the same for all tokens of a row.
        numbers = self.linear(nn.functional.silu(time))[:, None]
        scale, gate, scale_mlp, gate_mlp = numbers.chunk(4, dim=-1)
        return self.norm(hidden) * (1 + scale), gate.tanh(), gate_mlp.tanh(), 1 + scale_mlp


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Numbers that all blocks share."""

    width: int
    heads: int
    key_heads: int
    multiple_of: int
    factor: float | None
    eps: float


class Block(nn.Module):
    """Attention and MLP, each between two norms; with the time, scaled and gated."""

    def __init__(self, settings: _Sizes, *, modulated: bool) -> None:
        super().__init__()
        width, eps = settings.width, settings.eps
        self.attn = SelfAttention(width, settings.heads, settings.key_heads)
        self.feed_forward = FeedForward(width, settings.multiple_of, settings.factor)
        self.norm1 = ModulatedNorm(width, eps) if modulated else nn.RMSNorm(width, eps=eps)
        self.norm2 = nn.RMSNorm(width, eps=eps)
        self.ffn_norm1 = nn.RMSNorm(width, eps=eps)
        self.ffn_norm2 = nn.RMSNorm(width, eps=eps)

    def forward(self, hidden: Tensor, turns: Tensor, time: Tensor | None = None) -> Tensor:
        """Adds what attention and MLP make of the tokens."""
        made: Tensor
        if time is None:
            # Text refiners know no time.
            hidden = hidden + self.norm2(self.attn(self.norm1(hidden), turns))
            made = self.ffn_norm2(self.feed_forward(self.ffn_norm1(hidden)))
            return hidden + made
        parts: tuple[Tensor, Tensor, Tensor, Tensor] = self.norm1(hidden, time)
        # The gates are behind their tanh already.
        scaled, gate, gate_mlp, scale_mlp = parts
        hidden = hidden + gate * self.norm2(self.attn(scaled, turns))
        made = self.ffn_norm2(self.feed_forward(self.ffn_norm1(hidden) * scale_mlp))
        return hidden + gate_mlp * made


class TimeAndCaption(nn.Module):
    """Embeds the time and the text encoder's states."""

    def __init__(self, settings: _Sizes, *, text_width: int, time_scale: float) -> None:
        super().__init__()
        condition = min(settings.width, _CONDITION)
        self.time_proj = Timesteps(
            _FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=0.0, scale=time_scale
        )
        self.timestep_embedder = nn.ModuleDict(
            {
                "linear_1": nn.Linear(_FREQUENCIES, condition),
                "linear_2": nn.Linear(condition, condition),
            }
        )
        self.caption_embedder = nn.Sequential(
            nn.RMSNorm(text_width, eps=settings.eps), nn.Linear(text_width, settings.width)
        )

    def forward(self, time: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns both embeddings in the number format of the text."""
        # As released: waves in fp32, then in the number format of the text.
        waves = self.time_proj(time).to(text.dtype)
        steps = self.timestep_embedder
        condition = steps["linear_2"](nn.functional.silu(steps["linear_1"](waves)))
        return condition, self.caption_embedder(text)


class Output(nn.Module):
    """The last norm, scaled by the time, and the projection to patches."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(min(width, _CONDITION), width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear_2 = nn.Linear(width, patch)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Returns patches."""
        scale = self.linear_1(nn.functional.silu(time))[:, None]
        out: Tensor = self.linear_2(self.norm(hidden) * (1 + scale))
        return out


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The transformer; class and settings have the names of the released configuration.

    ``axes_lens`` bounds tables of rotations elsewhere and is not read: they are computed here for
    the places that occur.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2304,
        num_layers: int = 26,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 24,
        num_kv_heads: int = 8,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, ...] = (32, 32, 32),
        axes_lens: tuple[int, ...] = (300, 512, 512),
        text_feat_dim: int = 1024,
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        # Each axis turns its part of a head, so the parts must fill it.
        head = hidden_size // num_attention_heads
        if sum(axes_dim_rope) != head:
            raise ValueError(f"axes_dim_rope {axes_dim_rope} do not add up to a head's {head}")
        sizes = _Sizes(
            width=hidden_size,
            heads=num_attention_heads,
            key_heads=num_kv_heads,
            multiple_of=multiple_of,
            factor=ffn_dim_multiplier,
            eps=norm_eps,
        )

        def blocks(count: int, *, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList([Block(sizes, modulated=modulated) for _ in range(count)])

        # A token is a patch of latent pixels with all their channels.
        patch = patch_size**2 * in_channels
        self.x_embedder = nn.Linear(patch, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch, hidden_size)
        self.time_caption_embed = TimeAndCaption(
            sizes, text_width=text_feat_dim, time_scale=timestep_scale
        )
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.context_refiner = blocks(num_refiner_layers, modulated=False)
        self.layers = blocks(num_layers)
        self.norm_out = Output(hidden_size, patch_size**2 * (out_channels or in_channels))
        # A vector for the first reference, one for the second, and so on: up to five.
        self.image_index_embedding = nn.Parameter(torch.zeros(5, hidden_size))
        self.gradient_checkpointing = False

    def forward(
        self,
        target: Float[Tensor, "batch token patch"],
        time: Float[Tensor, " batch"],
        text: Float[Tensor, "batch text text_width"],
        references: Sequence[Float[Tensor, "batch other patch"]],
        grids: Sequence[Grid],
    ) -> Float[Tensor, "batch token patch"]:
        """Predicts the velocity ``clean - noise``.

        Args:
            target: noisy patches; the numbers of a patch are ordered row, column, channel.
            time: 0 is noise, 1 is clean.
            references: clean patches of other images.
            grids: of the references, then of the target.
        """
        # One rotation per place, cut into the parts of the sequence.
        places = positions(text.shape[1], grids[:-1], grids[-1])
        turns = rotary(places, self.config.axes_dim_rope).to(target.device)
        lengths = [text.shape[1], *(image.shape[1] for image in (*references, target))]
        words, *others, last = turns.split(lengths)
        condition, hidden = self.time_caption_embed(time, text)
        for block in self.context_refiner:
            hidden = block(hidden, words)
        parts = [hidden]
        for index, (image, turn) in enumerate(zip(references, others, strict=True)):
            # Each reference is refined alone.
            image = self.ref_image_patch_embedder(image) + self.image_index_embedding[index]
            for block in self.ref_image_refiner:
                image = block(image, turn, condition)
            parts.append(image)
        noisy = self.x_embedder(target)
        for block in self.noise_refiner:
            noisy = block(noisy, last, condition)
        # The target comes last, and only its tokens are read again.
        joint = torch.cat([*parts, noisy], dim=1)
        for block in self.layers:
            joint = self._run(block, joint, turns, condition)
        out: Tensor = self.norm_out(joint, condition)
        return out[:, -target.shape[1] :]

    def _run(self, block: nn.Module, *inputs: Tensor) -> Any:
        # Not where no gradient is asked for: recomputing would only cost time.
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
