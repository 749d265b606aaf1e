"""FLUX.1-Kontext: our denoising loop's view of the real diffusers components.

The stock pipeline resizes silently and draws its own noise, so we drive its parts: encode, transformer, scheduler grid,
decode. Run with the same latents the result is bitwise the stock pipeline's (``tests/test_editor.py``).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from rl_edit.editors import BUILTIN, BUILTIN_WEIGHTS, EditorConfig, EditorFacts
from rl_edit.errors import InputError
from rl_edit.method import flow
from rl_edit.method.attention import MassTally, text_to_image_mass
from rl_edit.types import Conditioning, EditTask

TEXT_TENSORS = ("prompt_embeds", "pooled")
"""Encodings of a prompt: T5 states ``[text, text_dim]`` and CLIP's pooled vector ``[pooled_dim]``.

``text_rows`` ``[text]`` stands beside them: True for instruction tokens (no padding, no end marker),
the rows from which attention is read.
"""

NEGATIVE = "negative_"
"""Prefix of the same encodings of the negative prompt, present exactly where ``true_cfg`` exceeds 1."""


class FluxKontextEditor:
    """A frozen FluxKontextPipeline behind the Editor protocol. Shapes follow the legend of ``rl_edit.types``."""

    def __init__(self, pipeline: FluxKontextPipeline, config: EditorConfig) -> None:
        self.config = config
        self.pipeline = pipeline
        self.transformer: nn.Module = pipeline.transformer
        self.pixels_per_token = pipeline.vae_scale_factor * 2
        for module in (
            pipeline.transformer,
            pipeline.vae,
            pipeline.text_encoder,
            pipeline.text_encoder_2,
        ):
            module.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        joint = [
            *pipeline.transformer.transformer_blocks,
            *pipeline.transformer.single_transformer_blocks,
        ]
        _check_layers(config, len(joint))
        self._attention_modules = [
            block.attn for block in joint[len(joint) - config.attention_layers :]
        ]

    @classmethod
    def load(cls, config: EditorConfig) -> FluxKontextEditor:
        where, local = _locate(config)
        device = (
            config.device
            if config.device != "auto"
            else ("cuda" if torch.cuda.is_available() else "cpu")
        )
        diffusers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            pipeline = FluxKontextPipeline.from_pretrained(
                where,
                revision=config.revision,
                dtype=getattr(torch, config.dtype),
                local_files_only=local,
            )
        except Exception as error:
            raise _unreachable(where, local, error) from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), config)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.dtype)

    @torch.no_grad()
    def encode(self, task: EditTask) -> Conditioning:
        height, width, _ = task.source.shape
        unit = self.pixels_per_token
        if height % unit or width % unit:
            raise ValueError(
                f"task {task.task_id} is {height}x{width} px, not a multiple of {unit}: fit it to the canvas first"
            )
        # As a picture, not as a tensor: the processor then lays memory out as in the stock pipeline, and convolutions round by layout.
        image = self.pipeline.image_processor.preprocess(Image.fromarray(task.source.cpu().numpy()))
        clean = self.pipeline._encode_vae_image(image.to(self.device, self.dtype), generator=None)
        packed = self.pipeline._pack_latents(
            clean, 1, clean.shape[1], clean.shape[2], clean.shape[3]
        )
        encodings = {
            **self._text(task.instruction),
            "text_rows": self._instruction_rows(task.instruction),
        }
        if self.config.true_cfg > 1:
            negative = self._text(self.config.negative_prompt)
            encodings |= {NEGATIVE + name: value for name, value in negative.items()}
        return Conditioning(
            source_latents=packed[0].float().cpu(),
            grid=(height // unit, width // unit),
            tensors=encodings,
        )

    def _text(self, words: str) -> dict[str, Tensor]:
        """Encodes a prompt, padded to ``max_text_tokens``; see :data:`TEXT_TENSORS`."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=words,
            prompt_2=None,
            device=self.device,
            max_sequence_length=self.config.max_text_tokens,
        )
        return dict(zip(TEXT_TENSORS, (embeds[0].cpu(), pooled[0].cpu()), strict=True))

    def _instruction_rows(self, instruction: str) -> Bool[Tensor, " text"]:
        tokenizer = self.pipeline.tokenizer_2
        length = self.config.max_text_tokens
        tokens = tokenizer(
            instruction,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        rows = (
            tokens.attention_mask[0].bool()
            & (tokens.input_ids[0] != tokenizer.eos_token_id)
            & (tokens.input_ids[0] != tokenizer.pad_token_id)
        )
        return rows if bool(rows.any()) else torch.ones(length, dtype=torch.bool)

    def latent_shape(self, conditioning: Conditioning) -> tuple[int, int]:
        tokens, channels = conditioning.source_latents.shape
        return tokens, channels

    def sigmas(self, num_steps: int, conditioning: Conditioning) -> Float[Tensor, " step_plus_1"]:
        scheduler = self.pipeline.scheduler
        settings = scheduler.config
        mu = calculate_shift(
            conditioning.grid[0] * conditioning.grid[1],
            settings.get("base_image_seq_len", 256),
            settings.get("max_image_seq_len", 4096),
            settings.get("base_shift", 0.5),
            settings.get("max_shift", 1.15),
        )
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu, device="cpu"
        )
        return scheduler.sigmas.clone()

    def velocity(
        self,
        latents: Float[Tensor, "batch token channel"],
        sigma: Float[Tensor, " batch"],
        conditioning: Conditioning | Sequence[Conditioning],
        tally: MassTally | None = None,
    ) -> Float[Tensor, "batch token channel"]:
        """In chunks of ``micro_batch`` rows, the last padded with copies, so that a row's bits do not depend on its batch.

        With ``true_cfg`` w above 1 each chunk has a second forward, of the negative prompt and of the same shape, and the velocity is
        ``negative + w * (positive - negative)``, as in the stock pipeline. Attention is that of the positive forward.

        Raises:
            ValueError: for a conditioning whose negative branch the guidance needs or leaves unread.
        """
        rows = len(latents)
        size = self.config.micro_batch
        shared = isinstance(conditioning, Conditioning)
        many = (
            [conditioning] * rows if isinstance(conditioning, Conditioning) else list(conditioning)
        )
        outputs, masses = [], []
        if any(_guided(c) != (self.config.true_cfg > 1) for c in many):
            raise ValueError(
                f"a conditioning was encoded for other guidance than true_cfg {self.config.true_cfg:g}: encode the task anew"
            )
        packed: _Packed | None = None
        for start in range(0, rows, size):
            index = [min(start + i, rows - 1) for i in range(size)]
            if packed is None or not shared:
                packed = _Packed.of(
                    [many[i] for i in index], self.device, self.dtype, self.pipeline
                )
            out, mass = self._forward(
                latents[index], sigma[index], packed, record=tally is not None
            )
            if packed.negative is not None:
                with torch.set_grad_enabled(
                    torch.is_grad_enabled() and not self.config.detach_negative
                ):
                    away, _ = self._forward(
                        latents[index], sigma[index], packed.negative, record=False
                    )
                out = away + self.config.true_cfg * (out - away)
            kept = min(size, rows - start)
            outputs.append(out[:kept])
            if mass is not None:
                masses.append(mass[:kept])
        if tally is not None:
            tally.add(
                torch.cat(masses) if masses else latents.new_full(latents.shape[:2], float("nan"))
            )
        return torch.cat(outputs)

    def _forward(
        self, latents: Tensor, sigma: Tensor, packed: _Packed, *, record: bool
    ) -> tuple[Tensor, Tensor | None]:
        tokens = latents.shape[1]
        guidance = None
        settings: Any = self.transformer.config
        if settings.guidance_embeds:
            guidance = torch.full(
                (len(latents),), self.config.guidance, dtype=torch.float32, device=self.device
            )
        hidden = torch.cat([latents.to(self.device, self.dtype), packed.source], dim=1)
        with _attention(
            self._attention_modules if record else [], packed.text_rows, tokens
        ) as masses:
            out = self.transformer(
                hidden_states=hidden,
                timestep=flow.model_time(sigma.to(self.device), self.dtype),
                guidance=guidance,
                pooled_projections=packed.pooled,
                encoder_hidden_states=packed.prompt_embeds,
                txt_ids=packed.text_ids,
                img_ids=packed.image_ids,
                return_dict=False,
            )[0][:, :tokens]
        return out.to(latents.device, torch.float32), torch.stack(masses).mean(
            dim=0
        ) if masses else None

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch token channel"], conditioning: Conditioning
    ) -> UInt8[Tensor, "batch height width 3"]:
        height, width = (side * self.pixels_per_token for side in conditioning.grid)
        images = []
        for part in latents.split(self.config.micro_batch):
            spatial = self.pipeline._unpack_latents(
                part.to(self.device, self.dtype), height, width, self.pipeline.vae_scale_factor
            )
            spatial = (
                spatial / self.pipeline.vae.config.scaling_factor
            ) + self.pipeline.vae.config.shift_factor
            decoded = self.pipeline.vae.decode(spatial, return_dict=False)[0]
            pixels = self.pipeline.image_processor.postprocess(decoded, output_type="np")
            images.append(torch.from_numpy((pixels * 255).round().astype(np.uint8)))
        return torch.cat(images)


