"""LoRA adapters: attach, export, load, name by content, and save so that stock diffusers loads them with their alpha.

One process may hold several adapters on one frozen base, each under its own ``adapter_name`` (PEFT's term). A forward uses
the adapter that was switched on last. PEFT and diffusers take seconds to import and are imported where they are used: a config error must
not wait for them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rl_edit.errors import InputError
from rl_edit.types import AdapterId, AdapterWeights

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

POLICY = "policy"
"""Name of the adapter that is trained, evaluated or used for editing."""

BEHAVIOUR = "behaviour"
"""Name of the adapter that rollouts use beside a learner on the same transformer. Its weights may be older than the policy's."""

ACTING = "acting"
"""Name of the adapter in which a learner keeps the acting weights, for objectives that read their velocity."""

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
ATTENTION_PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
"""LoRA targets of RC-GRPO-Editing ("attention projections"), by FLUX module suffix; single blocks have only q, k and v."""


class LoraConfig(BaseModel):
    """The trained adapter.

    Attributes:
        rank, alpha: r32 alpha64 on attention projections is CoCoEdit's and DiffusionNFT's; the scale is alpha / rank.
        targets: module-name suffixes inside the transformer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64, gt=0)
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS

    def peft(self) -> PeftLoraConfig:
        from peft import LoraConfig as PeftLoraConfig

        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            target_modules=list(self.targets),
            init_lora_weights="gaussian",
        )


def attach(
    transformer: nn.Module, config: LoraConfig, *, seed: int, adapter_name: str = POLICY
) -> None:
    """Adds an adapter: A Gaussian from ``seed``, B zero, so that the edited model starts as the base, in fp32. It is switched on."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # a second adapter beside the first is meant
        torch.manual_seed(seed)
        transformer.add_adapter(config.peft(), adapter_name=adapter_name)  # type: ignore[operator]  # diffusers mixes it in
    for parameter in parameters(transformer, adapter_name=adapter_name):
        parameter.data = parameter.data.float()


def named_parameters(
    transformer: nn.Module, *, adapter_name: str = POLICY
) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their name in the transformer, in a fixed order."""
    return {
        name: p for name, p in sorted(transformer.named_parameters()) if f".{adapter_name}." in name
    }


def parameters(transformer: nn.Module, *, adapter_name: str = POLICY) -> list[nn.Parameter]:
    """An adapter's parameters, in a fixed order."""
    return list(named_parameters(transformer, adapter_name=adapter_name).values())


def export(transformer: nn.Module, *, step: int, adapter_name: str = POLICY) -> AdapterWeights:
    """A copy of the adapter as it is loaded now, under its content name."""
    tensors = exported(
        named_parameters(transformer, adapter_name=adapter_name), adapter_name=adapter_name
    )
    return AdapterWeights(id=AdapterId(step, digest(tensors)), tensors=tensors)


