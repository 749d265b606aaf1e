"""The verbs of the command line, one file each."""

from __future__ import annotations

from typing import Annotated

import typer

from rl_edit.cli.audit_reward import audit_reward_command
from rl_edit.cli.bench_reward import bench_reward_command
from rl_edit.cli.compare import compare_command
from rl_edit.cli.dataset import dataset_app
from rl_edit.cli.edit import edit_command
from rl_edit.cli.editors import editors_app
from rl_edit.cli.evaluate import evaluate_command
from rl_edit.cli.export import export_command
from rl_edit.cli.find_masks import find_masks_command
from rl_edit.cli.judge import judge_app
from rl_edit.cli.merge_judge import merge_judge_command
from rl_edit.cli.pretrain import pretrain_command
from rl_edit.cli.report import report_command
from rl_edit.cli.show import methods_command, presets_command, show_config_command
from rl_edit.cli.structure import structure_command
from rl_edit.cli.train import train_command

app = typer.Typer(
    name="rl-edit",
    help="Train image editors with reinforcement learning. The background stays as it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train_command)
app.command("evaluate")(evaluate_command)
app.command("edit")(edit_command)
app.command("export")(export_command)
app.command("report")(report_command)
app.command("compare")(compare_command)
app.command("pretrain")(pretrain_command)
app.command("presets")(presets_command)
app.command("methods")(methods_command)
app.command("show-config")(show_config_command)
app.command("audit-reward")(audit_reward_command)
app.command("bench-reward")(bench_reward_command)
app.command("merge-judge")(merge_judge_command)
app.command("find-masks")(find_masks_command)
app.command("structure")(structure_command)
app.add_typer(dataset_app, name="dataset")
app.add_typer(editors_app, name="editors")
app.add_typer(judge_app, name="judge")


@app.callback()
def options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the full traceback of an error and the libraries' warnings; also after the "
            "verb, and with RL_EDIT_DEBUG=1.",
        ),
    ] = False,
) -> None:
    """Train image editors with reinforcement learning. The background stays as it is."""
    # Taken from the arguments before they come here: errors of the imports are shown with it too.
