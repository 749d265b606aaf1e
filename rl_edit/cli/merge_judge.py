"""``rl-edit merge-judge``: merges a judge's LoRA into its base, for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def merge_judge_command(
    base: Annotated[
        str,
        typer.Argument(
            help="Directory or hub name of the base, such as Qwen/Qwen3-VL-8B-Instruct."
        ),
    ],
    lora: Annotated[
        str,
        typer.Argument(
            help="Directory or hub name of the LoRA, "
            "such as EditScore/EditScore-Qwen3-VL-8B-Instruct."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="New directory for the merged checkpoint.")],
) -> None:
    """Merge a judge's LoRA into its base model, as a checkpoint that vLLM serves.

    Needs memory for the full model, but no GPU.
    """
    # Model libraries take seconds to import, and other verbs must not wait for them.
    from rl_edit.rewards.vlm.backends.merge import merge_judge

    console = Console()
    merge_judge(base, lora, out, say=lambda step: console.print(step, highlight=False))
    console.print(f"Wrote {out}. Serve it with: vllm serve {out}", highlight=False)