def exported(named: Mapping[str, Tensor], *, adapter_name: str = POLICY) -> dict[str, Tensor]:
    """Copies of tensors named as an adapter's parameters, fp32 on the CPU, under the names that PEFT saves them by."""
    free = {name.replace(f".{adapter_name}.", "."): value for name, value in named.items()}
    return {
        name: free[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in sorted(free)
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes, in name order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def load(transformer: nn.Module, weights: AdapterWeights, *, adapter_name: str = POLICY) -> None:
    """Copies tensors into the attached adapter, exactly."""
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(transformer, weights.tensors, adapter_name=adapter_name)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"adapter {weights.id} does not fit this editor's LoRA: {reason} Use the run's own editor and lora settings."
        ) from error
    if result is not None and (
        result.unexpected_keys or any(f".{adapter_name}." in key for key in result.missing_keys)
    ):
        raise InputError(
            f"adapter {weights.id} does not fit this editor's LoRA: unexpected {result.unexpected_keys[:3]}, missing "
            f"{[k for k in result.missing_keys if adapter_name in k][:3]}. Use the run's own editor and lora settings."
        )


def set_active(transformer: nn.Module, active: bool, *, adapter_name: str = POLICY) -> None:
    """On, a forward adds this adapter and no other; off, it is exactly the base's.

    PEFT ties gradients to it: the adapter switched on takes gradients, every other parameter of an adapter takes none.
    """
    if active:
        transformer.set_adapter(adapter_name)  # type: ignore[operator]  # diffusers mixes these in
        transformer.enable_adapters()  # type: ignore[operator]
    else:
        transformer.disable_adapters()  # type: ignore[operator]


def save(directory: Path, weights: AdapterWeights, config: LoraConfig) -> None:
    """Writes ``directory`` so that ``pipeline.load_lora_weights(directory)`` restores tensors and alpha.

    diffusers resets alpha to the rank when the file carries no adapter metadata; ours always does.
    """
    from diffusers import FluxKontextPipeline

    directory.mkdir(parents=True, exist_ok=True)
    peft = config.peft().to_dict()
    metadata = {
        key: (sorted(value) if isinstance(value, set) else value) for key, value in peft.items()
    }
    FluxKontextPipeline.save_lora_weights(
        directory,
        transformer_lora_layers=dict(weights.tensors),
        transformer_lora_adapter_metadata=metadata,
        safe_serialization=True,
    )
    _sort_header(directory / WEIGHTS_FILE)
    (directory / "adapter.json").write_text(
        json.dumps(
            {
                "step": weights.id.step,
                "sha256": weights.id.sha256,
                "lora": config.model_dump(mode="json"),
            },
            indent=2,
        )
        + "\n"
    )


def _sort_header(path: Path) -> None:
    """Gives equal adapters equal files: safetensors writes several metadata keys in random order."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.dumps(
        json.loads(raw[8 : 8 + size]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def read(directory: Path) -> tuple[AdapterWeights, LoraConfig]:
    """Reads what :func:`save` wrote, or any diffusers LoRA file of a transformer with its metadata.

    Raises:
        InputError: when the file is missing, is no transformer LoRA, or its bytes are not those its name says.
    """
    path = directory / WEIGHTS_FILE if directory.is_dir() else directory
    if not path.is_file() or path.suffix != ".safetensors":
        raise InputError(
            f"no adapter at {directory}: expected {WEIGHTS_FILE} (a diffusers LoRA). Point --adapter at RUN/adapter."
        )
    try:
        raw = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except Exception as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}): copy the adapter again"
        ) from error
    tensors = {
        name.removeprefix("transformer."): value
        for name, value in raw.items()
        if name.startswith("transformer.")
    }
    rank = next(
        (value.shape[0] for name, value in tensors.items() if name.endswith("lora_A.weight")), None
    )
    if rank is None:
        raise InputError(
            f"{path} holds no transformer LoRA (keys start with {next(iter(raw), '')!r}): train one with rl-edit train"
        )
    stored = {
        k.removeprefix("transformer."): v
        for k, v in json.loads(header.get("lora_adapter_metadata", "{}")).items()
    }
    config = LoraConfig(
        rank=stored.get("r", rank),
        alpha=stored.get("lora_alpha", rank),
        targets=tuple(sorted(stored.get("target_modules", ATTENTION_PROJECTIONS))),
    )
    sha, step = digest(tensors), 0
    sidecar = path.parent / "adapter.json"
    if sidecar.is_file():
        try:
            record = json.loads(sidecar.read_text())
            step, named = int(record["step"]), str(record["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{sidecar} is not readable ({type(error).__name__}: {error}): copy the adapter again"
            ) from error
        if named != sha:
            raise InputError(
                f"{path} has content {sha[:12]}, but {sidecar.name} names {named[:12]}: the adapter was altered or half-copied"
            )
    return AdapterWeights(id=AdapterId(step, sha), tensors=tensors), config
