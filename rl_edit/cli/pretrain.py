"""``rl-edit pretrain``: makes the built-in editor from nothing and prints its quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from rl_edit.editors.tiny.recipe import CHECKPOINT_DIR, PretrainConfig
from rl_edit.errors import InputError

_DEFAULT = PretrainConfig()

# Options of the command, in the order of the recipe. Defaults are the recipe's.
Out = Annotated[Path, typer.Argument(help="Directory for the editor. Stock diffusers loads it.")]
Seed = Annotated[int, typer.Option(help="Seed of initialisation, batches and measurements.")]
TransformerSteps = Annotated[
    int, typer.Option("--steps", "--transformer-steps", help="Flow-matching steps.")
]
Batch = Annotated[int, typer.Option(help="Tasks per flow-matching step.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate of flow matching.")]
EditWeight = Annotated[
    float, typer.Option(help="Loss weight inside the edit mask; outside it is 1.")
]
FlawedSteps = Annotated[
    int, typer.Option(help="Further flow-matching steps on flawed pairs. 0 for none.")
]
FlawedRate = Annotated[float, typer.Option(help="Peak learning rate on flawed pairs.")]
FailedShare = Annotated[
    float, typer.Option(help="Share of flawed pairs whose target is the source.")
]
CastShare = Annotated[
    float, typer.Option(help="Share of flawed pairs whose target has a colour cast.")
]
CastSize = Annotated[float, typer.Option(help="Largest shift of a channel by a cast, of 255.")]
EmaDecay = Annotated[float, typer.Option(help="Decay of the averaged weights, which are saved.")]
VaeSteps = Annotated[int, typer.Option(help="Autoencoder steps.")]
VaeBatch = Annotated[int, typer.Option(help="Images per autoencoder step.")]
VaeRate = Annotated[float, typer.Option(help="Peak learning rate of the autoencoder.")]
NumTasks = Annotated[int, typer.Option(help="Pretraining tasks in memory, 10 kB each.")]
NumEvalTasks = Annotated[int, typer.Option(help="Held-out tasks measured at the end.")]
SampleEvery = Annotated[
    int, typer.Option(help=f"Steps between sample sheets in OUT/{CHECKPOINT_DIR}. 0 for none.")
]
SnapshotAt = Annotated[
    list[int] | None,
    typer.Option(help="Also write OUT-step-N at transformer step N. May be repeated."),
]


def pretrain_command(
    out: Out,
    seed: Seed = _DEFAULT.seed,
    transformer_steps: TransformerSteps = _DEFAULT.transformer_steps,
    batch: Batch = _DEFAULT.batch,
    lr: Rate = _DEFAULT.lr,
    edit_weight: EditWeight = _DEFAULT.edit_weight,
    flawed_steps: FlawedSteps = _DEFAULT.flawed_steps,
    flawed_lr: FlawedRate = _DEFAULT.flawed_lr,
    failed_share: FailedShare = _DEFAULT.failed_share,
    cast_share: CastShare = _DEFAULT.cast_share,
    cast_size: CastSize = _DEFAULT.cast_size,
    ema_decay: EmaDecay = _DEFAULT.ema_decay,
    vae_steps: VaeSteps = _DEFAULT.vae_steps,
    vae_batch: VaeBatch = _DEFAULT.vae_batch,
    vae_lr: VaeRate = _DEFAULT.vae_lr,
    num_tasks: NumTasks = _DEFAULT.num_tasks,
    num_eval_tasks: NumEvalTasks = _DEFAULT.num_eval_tasks,
    sample_every: SampleEvery = _DEFAULT.sample_every,
    snapshot_at: SnapshotAt = None,
) -> None:
    """Make the built-in editor: an autoencoder and a small FLUX.1-Kontext, trained on shapes.

    Takes less than an hour on two cores. It may be stopped at any time; the same command then
    continues it.
    """
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
    # pydantic names the field; here the user gave an option.
    except ValidationError as error:
        raise _refused(error) from error
    # Model libraries take seconds to import, and other verbs must not wait for them.
    from rl_edit.editors.tiny.pretraining import pretrain

    console = Console()
    pretrain(out, config, console=console)
    console.print(f"Wrote {out}; its README.md is the model card.", highlight=False)


def _refused(error: ValidationError) -> InputError:
    """Names the first option that cannot be used."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    return InputError(
        f"{name} = {first['input']!r} cannot be used: {first['msg']}. "
        f"Change --{name.replace('_', '-')}."
    )
