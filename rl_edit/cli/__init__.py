"""The command line: one file per verb.

Errors become one readable line and an exit code.
"""

from __future__ import annotations

import os
import sys

# These libraries read their environment once, when they are imported; hence before the imports.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenMP reads it once, when torch is imported. Threads that wait then sleep instead of spinning,
# which beside one busy program is the difference between 0.2 s and 2 s for the same work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from rl_edit.cli.audit_reward import audit_reward_command
from rl_edit.cli.bench_reward import bench_reward_command
from rl_edit.cli.compare import compare_command
from rl_edit.cli.dataset import dataset_app
from rl_edit.cli.edit import edit_command
from rl_edit.cli.evaluate import evaluate_command
from rl_edit.cli.find_masks import find_masks_command
from rl_edit.cli.merge_judge import merge_judge_command
from rl_edit.cli.pretrain import pretrain_command
from rl_edit.cli.report import report_command
from rl_edit.cli.show import methods_command, presets_command, show_config_command
from rl_edit.cli.structure import structure_command
from rl_edit.cli.train import train_command
from rl_edit.errors import ClusterUnreachable, Fenced, InputError, Interrupted, ResourcesInfeasible
from rl_edit.method.update import TrainingFailed

# Documented in docs/usage.md; scripts rely on them. 75 is EX_TEMPFAIL of sysexits.h: another
# attempt holds the run directory, and repeating this one is no error.
BAD_INPUT, FAILED, INFEASIBLE, UNREACHABLE, FENCED = 2, 3, 4, 5, 75

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


def main() -> None:
    """Runs the verb and turns known errors into exit codes."""
    try:
        app()
    except InputError as error:
        _leave(error, BAD_INPUT)
    except TrainingFailed as error:
        _leave(error, FAILED)
    except Interrupted as stopped:
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a process that SIGINT ended
    except ResourcesInfeasible as error:
        _leave(error, INFEASIBLE)
    except ClusterUnreachable as error:
        _leave(error, UNREACHABLE)
    except Fenced as error:
        _leave(error, FENCED)


def _leave(error: Exception, code: int) -> None:
    """Prints one line on stderr and ends the process."""
    # Ray wraps an error of an actor; its cause is what the user has to read.
    cause = getattr(error, "cause", None) or error
    print(f"rl-edit: {' '.join(str(cause).split())}", file=sys.stderr)
    sys.exit(code)
