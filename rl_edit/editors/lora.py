"""LoRA adapters: attach, export, load, name by content, and save for stock diffusers.

One process may hold several adapters on one frozen base, each under its own ``adapter_name`` (the
term of PEFT). A forward uses the adapter that was switched on last. Any module with linear layers
takes adapters: PEFT puts them in, and nothing here asks for a family's class. PEFT takes seconds to
import and is imported where it is used: a mistake in a configuration must not wait for it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from rl_edit.editors.adapter_config import AdapterConfig
from rl_edit.editors.adapter_forms import (
    METADATA,
    PREFIX,
    WEIGHTS_FILE,
    find_file,
    read_form,
)
from rl_edit.editors.lora_targets import (
    ATTENTION_PROJECTIONS,
    expanded,
    layer_names,
    require_fit,
    require_modules,
    unmatched,
)
from rl_edit.errors import InputError
from rl_edit.files import replace_file, replace_json
from rl_edit.types import AdapterId, AdapterWeights

if TYPE_CHECKING:
    from peft import LoraConfig as PeftLoraConfig

POLICY = "policy"
"""Name of the adapter that is trained, evaluated or used for editing."""

BEHAVIOUR = "behaviour"
"""Name of the adapter that rollouts use beside a learner on the same transformer.

Its weights may be older than the policy's.
"""

ACTING = "acting"
"""Name of the adapter in which a learner keeps the acting weights.

Objectives that read the acting weights' velocity need it.
"""

NOTE_FILE = "adapter.json"


class LoraConfig(BaseModel):
    """The trained adapter.

    Attributes:
        rank, alpha: r32 alpha64 on attention projections is CoCoEdit's and DiffusionNFT's; the
            scale is alpha / rank.
        targets: module-name suffixes inside the editor's transformer; a ``*`` stands for one part
            of a name. By default all attention projections of the editor's family.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    # As in CoCoEdit and DiffusionNFT.
    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=64, gt=0)
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS

    def peft(self, layers: Iterable[str]) -> PeftLoraConfig:
        """Returns the settings as PEFT's own record.

        Args:
            layers: names among which a ``*`` of a target is sought.
        """
        from peft import LoraConfig as PeftLoraConfig

        # PEFT writes a whole alpha as an integer, and so do files of stock diffusers.
        alpha = int(self.alpha) if float(self.alpha).is_integer() else self.alpha
        return PeftLoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            target_modules=expanded(self.targets, layers),
            init_lora_weights="gaussian",
        )


def attach(
    transformer: nn.Module,
    config: LoraConfig | AdapterConfig,
    *,
    seed: int,
    adapter_name: str = POLICY,
) -> None:
    """Adds an adapter in fp32 and switches it on.

    A is Gaussian from ``seed`` and B zero, so that the edited model starts as the base. The adapter
    of an :class:`AdapterConfig` goes to the modules that have tensors in its file.

    Raises:
        InputError: the transformer has no module of a target's name, or PEFT refuses the settings.
    """
    from peft import inject_adapter_in_model

    if isinstance(config, LoraConfig):
        problem = unmatched(transformer, config.targets)
        if problem:
            raise InputError(problem)
    else:
        require_modules(transformer, config.modules)
    # A fork: attaching must not move the process's own random stream.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A second adapter beside the first is meant, and so are modules other than the targets.
        # What a user must know of an adapter's settings stands in its notes.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            settings = _peft(config, layer_names(transformer))
            inject_adapter_in_model(settings, transformer, adapter_name, state_dict=_places(config))
        # PEFT raises whatever its own code meets: a pattern that does not compile, a module that it
        # cannot adapt.
        except Exception as error:
            raise InputError(
                f"PEFT cannot attach this LoRA ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}): check lora.targets, or the adapter's "
                "settings"
            ) from error
    # PEFT may make the adapter in the base's number format; an optimizer step in bf16 would round
    # most updates away.
    set_active(transformer, True, adapter_name=adapter_name)
    for parameter in parameters(transformer, adapter_name=adapter_name):
        parameter.data = parameter.data.float()


def _peft(config: LoraConfig | AdapterConfig, layers: Iterable[str]) -> PeftLoraConfig:
    return config.peft(layers) if isinstance(config, LoraConfig) else config.peft()


def _places(config: LoraConfig | AdapterConfig) -> dict[str, Tensor] | None:
    """Returns names of tensors by which PEFT finds the modules; their values are not read."""
    if isinstance(config, LoraConfig):
        return None
    return {f"{module}.lora_A.weight": torch.empty(0) for module in config.modules}


def named_parameters(
    transformer: nn.Module, *, adapter_name: str = POLICY
) -> dict[str, nn.Parameter]:
    """Returns an adapter's parameters by their name in the transformer, in a fixed order."""
    return {
        name: p for name, p in sorted(transformer.named_parameters()) if f".{adapter_name}." in name
    }


def parameters(transformer: nn.Module, *, adapter_name: str = POLICY) -> list[nn.Parameter]:
    """Returns an adapter's parameters, in a fixed order."""
    return list(named_parameters(transformer, adapter_name=adapter_name).values())


def export(transformer: nn.Module, *, step: int, adapter_name: str = POLICY) -> AdapterWeights:
    """Copies the adapter as it is loaded now, under its content name."""
    named = named_parameters(transformer, adapter_name=adapter_name)
    tensors = exported(named, adapter_name=adapter_name)
    return AdapterWeights(id=AdapterId(step, digest(tensors)), tensors=tensors)


