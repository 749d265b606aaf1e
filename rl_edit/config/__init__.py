"""The configuration of a run: one frozen value, read from YAML.

``run.py`` and ``sections.py`` hold the models, ``loading.py`` reads them, ``renamed.py`` knows old
names, ``explain.py`` words the errors.
"""

from __future__ import annotations

from rl_edit.config.fields import is_default
from rl_edit.config.loading import load_config, presets, validated
from rl_edit.config.renamed import modern, modern_name
from rl_edit.config.run import RunConfig
from rl_edit.config.sections import ActorsConfig, EvaluationConfig, RolloutConfig, TrainConfig

__all__ = [
    "ActorsConfig",
    "EvaluationConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "is_default",
    "load_config",
    "modern",
    "modern_name",
    "presets",
    "validated",
]
