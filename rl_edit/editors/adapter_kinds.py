"""Names adapters that are no LoRA of a transformer here, with the tool that converts each.

A file's tensor names say which program and which model it is for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of adapter that is not applied here.

    Attributes:
        sign: pattern found in the names of its tensors.
        name: for people.
        remedy: the tool that converts it, or what to use instead.
        pipelines: classes of the editors that it is for.
    """

    sign: str
    name: str
    remedy: str
    pipelines: tuple[str, ...] = ()


_AS_LORA = "convert it to a LoRA with peft.save_as_lora (PEFT) or LyCORIS's extract_locon.py"
_OTHER_EDITOR = "an adapter fits only the model it was trained on: use one of this editor"

METHODS = (
    Kind(sign=r"lokr_", name="a LoKr (Kronecker) adapter", remedy=_AS_LORA),
    Kind(sign=r"hada_", name="a LoHa (Hadamard) adapter", remedy=_AS_LORA),
    Kind(sign=r"oft_(r|blocks|diag)|\.oft_", name="an OFT adapter", remedy=_AS_LORA),
    Kind(sign=r"boft_", name="a BOFT adapter", remedy=_AS_LORA),
    Kind(sign=r"ia3_", name="an IA3 adapter", remedy="train a LoRA: no tool converts it"),
    Kind(sign=r"vera_lambda", name="a VeRA adapter", remedy=_AS_LORA),
    Kind(
        sign=r"dora_scale",
        name="a DoRA in kohya's or LyCORIS's naming, whose magnitudes diffusers leaves out",
        remedy="merge it in its own trainer and extract a plain LoRA (sd-scripts "
        "networks/flux_extract_lora.py), or save it by PEFT",
    ),
    Kind(
        sign=r"lora_mid",
        name="a LoCon with a Tucker core",
        remedy="extract a plain LoRA with LyCORIS's extract_locon.py",
    ),
)
"""Methods other than LoRA."""

TEXT_ENCODERS = Kind(
    sign=r"^lora_te\d?_|^text_encoders?(_\d)?\.|^te\d?_",
    name="a LoRA with parts for a text encoder, which stays frozen here",
    remedy="save it without them (train the transformer alone, or delete the tensors of the "
    "text encoder), or use it in diffusers itself",
)

MODELS = (
    Kind(
        # FLUX has img_mlp and img_mod too, below double_blocks.
        sign=r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]",
        name="a LoRA of Qwen-Image",
        remedy=_OTHER_EDITOR,
        pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    ),
    Kind(
        sign=r"down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block|^unet\.",
        name="a LoRA of a Stable Diffusion U-Net (1.5, 2 or SDXL)",
        remedy=_OTHER_EDITOR,
    ),
    Kind(sign=r"joint_blocks", name="a LoRA of Stable Diffusion 3", remedy=_OTHER_EDITOR),
    Kind(
        sign=r"to_qkv_mlp_proj|double_stream_modulation|single_stream_modulation",
        name="a LoRA of FLUX.2",
        remedy=_OTHER_EDITOR,
        pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    ),
    Kind(
        sign=r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn|attn1|attn2)",
        name="a LoRA of Wan or another video model",
        remedy=_OTHER_EDITOR,
    ),
    Kind(
        sign=r"model[._]layers[._]\d+[._](self_attn|mlp)",
        name="a LoRA of a language model",
        remedy=_OTHER_EDITOR,
    ),
    Kind(
        sign=r"(^|[._])layers[._]\d+[._](attention|feed_forward|adaLN)",
        name="a LoRA of Z-Image or Lumina",
        remedy=_OTHER_EDITOR,
        # OmniGen2's blocks are Lumina2's.
        pipelines=("OmniGen2Pipeline",),
    ),
)
"""Models by modules that only they have; an adapter of another model is refused by its name."""

NAMING = (
    Kind(
        sign=r"\.lora_[AB]\.[^.]+\.weight$",
        name="a LoRA whose tensors carry the adapter's own name (lora_A.default.weight)",
        remedy="save it with peft's get_peft_model_state_dict and diffusers' save_lora_weights, or "
        "delete that name from each tensor's",
    ),
    Kind(
        sign=r"^(state_dict|module|model|_orig_mod)\..*lora",
        name="a LoRA whose tensors have a wrapper's prefix (state_dict., module., ...), of which "
        "diffusers reads none",
        remedy="delete that prefix from each tensor's name, so that they start with transformer.",
    ),
    Kind(
        sign=r"^diffusion_model\..*\.lora_A\.",
        name="a LoRA in ComfyUI's naming (diffusion_model.) with PEFT's tensor names, of which "
        "diffusers reads none",
        remedy="where its modules have diffusers' names, rename diffusion_model. to transformer.; "
        "else convert it with sd-scripts networks/convert_flux_lora.py",
    ),
    Kind(
        sign=r"^lora_(unet|transformer)_.*transformer_blocks_",
        name="a LoRA in kohya's naming with module names that diffusers does not convert",
        remedy="convert it with sd-scripts networks/convert_flux_lora.py --dst ai-toolkit",
    ),
    Kind(
        sign=r"^base_model\.",
        name="the tensors of a PEFT folder without its settings, which say the scale",
        remedy="copy the folder's adapter_config.json beside it",
    ),
    Kind(
        sign=r"^(single_)?transformer_blocks\.",
        name="a LoRA whose tensors lack the prefix transformer., of which diffusers reads none",
        remedy="save it with diffusers' save_lora_weights, or rename each tensor to "
        "transformer.NAME",
    ),
)
"""Forms of a LoRA that diffusers does not convert."""


def recognised(names: Iterable[str], kinds: tuple[Kind, ...]) -> Kind | None:
    """Returns the first kind of which a tensor name bears the sign."""
    every = list(names)
    return next((kind for kind in kinds if any(re.search(kind.sign, n) for n in every)), None)