def exported(named: Mapping[str, Tensor], *, adapter_name: str = POLICY) -> dict[str, Tensor]:
    """Copies an adapter's tensors to fp32 on the CPU, under the names that PEFT saves them by."""
    # PEFT's names lack the adapter's own, so that a file fits any adapter name.
    free = {name.replace(f".{adapter_name}.", "."): value for name, value in named.items()}
    return {
        name: free[name].detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in sorted(free)
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """Hashes names, types, shapes and bytes, in name order (sha256)."""
    sha = hashlib.sha256()
    # Names, types and shapes are hashed too: equal bytes of another shape are another adapter.
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def load(transformer: nn.Module, weights: AdapterWeights, *, adapter_name: str = POLICY) -> None:
    """Copies tensors into the attached adapter, exactly.

    Raises:
        InputError: they are of another LoRA than the attached one.
    """
    from peft import set_peft_model_state_dict

    misfit = f"adapter {weights.id} does not fit this editor's LoRA:"
    remedy = "Use the run's own editor and lora settings."
    require_fit(transformer, weights)
    try:
        with warnings.catch_warnings():
            # On the bias of a LoRA, which has one side, as if it were a matrix.
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(
                transformer, weights.tensors, adapter_name=adapter_name
            )
    # torch raises for shapes; missing and unexpected names are returned.
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{misfit} {reason} {remedy}") from error
    if result is None:
        return
    # The base's own parameters are always missing from an adapter; only its own count.
    missing = [key for key in result.missing_keys if f".{adapter_name}." in key]
    if result.unexpected_keys or missing:
        raise InputError(
            f"{misfit} unexpected {result.unexpected_keys[:3]}, missing {missing[:3]}. {remedy}"
        )


def set_active(transformer: nn.Module, active: bool, *, adapter_name: str = POLICY) -> None:
    """Switches an adapter on alone, or all of them off: a forward is then exactly the base's.

    PEFT ties gradients to it: the adapter switched on takes gradients, every other parameter of an
    adapter takes none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            if active:
                layer.set_adapter([adapter_name])
            # After set_adapter: it decides which adapter takes gradients, and this one whether any
            # acts.
            layer.enable_adapters(enabled=active)


def strengthen(transformer: nn.Module, factor: float, *, adapter_name: str = POLICY) -> None:
    """Multiplies what an attached adapter adds by a factor: 0 is exactly the base, 1 as trained."""
    from peft.tuners.lora import LoraLayer

    for layer in transformer.modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            layer.scaling[adapter_name] *= factor


def save(directory: Path, weights: AdapterWeights, config: LoraConfig | AdapterConfig) -> None:
    """Writes a directory from which ``pipeline.load_lora_weights`` restores tensors and alpha.

    diffusers resets alpha to the rank when the file carries no adapter metadata; ours always does.
    """
    directory.mkdir(parents=True, exist_ok=True)
    modules = dict.fromkeys(name.split(".lora_")[0] for name in weights.tensors)
    # Sets would be written in another order each time.
    settings = {
        PREFIX + key: sorted(value) if isinstance(value, set) else value
        for key, value in _peft(config, modules).to_dict().items()
    }
    metadata = {"format": "pt", METADATA: json.dumps(settings, indent=2, sort_keys=True)}
    tensors = {PREFIX + name: value for name, value in weights.tensors.items()}
    # Each file appears complete or not at all. The note comes last and names the bytes.
    replace_file(directory / WEIGHTS_FILE, _sorted_header(save_tensors(tensors, metadata)))
    note: dict[str, Any] = {
        "step": weights.id.step,
        "sha256": weights.id.sha256,
        "lora": config.model_dump(mode="json", exclude={"notes"}),
    }
    replace_json(directory / NOTE_FILE, note)


def _sorted_header(raw: bytes) -> bytes:
    """Gives equal adapters equal files: safetensors writes metadata keys in random order."""
    size = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + size])
    header = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    # safetensors aligns the tensors behind the header to 8 bytes.
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[8 + size :]


def read(
    directory: Path, *, pipeline: str = "FluxKontextPipeline"
) -> tuple[AdapterWeights, AdapterConfig]:
    """Reads an adapter file or directory, as stock diffusers or PEFT applies it.

    Args:
        pipeline: class of the editor that it is for, whose converters are used.

    Raises:
        InputError: there is none, it cannot be applied, or its bytes are not those its note names.
    """
    path = find_file(directory)
    tensors, config = read_form(path, pipeline=pipeline)
    # The name follows from the content, never from the note.
    sha = digest(tensors)
    step = _noted_step(path.parent / NOTE_FILE, path, sha)
    return AdapterWeights(id=AdapterId(step, sha), tensors=tensors), config


def _noted_step(note: Path, path: Path, sha: str) -> int:
    """Reads the update that an adapter came from; 0 for a file of another program."""
    # A note is of the file that save() writes, and of no other one beside it.
    if path.name != WEIGHTS_FILE or not note.is_file():
        return 0
    try:
        record = json.loads(note.read_text())
        step, noted = int(record["step"]), str(record["sha256"])
    except (ValueError, KeyError, TypeError, OSError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{note} is not readable ({type(error).__name__}: {error}): copy the adapter again"
        ) from error
    if noted != sha:
        raise InputError(
            f"{path} has content {sha[:12]}, but {note.name} names {noted[:12]}: the adapter was "
            "altered or half-copied"
        )
    return step