class _Packed:
    """Batched conditioning of one micro-batch, on the device, ids as the stock pipeline builds them."""

    def __init__(self, **tensors: Any) -> None:
        self.prompt_embeds: Tensor = tensors["prompt_embeds"]
        self.pooled: Tensor = tensors["pooled"]
        self.text_rows: Tensor = tensors["text_rows"]
        self.source: Tensor = tensors["source"]
        self.text_ids: Tensor = tensors["text_ids"]
        self.image_ids: Tensor = tensors["image_ids"]
        self.negative: _Packed | None = tensors.get("negative")

    @classmethod
    def of(
        cls,
        many: list[Conditioning],
        device: torch.device,
        dtype: torch.dtype,
        pipeline: FluxKontextPipeline,
    ) -> _Packed:
        grids = {c.grid for c in many}
        if len(grids) != 1:
            raise ValueError(f"one batch must share one canvas, got token grids {sorted(grids)}")
        rows, columns = next(iter(grids))
        target = pipeline._prepare_latent_image_ids(1, rows, columns, device, dtype)
        source = target.clone()
        source[..., 0] = 1
        shared: dict[str, Any] = {
            "text_rows": torch.stack([c.tensors["text_rows"] for c in many]).to(device),
            "source": torch.stack([c.source_latents for c in many]).to(device, dtype),
            "text_ids": torch.zeros(
                len(many[0].tensors["text_rows"]), 3, device=device, dtype=dtype
            ),
            "image_ids": torch.cat([target, source]),
        }

        def branch(prefix: str, **more: Any) -> _Packed:
            texts = {
                name: torch.stack([c.tensors[prefix + name] for c in many]).to(device, dtype)
                for name in TEXT_TENSORS
            }
            return cls(**texts, **shared, **more)

        return branch("", negative=branch(NEGATIVE) if _guided(many[0]) else None)


