"""OmniGen2 in the conformance suite: an independent reference, as its pipeline is not in diffusers.

Written from the paper and the published configuration. Time runs from noise at 0 to clean at 1,
images stay unpacked between steps, and blocks are plain functions; only the linear layers are the
editor's own, so that adapters act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance import Family, Published, StockResult, image_of
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from rl_edit.types import EditTask

SYSTEM = (
    "You are a helpful assistant that generates high-quality images based on user instructions."
)


def rotated(values: Tensor, places: list[tuple[int, int, int]], widths: list[int]) -> Tensor:
    """Turns pairs of ``[batch, head, token, dim]`` by angles of order, row and column."""
    angles = torch.tensor(
        [
            [
                place[axis] * (1.0 / 10_000.0 ** (2 * i / width))
                for axis, width in enumerate(widths)
                for i in range(width // 2)
            ]
            for place in places
        ],
        dtype=torch.float64,
    )
    even, odd = values[..., 0::2].double(), values[..., 1::2].double()
    cos, sin = angles.cos(), angles.sin()
    pair = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return pair.flatten(-2).to(values.dtype)


def root_mean_square(values: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(values, weight.shape, weight, 1e-5)


class Reference:
    """The transformer as functions of its tensors."""

    def __init__(self, transformer: Any) -> None:
        self.layer: Callable[[str], Any] = transformer.get_submodule
        self.weights = dict(transformer.named_parameters())
        self.sizes = transformer.config

    def norm(self, name: str, values: Tensor) -> Tensor:
        return root_mean_square(values, self.weights[f"{name}.weight"])

    def attention(self, name: str, hidden: Tensor, places: Any) -> Tensor:
        heads, groups = self.sizes.num_attention_heads, self.sizes.num_kv_heads
        parts = []
        for part, count in (("q", heads), ("k", groups), ("v", groups)):
            made = self.layer(f"{name}.to_{part}")(hidden)
            made = made.reshape(*made.shape[:2], count, -1)
            if part != "v":
                scale = (made.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
                made = made * scale * self.weights[f"{name}.norm_{part}.weight"]
            made = made.transpose(1, 2)
            if part != "v":
                made = rotated(made, places, list(self.sizes.axes_dim_rope))
            # Head h reads the keys of group h // (heads / groups).
            parts.append(made[:, [head * count // heads for head in range(heads)]])
        mixed = functional.scaled_dot_product_attention(*parts)
        return self.layer(f"{name}.to_out.0")(mixed.transpose(1, 2).flatten(2))

    def mlp(self, name: str, hidden: Tensor) -> Tensor:
        gate, values = (self.layer(f"{name}.linear_{i}")(hidden) for i in (1, 3))
        return self.layer(f"{name}.linear_2")(functional.silu(gate) * values)

    def block(self, name: str, hidden: Tensor, places: Any, time: Tensor | None) -> Tensor:
        if time is None:
            scale, scale_mlp = torch.ones(()), torch.ones(())
            gate, gate_mlp = torch.ones(()), torch.ones(())
            normed = self.norm(f"{name}.norm1", hidden)
        else:
            numbers = self.layer(f"{name}.norm1.linear")(functional.silu(time)).unsqueeze(1)
            quarter = numbers.shape[-1] // 4
            scale, gate, scale_mlp, gate_mlp = numbers.split(quarter, dim=-1)
            scale, scale_mlp = 1 + scale, 1 + scale_mlp
            gate, gate_mlp = torch.tanh(gate), torch.tanh(gate_mlp)
            normed = self.norm(f"{name}.norm1.norm", hidden)
        attended = self.attention(f"{name}.attn", normed * scale, places)
        hidden = hidden + gate * self.norm(f"{name}.norm2", attended)
        inner = self.mlp(f"{name}.feed_forward", self.norm(f"{name}.ffn_norm1", hidden) * scale_mlp)
        return hidden + gate_mlp * self.norm(f"{name}.ffn_norm2", inner)

    def time(self, t: float, rows: int) -> Tensor:
        steps = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = self.sizes.timestep_scale * (torch.tensor(t, dtype=torch.float32) * steps)
        waves = torch.cat([angles.cos(), angles.sin()]).expand(rows, -1)
        first, second = (
            self.layer(f"time_caption_embed.timestep_embedder.linear_{i}") for i in (1, 2)
        )
        return second(functional.silu(first(waves)))

    def __call__(self, noisy: Tensor, t: float, text: Tensor, source: Tensor | None) -> Tensor:
        """Predicts ``clean - noise`` of latents ``[batch, channel, height, width]``."""
        height, width = (side // 2 for side in noisy.shape[-2:])
        words = [(i, i, i) for i in range(text.shape[1])]
        time = self.time(t, len(noisy))
        caption = self.layer("time_caption_embed.caption_embedder.1")(
            self.norm("time_caption_embed.caption_embedder.0", text)
        )
        parts, places, order = (
            [self.stack("context_refiner", caption, words, None)],
            words,
            len(words),
        )
        if source is not None:
            image = self.layer("ref_image_patch_embedder")(patches(source))
            image = image + self.weights["image_index_embedding"][0]
            there = [(order, y, x) for y in range(height) for x in range(width)]
            parts.append(self.stack("ref_image_refiner", image, there, time))
            places, order = places + there, order + max(height, width)
        there = [(order, y, x) for y in range(height) for x in range(width)]
        target = self.layer("x_embedder")(patches(noisy))
        parts.append(self.stack("noise_refiner", target, there, time))
        hidden = self.stack("layers", torch.cat(parts, dim=1), places + there, time)
        normed = functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        scale = self.layer("norm_out.linear_1")(functional.silu(time)).unsqueeze(1)
        out = self.layer("norm_out.linear_2")(normed * (1 + scale))
        return image_from(out[:, -height * width :], height, width)

    def stack(self, name: str, hidden: Tensor, places: Any, time: Tensor | None) -> Tensor:
        for index in range(len(self.layer(name))):
            hidden = self.block(f"{name}.{index}", hidden, places, time)
        return hidden


def patches(image: Tensor) -> Tensor:
    batch, channels, height, width = image.shape
    cells = image.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return torch.einsum("bchpwq->bhwpqc", cells).reshape(batch, -1, 4 * channels)


def image_from(tokens: Tensor, height: int, width: int) -> Tensor:
    cells = tokens.reshape(len(tokens), height, width, 2, 2, -1)
    return torch.einsum("bhwpqc->bchpwq", cells).reshape(len(tokens), -1, 2 * height, 2 * width)


def published_times(num_steps: int, latent_pixels: int) -> list[float]:
    """The released scheduler's times, each moved by up to 6e-8.

    The loop under test keeps ``1 - t`` in fp32, which has fewer digits for small t.
    """
    m = math.sqrt(latent_pixels) / 40
    uniform = np.linspace(0, 1, num_steps + 1, dtype=np.float32)[:-1].astype(np.float64)
    exact = torch.tensor([*(uniform / (m - m * uniform + uniform)), 1.0], dtype=torch.float32)
    kept = 1 - (1 - exact)
    assert float((kept - exact).abs().max()) < 6e-8
    return kept.tolist()


def states(editor: Any, words: str) -> Tensor:
    """The last hidden states, by the call that the pipeline makes."""
    parts = editor.pipeline
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": words}]
    text = parts.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    tokens = parts.tokenizer([text], padding="longest", return_tensors="pt")
    return parts.mllm(**tokens, output_hidden_states=True).hidden_states[-1]


@torch.no_grad()
def stock(editor: Any, task: EditTask, latents: Tensor, num_steps: int) -> StockResult:
    parts, rows = editor.pipeline, len(latents)
    height, width = (side // editor.pixels_per_token for side in task.edit_mask.shape)
    # In this order: convolutions round by the layout of memory.
    pixels = torch.from_numpy(np.array(image_of(task))[None]).permute(0, 3, 1, 2) / 255 * 2 - 1
    scale, shift = parts.vae.config.scaling_factor, parts.vae.config.shift_factor
    source = (parts.vae.encode(pixels).latent_dist.mean - shift) * scale
    text, negative = (
        states(editor, words).expand(rows, -1, -1)
        for words in (task.instruction, editor.config.negative_prompt)
    )
    model = Reference(parts.transformer)
    sample, source = image_from(latents, height, width), source.expand(rows, -1, -1, -1)
    times = published_times(num_steps, sample.shape[-1] * sample.shape[-2])
    text_scale, image_scale = editor.config.true_cfg, editor.config.image_cfg
    for t, after in pairwise(times):
        at = partial(model, sample, t)
        velocity = at(text, source)
        if text_scale > 1:
            none = at(negative, None)
            if image_scale > 1:
                pictured = at(negative, source)
                velocity = (
                    none + image_scale * (pictured - none) + text_scale * (velocity - pictured)
                )
            else:
                velocity = none + text_scale * (velocity - none)
        sample = sample + (torch.tensor(after) - torch.tensor(t)) * velocity
    decoded = parts.vae.decode(sample / scale + shift, return_dict=False)[0]
    images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return StockResult(latents=patches(sample), images=(images * 255).round().astype(np.uint8))


def read_words(editor: Any, instruction: str, rows: Tensor) -> str:
    tokenizer = editor.pipeline.tokenizer
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids
    return str(tokenizer.decode([i for i, marked in zip(ids, rows, strict=True) if marked]))


def load_adapter(editor: Any, directory: Path, file: str) -> None:
    """Loads a file with diffusers' own reader, which takes alpha from the settings in the file.

    The released loader leaves them out, so that alpha is the rank there.
    """
    place: dict[str, Any] = {"weight_name": file}
    source: Any = directory
    tensors = load_file(directory / file)
    if all(name.startswith("diffusion_model.") for name in tensors):
        # ComfyUI gives this model's layers the released names.
        source = {f"transformer.{name.partition('.')[2]}": t for name, t in tensors.items()}
        place = {}
    editor.transformer.load_lora_adapter(source, prefix="transformer", **place)


def build(config: Any) -> torch.nn.Module:
    from rl_edit.editors.omnigen2_transformer import OmniGen2Transformer2DModel

    return OmniGen2Transformer2DModel.from_config(config)


FAMILY = Family(
    kind="omnigen2",
    pipeline="OmniGen2Pipeline",
    stock=stock,
    read_words=read_words,
    settings={"resolution": 64, "true_cfg": 1.0, "image_cfg": 1.0},
    guided=(
        {"true_cfg": 5.0, "image_cfg": 2.0, "negative_prompt": "blurry"},
        {"true_cfg": 4.0, "image_cfg": 1.0},
    ),
    attention="rl_edit.editors.omnigen2_transformer",
    target_last=True,
    load_adapter=load_adapter,
    build=build,
    published=(
        Published(
            name="OmniGen2/OmniGen2",
            config={
                "_class_name": "OmniGen2Transformer2DModel",
                "patch_size": 2,
                "in_channels": 16,
                "out_channels": None,
                "hidden_size": 2520,
                "num_layers": 32,
                "num_refiner_layers": 2,
                "num_attention_heads": 21,
                "num_kv_heads": 7,
                "multiple_of": 256,
                "ffn_dim_multiplier": None,
                "norm_eps": 1e-05,
                "axes_dim_rope": [40, 40, 40],
                "axes_lens": [10_000, 10_000, 10_000],
                "text_feat_dim": 2048,
                "timestep_scale": 1000.0,
            },
            # Published as "4B"; that of the released code for the configuration of its fine-tuning.
            parameters=3_967_161_400,
        ),
    ),
)
