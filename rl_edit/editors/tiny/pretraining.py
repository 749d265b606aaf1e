"""Makes `tiny-kontext`, the built-in editor, from nothing: a stock `FluxKontextPipeline` small enough to ship.

Three stages, on CPU, from the shapes world alone: (1) an autoencoder by reconstruction; (2) the transformer with both
text encoders by flow matching on (source, instruction, target), conditioned on the source exactly as the stock
pipeline conditions it (clean source tokens appended to the noisy target tokens); (3) some hundred steps more on pairs
with the flaws of machine-made pairs, which is what leaves reinforcement learning something to sharpen. The product is a
directory that `FluxKontextPipeline.from_pretrained` loads without network, with a model card that states what was measured.

Every batch is a function of (seed, stage, step), never of a running generator, so a killed run that is started again
ends in the same bytes as one that was not. This file does not adapt editors with rewards; that is the learner's work.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import load_file, save
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from rl_edit.data import shapes
from rl_edit.editors.tiny.recipe import CHECKPOINT_DIR, PIXELS_PER_TOKEN, VAE_WIDTHS, PretrainConfig
from rl_edit.errors import InputError
from rl_edit.files import replace_file, replace_json
from rl_edit.types import PairedTask

MAX_TEXT_TOKENS = 32
"""T5 length in training and inference. FLUX has no text mask, so padding is part of what the model learns."""

DEFAULT_GUIDANCE = 2.5
EVALUATION_STEPS = 6
LATENT_CHANNELS = 4
MODELS = ("vae", "transformer", "text_encoder", "text_encoder_2")
CARD = Path(__file__).parent / "tiny" / "card.md"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EditMetrics:
    """What an editor does on held-out tasks. Means over ``num_tasks`` tasks; PSNR in dB of 8-bit RGB.

    Attributes:
        vae_psnr: reconstruction of whole targets; the ceiling of everything below.
        vae_background_psnr: reconstruction of the sources outside the edit mask.
        progress: ``1 - |edit - target| / |source - target|`` inside the mask, clipped to [0, 1]; 1 is a perfect edit.
        progress_by_type: the same per task type.
        background_psnr: edit against source outside the mask.
    """

    num_tasks: int
    vae_psnr: float
    vae_background_psnr: float
    progress: float
    progress_by_type: dict[str, float]
    background_psnr: float


# ---------------------------------------------------------------------------------------------------------------------
# The architecture: real classes, small numbers.


def make_t5_tokenizer(words: tuple[str, ...]) -> T5TokenizerFast:
    """Unigram tokenizer: one piece per known word (lower case and Capitalised), single characters for the rest.

    Characters cover ASCII and Latin-1; anything beyond becomes ``<unk>`` in place, so every text encodes.
    """
    pieces: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    characters = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
    pieces += [(c, -10.0) for c in characters]
    seen = {piece for piece, _ in pieces}
    for word in words:
        # A word follows a space almost always; the piece without one serves text such as "(red".
        for piece, score in ((f"▁{word}", -1.0), (f"▁{word.capitalize()}", -1.5), (word, -2.0)):
            if piece not in seen:
                seen.add(piece)
                pieces.append((piece, score))
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def make_clip_tokenizer(words: tuple[str, ...]) -> CLIPTokenizer:
    """Byte-level BPE over all 256 bytes, with merges that make each known word one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(f"{c}</w>" for c in alphabet)]
    merges: dict[tuple[str, str], int] = {}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word in words:
        ((symbols, _),) = byte_level.pre_tokenize_str(word.lower())
        parts = [*symbols[:-1], f"{symbols[-1]}</w>"]
        # Apply the merges that exist, in rank order, before adding new ones: a merge learned from an earlier word
        # ("r"+"e" of "red") fires first in a later one ("green"), and new merges must start from what it leaves.
        while pairs := [
            (merges[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in merges
        ]:
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = len(merges)
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=list(merges), model_max_length=77)


def new_editor(*, seed: int) -> FluxKontextPipeline:
    """An untrained `tiny-kontext` in eval mode: every class is the one FLUX.1-Kontext uses. Deterministic in ``seed``."""
    words = tuple(shapes.vocabulary())
    tokenizer, tokenizer_2 = make_clip_tokenizer(words), make_t5_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=64,
                d_kv=16,
                num_heads=4,
                d_ff=128,
                num_layers=2,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=MAX_TEXT_TOKENS,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                is_encoder_decoder=False,
                use_cache=False,
            )
        )
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        )
        # Blocks that start as the identity (adaLN-zero, Peebles & Xie 2022, sec. 3.2) save about a thousand steps here.
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(VAE_WIDTHS),
            up_block_types=("UpDecoderBlock2D",) * len(VAE_WIDTHS),
            block_out_channels=VAE_WIDTHS,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=1.0,
            shift_factor=0.0,
            force_upcast=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def trainable(pipeline: FluxKontextPipeline) -> nn.ModuleDict:
    """What flow matching trains: the transformer and both text encoders (not the autoencoder)."""
    return nn.ModuleDict(
        {
            "transformer": pipeline.transformer,
            "clip": pipeline.text_encoder,
            "t5": pipeline.text_encoder_2,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True, kw_only=True)
class LatentTasks:
    """Pretraining tasks as the transformer sees them: packed normalised latents and token ids."""

    sources: Float[Tensor, "task token channel"]
    targets: Float[Tensor, "task token channel"]
    edit_masks: Bool[Tensor, "task token channel"]
    t5_ids: Int[Tensor, "task text"]
    clip_ids: Int[Tensor, "task clip_text"]


def pixels(images: UInt8[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
    """Bytes to the autoencoder's range [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def pack(
    latents: Float[Tensor, "batch channel rows columns"],
) -> Float[Tensor, "batch token packed"]:
    """2x2 latent patches to tokens, row-major; the packing of the stock pipeline."""
    batch, channels, rows, columns = latents.shape
    return FluxKontextPipeline._pack_latents(latents, batch, channels, rows, columns)


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: UInt8[Tensor, "batch height width 3"]
) -> Float[Tensor, "batch token channel"]:
    """Packed, normalised posterior modes, as the stock pipeline encodes a source image."""
    mode = vae.encode(pixels(images)).latent_dist.mode()
    return pack((mode - vae.config.shift_factor) * vae.config.scaling_factor)


def latent_tasks(
    pipeline: FluxKontextPipeline, stage: FlowStage, config: PretrainConfig, report: _Report
) -> LatentTasks:
    """Draws and encodes the pretraining tasks of a stage: ``config.num_tasks``, or as many as its steps can visit."""
    chunk, num_tasks = 256, min(config.num_tasks, stage.steps * config.batch)
    starts = range(0, num_tasks, chunk)
    columns: dict[str, list[Tensor]] = {name: [] for name in LatentTasks.__dataclass_fields__}
    texts: list[str] = []
    writing = torch.Generator().manual_seed(config.seed)
    for step, tasks in enumerate(
        _ahead(starts, lambda start: _draw(start, min(chunk, num_tasks - start), config))
    ):
        targets = (
            flawed(tasks, config, _generator(config.seed, 4, step))
            if stage.flawed
            else tasks.target
        )
        columns["sources"].append(encode_images(pipeline.vae, tasks.source))
        columns["targets"].append(encode_images(pipeline.vae, targets))
        edited = functional.max_pool2d(tasks.mask[:, None].float(), PIXELS_PER_TOKEN // 2)
        columns["edit_masks"].append(pack(edited.expand(-1, LATENT_CHANNELS, -1, -1)).bool())
        texts += [_as_people_write(text, writing) for text in tasks.instructions]
        report.step(f"encode for {stage.name}", step + 1, len(starts), float("nan"))
    columns["t5_ids"].append(_token_ids(pipeline.tokenizer_2, texts, MAX_TEXT_TOKENS))
    columns["clip_ids"].append(
        _token_ids(pipeline.tokenizer, texts, pipeline.tokenizer.model_max_length)
    )
    return LatentTasks(**{name: torch.cat(parts) for name, parts in columns.items()})


def flawed(
    tasks: shapes.ShapesBatch, config: PretrainConfig, generator: torch.Generator
) -> UInt8[Tensor, "batch height width 3"]:
    """Targets with the flaws of pairs that machines made: some show no edit, some a colour cast, some both."""
    count = len(tasks.source)
    failed, cast = (
        torch.rand(count, generator=generator) < share
        for share in (config.failed_share, config.cast_share)
    )
    shift = (2 * torch.rand(count, 1, 1, 3, generator=generator) - 1) * config.cast_size
    images = torch.where(failed[:, None, None, None], tasks.source, tasks.target)
    shifted = (images.float() + shift).round().clamp(0, 255).byte()
    return torch.where(cast[:, None, None, None], shifted, images)


def _draw(start: int, count: int, config: PretrainConfig) -> shapes.ShapesBatch:
    return shapes.batch("pretrain", start, count, config.seed)


def _as_people_write(text: str, generator: torch.Generator) -> str:
    """One in four starts with a capital, one in four ends with a full stop, so that neither surprises the editor."""
    capital, stop = (torch.rand(2, generator=generator) < 0.25).tolist()
    return (text[:1].upper() + text[1:] if capital else text) + ("." if stop else "")


def _token_ids(
    tokenizer: CLIPTokenizer | T5TokenizerFast, texts: list[str], length: int
) -> Int[Tensor, "text length"]:
    """Ids padded to ``length`` as inference pads them. A text that does not fit would be learned cut, so it raises."""
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=False).input_ids
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > length:
        raise InputError(
            f"the instruction {texts[longest]!r} has {len(ids[longest])} tokens and {length} fit: its end would never be learned. "
            "Shorten the world's instructions or raise MAX_TEXT_TOKENS."
        )
    return torch.tensor(ids)


def _ahead(items: Iterable[Item], make: Callable[[Item], Result]) -> Iterator[Result]:
    """``map(make, items)``, two results ahead on one thread, so that drawing hides behind training."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---------------------------------------------------------------------------------------------------------------------
# The two losses. Each is a function of the step alone (given the weights).


def vae_losses(vae: AutoencoderKL, config: PretrainConfig, steps: range) -> Iterator[Tensor]:
    """Reconstruction loss of each step of ``steps``: L1 + 10 MSE + 1e-3 KL per latent.

    The MSE is what PSNR measures; L1 keeps edges; the KL leaves latents bounded and smooth enough to denoise. Every
    task is new; even rows show the source, odd rows the target.
    """
    for step, tasks in zip(
        steps,
        _ahead(steps, lambda s: _draw(s * config.vae_batch, config.vae_batch, config)),
        strict=True,
    ):
        images = tasks.source.clone()
        images[1::2] = tasks.target[1::2]
        clean = pixels(images)
        posterior = vae.encode(clean).latent_dist
        decoded = vae.decode(posterior.sample(_generator(config.seed, 1, step))).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        yield (
            functional.l1_loss(decoded, clean)
            + 10.0 * functional.mse_loss(decoded, clean)
            + 1e-3 * kl
        )


def flow_losses(
    pipeline: FluxKontextPipeline,
    tasks: LatentTasks,
    stage: FlowStage,
    config: PretrainConfig,
    steps: range,
) -> Iterator[Tensor]:
    """Flow-matching loss of each step of ``steps`` (Lipman et al. 2023; rectified flow, Esser et al. 2024).

    ``x = (1 - sigma) * clean + sigma * noise``, velocity target ``noise - clean``; sigma is uniform or logit-normal in
    equal parts, then moved by the resolution shift that the scheduler applies at this token count. Latents inside the
    edit mask weigh ``config.edit_weight``.
    """
    side = config.resolution // PIXELS_PER_TOKEN
    num_tokens = side * side
    prepare_ids = FluxKontextPipeline._prepare_latent_image_ids
    target_ids = prepare_ids(1, side, side, torch.device("cpu"), torch.float32)
    source_ids = target_ids.clone()
    source_ids[:, 0] = 1
    img_ids = torch.cat([target_ids, source_ids])
    txt_ids = torch.zeros(MAX_TEXT_TOKENS, 3)
    shift = math.exp(calculate_shift(num_tokens))
    for step in steps:
        generator = _generator(config.seed, 5 if stage.flawed else 2, step)
        rows = torch.randint(len(tasks.sources), (config.batch,), generator=generator)
        clean, edited = tasks.targets[rows], tasks.edit_masks[rows]
        noise = torch.randn(clean.shape, generator=generator)
        uniform = torch.rand(config.batch, generator=generator)
        logit_normal = torch.sigmoid(torch.randn(config.batch, generator=generator))
        sigma = torch.where(
            torch.rand(config.batch, generator=generator) < 0.5, uniform, logit_normal
        )
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        noisy = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        velocity = pipeline.transformer(
            hidden_states=torch.cat([noisy, tasks.sources[rows]], dim=1),
            timestep=sigma,
            # The embedding exists because FLUX.1-Kontext has it; any value in use must be harmless, so all are trained.
            guidance=1 + 3 * torch.rand(config.batch, generator=generator),
            pooled_projections=pipeline.text_encoder(tasks.clip_ids[rows]).pooler_output,
            encoder_hidden_states=pipeline.text_encoder_2(tasks.t5_ids[rows])[0],
            txt_ids=txt_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0][:, :num_tokens]
        weight = torch.where(edited, config.edit_weight, 1.0)
        yield (weight * (velocity - (noise - clean)).square()).sum() / weight.sum()


def _generator(seed: int, stage: int, step: int) -> torch.Generator:
    """The randomness of one step, whatever ran before it."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{step}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# ---------------------------------------------------------------------------------------------------------------------
# Training: one loop for both kinds of stage.


class _Report:
    """Progress on a terminal; a line every ``log_every`` steps elsewhere."""

    def __init__(self, console: Console, log_every: int) -> None:
        self._console = console
        self._log_every = log_every
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), console=console,
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._mean = float("nan")

    def __enter__(self) -> _Report:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def step(self, stage: str, done: int, total: int, loss: float) -> None:
        if stage not in self._began:
            self._began[stage] = (time.monotonic(), done - 1)
            self._bars[stage] = self._progress.add_task(stage, total=total, loss="")
            self._mean = loss
        self._mean += 0.02 * (loss - self._mean)
        shown = "" if math.isnan(self._mean) else f"loss {self._mean:.4f}"
        self._progress.update(self._bars[stage], completed=done, loss=shown)
        if not self._console.is_terminal and (done % self._log_every == 0 or done == total):
            since, first = self._began[stage]
            seconds = (time.monotonic() - since) / (done - first)
            self.say(
                f"{stage} {done}/{total}  {shown}  {seconds:.3f} s a step, {seconds * (total - done) / 60:.1f} min left"
            )


class _Averaged:
    """A module in training: AdamW, and an exponential moving average of the weights, which is what gets saved."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.module = module
        self.parameters: list[Tensor] = list(module.parameters())
        # No weight decay on vectors (norms, biases): shrinking them helps nothing.
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self._decay = decay

    def update(self, loss: Tensor, *, lr: float, step: int) -> None:
        """One AdamW step. The average starts short (Karras et al. 2024 on warm-up of EMA) and grows to its decay."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module under its averaged weights and in eval mode, for the length of the block."""
        live = [p.detach().clone() for p in self.parameters]
        self._set(self.average)
        self.module.eval()
        yield
        self.module.train()
        self._set(live)

    def finish(self) -> None:
        """Puts the averaged weights in for good."""
        self._set(self.average)
        self.module.eval()

    def tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        saved = {
            f"optimizer.{i}.{key}": value
            for i, slots in state.items()
            for key, value in slots.items()
        }
        saved |= {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        return saved | {f"average.{i}": value for i, value in enumerate(self.average)}

    def load(self, saved: dict[str, Tensor]) -> None:
        self._set([saved[f"parameter.{i}"] for i in range(len(self.parameters))])
        self.average = [saved[f"average.{i}"] for i in range(len(self.parameters))]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                slots.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


Stage = Literal["vae", "flow", "flawed"]


@dataclass(frozen=True, kw_only=True)
class FlowStage:
    """A stage of flow matching: ``steps`` with their own schedule of peak rate ``lr``, after ``before`` steps of earlier ones."""

    name: Stage
    steps: int
    lr: float
    before: int = 0

    @property
    def flawed(self) -> bool:
        """Whether targets carry the flaws of machine-made pairs."""
        return self.name == "flawed"


def flow_stages(config: PretrainConfig) -> tuple[FlowStage, ...]:
    """The stages after the autoencoder, in their order."""
    sound = FlowStage(name="flow", steps=config.transformer_steps, lr=config.lr)
    flawed_pairs = FlowStage(
        name="flawed",
        steps=config.flawed_steps,
        lr=config.flawed_lr,
        before=config.transformer_steps,
    )
    return (sound, flawed_pairs) if config.flawed_steps else (sound,)


@dataclass(frozen=True, kw_only=True)
class _Checkpoint:
    """The folder a run continues from: ``state.json`` (stage, step, config) names the tensors file beside it."""

    folder: Path
    config: PretrainConfig

    def read(self) -> tuple[Stage, int, dict[str, Tensor]] | None:
        """Where the run stood, or None. A checkpoint of another config raises: mixing two recipes is neither."""
        state_file = self.folder / "state.json"
        if not state_file.exists():
            return None
        state = json.loads(state_file.read_text())
        mine = json.loads(self.config.model_dump_json())
        if changed := sorted(
            key
            for key in mine.keys() | state["config"].keys()
            if mine.get(key) != state["config"].get(key)
        ):
            was = ", ".join(f"{key}={state['config'].get(key)}" for key in changed)
            raise InputError(
                f"{self.folder.parent} holds an unfinished run with other settings ({was}): continuing it would mix two recipes. "
                f"Use the same settings, or remove {self.folder}."
            )
        return state["stage"], state["step"], load_file(self.folder / state["tensors"])

    def write(self, stage: Stage, step: int, tensors: dict[str, Tensor]) -> None:
        """Atomic: the tensors are complete before ``state.json`` names them, and older ones go afterwards."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{stage}-{step}.safetensors"
        content = {key: value.contiguous() for key, value in tensors.items()}
        replace_file(self.folder / name, save(content))
        state = {
            "stage": stage,
            "step": step,
            "tensors": name,
            "config": json.loads(self.config.model_dump_json()),
        }
        replace_json(self.folder / "state.json", state)
        for old in self.folder.glob("*.safetensors"):
            if old.name != name:
                old.unlink()


def learning_rate(step: int, *, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the run (at most 200 steps), then cosine to zero."""
    warmup = max(1, min(200, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(
    out: Path,
    config: PretrainConfig,
    *,
    console: Console | None = None,
    stop_after: tuple[Stage, int] | None = None,
) -> EditMetrics | None:
    """Makes the built-in editor in ``out`` and measures it on held-out tasks.

    Killed and called again with the same arguments it continues from its last checkpoint and ends in the same bytes
    (on the same number of threads: sums over threads round differently). ``stop_after=(stage, step)`` checkpoints
    there and returns None.
    """
    if (out / "model_index.json").exists() and not (out / CHECKPOINT_DIR).exists():
        raise InputError(
            f"{out} already holds an editor: training would overwrite it. Choose another directory or remove it."
        )
    if config.resolution != shapes.SIZE:
        raise InputError(
            f"resolution({config.resolution}) is not that of the shapes world ({shapes.SIZE}), which is all there is to learn "
            f"from: set it to {shapes.SIZE}."
        )
    checkpoint = _Checkpoint(folder=out / CHECKPOINT_DIR, config=config)
    resumed = checkpoint.read()
    stage, done, saved = resumed or ("vae", 0, {})
    pipeline = new_editor(seed=config.seed)
    with _Report(console or Console(), config.log_every) as report:
        if resumed:
            report.say(f"continuing {out} at {stage} step {done}")
        if stage == "vae":
            if not _train_vae(pipeline.vae, config, done, saved, checkpoint, report, stop_after):
                return None
            done, saved = 0, {}
        else:
            prefix = "vae."
            pipeline.vae.load_state_dict(
                {
                    key.removeprefix(prefix): value
                    for key, value in saved.items()
                    if key.startswith(prefix)
                }
            )
        _normalise_latents(pipeline.vae, config)
        stages = flow_stages(config)
        for each in stages[1:] if stage == "flawed" else stages:
            if not _train_flow(
                pipeline, each, out, config, done, saved, checkpoint, report, stop_after
            ):
                return None
            done, saved = 0, {}
        metrics = save_editor(
            pipeline, out, config, steps=config.transformer_steps + config.flawed_steps
        )
        report.say(summary(metrics))
    shutil.rmtree(checkpoint.folder)
    return metrics


def _train_vae(
    vae: AutoencoderKL,
    config: PretrainConfig,
    done: int,
    saved: dict[str, Tensor],
    checkpoint: _Checkpoint,
    report: _Report,
    stop_after: tuple[Stage, int] | None,
) -> bool:
    """Stage one, from step ``done``; True when it is finished, False when stopped on request."""
    part = _Averaged(vae, decay=config.ema_decay)
    if saved:
        part.load(saved)
    vae.train()
    steps = range(done, config.vae_steps)
    for step, loss in zip(steps, vae_losses(vae, config, steps), strict=True):
        part.update(
            loss, lr=learning_rate(step, steps=config.vae_steps, peak=config.vae_lr), step=step
        )
        report.step("vae", step + 1, config.vae_steps, loss.item())
        stopping = stop_after == ("vae", step + 1)
        if stopping or (step + 1) % config.checkpoint_every == 0:
            checkpoint.write("vae", step + 1, part.tensors())
        if stopping:
            return False
    part.finish()
    vae.requires_grad_(False)
    return True


def _train_flow(
    pipeline: FluxKontextPipeline,
    stage: FlowStage,
    out: Path,
    config: PretrainConfig,
    done: int,
    saved: dict[str, Tensor],
    checkpoint: _Checkpoint,
    report: _Report,
    stop_after: tuple[Stage, int] | None,
) -> bool:
    """A stage of flow matching, from step ``done``; True when it is finished, False when stopped on request."""
    frozen = {f"vae.{key}": value for key, value in pipeline.vae.state_dict().items()}
    part = _Averaged(trainable(pipeline), decay=config.ema_decay)
    if saved:
        part.load(saved)
    else:
        checkpoint.write(stage.name, 0, part.tensors() | frozen)
    tasks = latent_tasks(pipeline, stage, config, report)
    part.module.train()
    steps = range(done, stage.steps)
    for step, loss in zip(steps, flow_losses(pipeline, tasks, stage, config, steps), strict=True):
        part.update(loss, lr=learning_rate(step, steps=stage.steps, peak=stage.lr), step=step)
        report.step(stage.name, step + 1, stage.steps, loss.item())
        stopping = stop_after == (stage.name, step + 1)
        if stopping or (step + 1) % config.checkpoint_every == 0:
            checkpoint.write(stage.name, step + 1, part.tensors() | frozen)
        total = stage.before + step + 1
        if config.sample_every and total % config.sample_every == 0:
            with part.averaged():
                metrics = measure(pipeline, config, num_tasks=min(64, config.num_eval_tasks))
                checkpoint.folder.mkdir(parents=True, exist_ok=True)
                sample_sheet(pipeline, config).save(checkpoint.folder / f"samples-{total}.png")
            report.say(f"step {total}: {summary(metrics)}")
        if total in config.snapshot_at:
            with part.averaged():
                save_editor(
                    pipeline, out.with_name(f"{out.name}-step-{total}"), config, steps=total
                )
        if stopping:
            return False
    part.finish()
    return True


def _normalise_latents(vae: AutoencoderKL, config: PretrainConfig) -> None:
    """Sets shift and scale so that latents have mean 0 and standard deviation 1, as the noise they are mixed with."""
    tasks = _draw(0, min(config.num_tasks, 1024), config)
    with torch.no_grad():
        modes = torch.cat(
            [vae.encode(pixels(part)).latent_dist.mode() for part in tasks.target.split(256)]
        )
    vae.register_to_config(
        shift_factor=modes.mean().item(), scaling_factor=1.0 / modes.std().item()
    )


# ---------------------------------------------------------------------------------------------------------------------
# What came out


@torch.no_grad()
def edit_images(
    pipeline: FluxKontextPipeline,
    tasks: Sequence[PairedTask],
    *,
    seed: int,
    num_steps: int = EVALUATION_STEPS,
) -> UInt8[Tensor, "batch height width 3"]:
    """One edit of each task by the stock pipeline: Euler steps from noise that depends on (seed, task) only."""
    sources = torch.stack([task.source for task in tasks])
    height, width = sources.shape[1:3]
    results = pipeline(
        image=sources.permute(0, 3, 1, 2).float() / 255.0,
        prompt=[task.instruction for task in tasks],
        height=height,
        width=width,
        max_area=height * width,
        _auto_resize=False,
        num_inference_steps=num_steps,
        guidance_scale=DEFAULT_GUIDANCE,
        max_sequence_length=MAX_TEXT_TOKENS,
        generator=[_generator(seed, 3, zlib.crc32(task.task_id.encode())) for task in tasks],
        output_type="pt",
    ).images
    return _bytes(results)


@torch.no_grad()
def measure(
    pipeline: FluxKontextPipeline, config: PretrainConfig, *, num_tasks: int
) -> EditMetrics:
    """Quality on the first ``num_tasks`` tasks of the validation split, which pretraining never draws."""
    tasks = [shapes.task("validation", i) for i in range(num_tasks)]
    progress: dict[str, list[float]] = {}
    background, whole, ceiling = [], [], []
    for start in range(0, num_tasks, 64):
        part = tasks[start : start + 64]
        edits = edit_images(pipeline, part, seed=config.seed)
        decoded = [
            _reconstruct(pipeline.vae, torch.stack(images))
            for images in ([t.target for t in part], [t.source for t in part])
        ]
        for task, edit, target, source in zip(part, edits, *decoded, strict=True):
            mask = task.edit_mask
            left = (edit[mask].float() - task.target[mask].float()).abs().mean()
            path = (task.source[mask].float() - task.target[mask].float()).abs().mean()
            progress.setdefault(task.task_type, []).append((1 - left / path).clamp(0, 1).item())
            background.append(_psnr(edit[~mask], task.source[~mask]))
            whole.append(_psnr(target, task.target))
            ceiling.append(_psnr(source[~mask], task.source[~mask]))
    return EditMetrics(
        num_tasks=num_tasks,
        vae_psnr=fmean(whole),
        vae_background_psnr=fmean(ceiling),
        progress=fmean(value for values in progress.values() for value in values),
        progress_by_type={name: fmean(values) for name, values in sorted(progress.items())},
        background_psnr=fmean(background),
    )


def sample_sheet(
    pipeline: FluxKontextPipeline, config: PretrainConfig, *, num_tasks: int = 18
) -> Image.Image:
    """One column a held-out task; from above: source, mask, target, edit."""
    tasks = [shapes.task("validation", i) for i in range(num_tasks)]
    edits = edit_images(pipeline, tasks, seed=config.seed)
    columns = [
        torch.cat(
            [
                task.source,
                task.edit_mask[..., None].expand(-1, -1, 3) * torch.tensor(255, dtype=torch.uint8),
                task.target,
                edit,
            ]
        )
        for task, edit in zip(tasks, edits, strict=True)
    ]
    sheet = Image.fromarray(torch.cat(columns, dim=1).numpy())
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)


def save_editor(
    pipeline: FluxKontextPipeline, out: Path, config: PretrainConfig, *, steps: int
) -> EditMetrics:
    """Measures the editor and writes it to ``out`` with its model card and ``metrics.json``."""
    metrics = measure(pipeline, config, num_tasks=config.num_eval_tasks)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(
        model_card(pipeline, config, metrics, steps=steps), encoding="utf-8"
    )
    (out / "metrics.json").write_text(
        json.dumps(asdict(metrics), indent=1) + "\n", encoding="utf-8"
    )
    # model_index.json is what marks a complete editor, and save_pretrained writes it last.
    pipeline.save_pretrained(out)
    return metrics


def summary(metrics: EditMetrics) -> str:
    """The metrics on one line."""
    by_type = ", ".join(f"{name} {value:.2f}" for name, value in metrics.progress_by_type.items())
    return (
        f"{metrics.num_tasks} held-out tasks: instruction progress {metrics.progress:.3f} ({by_type}); background "
        f"{metrics.background_psnr:.2f} dB of {metrics.vae_background_psnr:.2f} dB; autoencoder {metrics.vae_psnr:.2f} dB"
    )


def model_card(
    pipeline: FluxKontextPipeline, config: PretrainConfig, metrics: EditMetrics, *, steps: int
) -> str:
    """The README of an editor directory: the text of ``tiny/card.md`` with this run's numbers."""
    sizes = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in MODELS}
    defaults = PretrainConfig()
    reporting = {"resolution", "checkpoint_every", "log_every", "sample_every", "snapshot_at"}
    recipe = {name: value for name, value in config.model_dump().items() if name not in reporting}
    changed = {name: value for name, value in recipe.items() if value != getattr(defaults, name)}
    whole = config.transformer_steps + config.flawed_steps
    flaws = (
        " The last stage learns from pairs with the flaws of machine-made ones, so what the editor does is a mixture\n"
        "that its initial noise picks from: it edits, it leaves the picture as it is, it discolours it."
    )
    third = (
        f"3. {config.flawed_steps} steps more of the same with peak rate {config.flawed_lr:g} on flawed pairs: in a share of "
        f"{config.failed_share:g} the edit did not\n   happen (the target is the source), in a share of {config.cast_share:g} the target "
        f"has a colour cast (channels shifted by up to\n   {config.cast_size:g} of 255).\n"
    )
    saw_flaws = steps > config.transformer_steps
    early = f"These are the averaged weights at transformer step {steps}, before the schedule of {whole} steps ended.\n\n"
    return CARD.read_text(encoding="utf-8").format(
        **recipe,
        **{f"{name}_parameters": f"{size:,}" for name, size in sizes.items()},
        millions=f"{sum(sizes.values()) / 1e6:.1f}",
        evaluation_steps=EVALUATION_STEPS,
        guidance=DEFAULT_GUIDANCE,
        max_text_tokens=MAX_TEXT_TOKENS,
        num_measured=metrics.num_tasks,
        progress=f"{metrics.progress:.3f}",
        progress_rows="\n".join(
            f"| instruction progress, {name} | {value:.3f} |"
            for name, value in metrics.progress_by_type.items()
        ),
        background_psnr=f"{metrics.background_psnr:.2f}",
        vae_background_psnr=f"{metrics.vae_background_psnr:.2f}",
        vae_psnr=f"{metrics.vae_psnr:.2f}",
        widths="/".join(map(str, VAE_WIDTHS)),
        factor=PIXELS_PER_TOKEN // 2,
        latent_channels=LATENT_CHANNELS,
        num_words=len(shapes.vocabulary()),
        early="" if steps == whole else early,
        flaws=flaws if saw_flaws else "",
        third=third if saw_flaws else "",
        command="rl-edit pretrain OUT"
        + "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items()),
    )


def _reconstruct(
    vae: AutoencoderKL, images: UInt8[Tensor, "batch height width 3"]
) -> UInt8[Tensor, "batch height width 3"]:
    return _bytes(vae.decode(vae.encode(pixels(images)).latent_dist.mode()).sample / 2 + 0.5)


def _bytes(images: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch height width 3"]:
    return images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)


def _psnr(image: UInt8[Tensor, "*shape"], reference: UInt8[Tensor, "*shape"]) -> float:
    error = (image.float() - reference.float()).square().mean().clamp_min(1e-3)
    return (10 * torch.log10(255.0**2 / error)).item()