def _guided(conditioning: Conditioning) -> bool:
    """Does a conditioning have the negative branch of classifier-free guidance?"""
    return NEGATIVE + TEXT_TENSORS[0] in conditioning.tensors


@contextmanager
def _attention(modules: list[nn.Module], text_rows: Tensor, tokens: int) -> Iterator[list[Tensor]]:
    """Collects each module's text-to-target attention mass while the forward runs unchanged.

    Hooks read normalised queries and keys and never return a value, so the fused attention's output keeps its bits.
    In double blocks text has its own query norm and image keys come alone; in single blocks both come as [text, target, source].
    """
    masses: list[Tensor] = []
    handles = []
    num_text = text_rows.shape[1]
    for module in modules:
        seen = threading.local()

        def remember(
            name: str, seen: threading.local = seen
        ) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda _module, _inputs, output: setattr(seen, name, output)

        def measure(
            attn: nn.Module,
            _args: Any,
            kwargs: dict[str, Any],
            _output: Any,
            seen: threading.local = seen,
        ) -> None:
            double = hasattr(seen, "text_query")
            query = seen.text_query if double else seen.query[:, :num_text]
            key = seen.key[:, :tokens] if double else seen.key[:, num_text : num_text + tokens]
            rotary = kwargs.get("image_rotary_emb")
            if rotary is not None:
                query = apply_rotary_emb(
                    query, tuple(part[:num_text] for part in rotary), sequence_dim=1
                )
                key = apply_rotary_emb(
                    key,
                    tuple(part[num_text : num_text + tokens] for part in rotary),
                    sequence_dim=1,
                )
            masses.append(text_to_image_mass(query.detach(), key.detach(), text_rows))
            for name in ("text_query", "query", "key"):
                if hasattr(seen, name):
                    delattr(seen, name)

        for norm, name in (("norm_q", "query"), ("norm_k", "key")):
            handles.append(module.get_submodule(norm).register_forward_hook(remember(name)))
        if getattr(module, "added_kv_proj_dim", None) is not None:
            handles.append(
                module.get_submodule("norm_added_q").register_forward_hook(remember("text_query"))
            )
        handles.append(module.register_forward_hook(measure, with_kwargs=True))
    try:
        yield masses
    finally:
        for handle in handles:
            handle.remove()


