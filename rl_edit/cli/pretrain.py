"""`rl-edit pretrain`: makes the built-in editor from nothing and says how good it became."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from rl_edit.editors.tiny.recipe import CHECKPOINT_DIR, PretrainConfig
from rl_edit.errors import InputError

_DEFAULT = PretrainConfig()


def pretrain_command(
    out: Annotated[
        Path, typer.Argument(help="Directory to write the editor to (stock diffusers loads it).")
    ],
    seed: Annotated[
        int, typer.Option(help="Root of initialisation, batches and measurements.")
    ] = _DEFAULT.seed,
    transformer_steps: Annotated[
        int, typer.Option("--steps", "--transformer-steps", help="Flow-matching steps.")
    ] = _DEFAULT.transformer_steps,
    batch: Annotated[int, typer.Option(help="Tasks a flow-matching step.")] = _DEFAULT.batch,
    lr: Annotated[float, typer.Option(help="Peak learning rate of flow matching.")] = _DEFAULT.lr,
    edit_weight: Annotated[
        float, typer.Option(help="Loss weight inside the edit mask; outside it is 1.")
    ] = _DEFAULT.edit_weight,
    flawed_steps: Annotated[
        int, typer.Option(help="Flow-matching steps on flawed pairs after that; 0 for none.")
    ] = _DEFAULT.flawed_steps,
    flawed_lr: Annotated[
        float, typer.Option(help="Peak learning rate on flawed pairs.")
    ] = _DEFAULT.flawed_lr,
    failed_share: Annotated[
        float, typer.Option(help="Share of flawed pairs whose target is the source.")
    ] = _DEFAULT.failed_share,
    cast_share: Annotated[
        float, typer.Option(help="Share of flawed pairs whose target has a colour cast.")
    ] = _DEFAULT.cast_share,
    cast_size: Annotated[
        float, typer.Option(help="Largest shift of a channel by a cast, of 255.")
    ] = _DEFAULT.cast_size,
    ema_decay: Annotated[
        float, typer.Option(help="Decay of the averaged weights, which are what is saved.")
    ] = _DEFAULT.ema_decay,
    vae_steps: Annotated[int, typer.Option(help="Autoencoder steps.")] = _DEFAULT.vae_steps,
    vae_batch: Annotated[
        int, typer.Option(help="Images an autoencoder step.")
    ] = _DEFAULT.vae_batch,
    vae_lr: Annotated[
        float, typer.Option(help="Peak learning rate of the autoencoder.")
    ] = _DEFAULT.vae_lr,
    num_tasks: Annotated[
        int, typer.Option(help="Pretraining tasks held in memory, 10 kB each.")
    ] = _DEFAULT.num_tasks,
    num_eval_tasks: Annotated[
        int, typer.Option(help="Held-out tasks measured at the end.")
    ] = _DEFAULT.num_eval_tasks,
    sample_every: Annotated[
        int, typer.Option(help=f"Steps between sample sheets in OUT/{CHECKPOINT_DIR}; 0 for none.")
    ] = _DEFAULT.sample_every,
    snapshot_at: Annotated[
        list[int] | None,
        typer.Option(help="Also write OUT-step-N at transformer step N; repeatable."),
    ] = None,
) -> None:
    """Make the built-in editor: an autoencoder, then a small FLUX.1-Kontext, trained on procedural shapes.

    Within an hour on two cores. Stop it at any time: the same command continues it.
    """
    # Model libraries take seconds to import, and other verbs must not wait for them.
    from rl_edit.editors.tiny.pretraining import pretrain

    try:
        config = PretrainConfig(
            seed=seed,
            vae_steps=vae_steps,
            vae_batch=vae_batch,
            vae_lr=vae_lr,
            transformer_steps=transformer_steps,
            batch=batch,
            lr=lr,
            num_tasks=num_tasks,
            edit_weight=edit_weight,
            flawed_steps=flawed_steps,
            flawed_lr=flawed_lr,
            failed_share=failed_share,
            cast_share=cast_share,
            cast_size=cast_size,
            ema_decay=ema_decay,
            num_eval_tasks=num_eval_tasks,
            sample_every=sample_every,
            snapshot_at=tuple(snapshot_at or ()),
        )
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{name} = {first['input']!r} cannot be used: {first['msg']}. Change --{name.replace('_', '-')}."
        ) from error
    console = Console()
    pretrain(out, config, console=console)
    console.print(f"Wrote {out}; its README.md is the model card.", highlight=False)