def inspect(config: EditorConfig) -> EditorFacts:
    """Reads the pipeline's, the VAE's and the transformer's configuration, from the directory or the hub."""
    where, local = _locate(config)
    try:
        files = [
            Path(where) / name
            if local
            else Path(hf_hub_download(where, name, revision=config.revision))
            for name in ("model_index.json", "vae/config.json", "transformer/config.json")
        ]
        index, vae, transformer = (json.loads(file.read_text()) for file in files)
    except Exception as error:
        raise _unreachable(where, local, error) from error
    if index.get("_class_name") != FluxKontextPipeline.__name__:
        raise InputError(
            f"{where} is a {index.get('_class_name')}, this version trains {FluxKontextPipeline.__name__}: give such an editor"
        )
    _check_layers(config, transformer["num_layers"] + transformer["num_single_layers"])
    return EditorFacts(pixels_per_token=2 * 2 ** (len(vae["block_out_channels"]) - 1))


def _check_layers(config: EditorConfig, joint: int) -> None:
    if config.attention_layers > joint:
        raise InputError(
            f"editor.attention_layers is {config.attention_layers}, but {config.path} has {joint} joint layers: use at most that"
        )


def _locate(config: EditorConfig) -> tuple[str, bool]:
    """(directory or hub id, whether it is local)."""
    where = str(BUILTIN_WEIGHTS if config.path == BUILTIN else config.path)
    local = Path(where).is_dir()
    if config.path == BUILTIN and not local:
        raise InputError(
            f"the built-in editor is missing at {where}: reinstall, or make it with: rl-edit pretrain {where}"
        )
    if not local and (where.startswith((".", "/")) or where.count("/") != 1):
        raise InputError(
            f"no editor at {where}: give a directory written by save_pretrained, a Hugging Face id such as ORG/NAME, or {BUILTIN}"
        )
    return where, local


def _unreachable(where: str, local: bool, error: Exception) -> InputError:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    remedy = (
        "Is it a directory written by FluxKontextPipeline.save_pretrained?"
        if local
        else "Check the id and the network, and that you may read it "
        "(gated weights: accept the licence, then hf auth login); or give a local directory."
    )
    return InputError(
        f"cannot load the editor {where}{'' if local else ' from the Hugging Face hub'}: {reason}. {remedy}"
    )
