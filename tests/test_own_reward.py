"""Rewards in one file of the user's train, by the example and by the commands.

The file is ``examples/own_reward.py``. Nothing else knows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict

from rl_edit.config import RunConfig
from rl_edit.rewards import RewardTerm
from rl_edit.rewards.term import Sides
from rl_edit.types import Candidates, Score
from runs import command, metrics_of, read_json

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
RESTRAINT = {"kind": "own_reward:Restraint", "weight": 1.0}


class Impostor(BaseModel):
    """Has the settings of a term and cannot score."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["test_own_reward:Impostor"] = "test_own_reward:Impostor"
    name: str = "impostor"
    weight: float = 1.0


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_the_example_trains_two_updates_on_a_class_and_measures_a_function(
    tmp_path: Path,
) -> None:
    # A process of its own, as a user starts it; it imports the file as ``own_reward`` by itself.
    ended = subprocess.run(
        [sys.executable, EXAMPLES / "own_reward.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    run = tmp_path / "runs" / "own_reward"
    lines = metrics_of(run)
    assert [line["update"] for line in lines] == [0, 1]
    for line in lines:
        assert 0 < line["reward/restraint/mean"] < 1 and 0 < line["reward/sharpness/mean"] < 1
        assert line["component/restraint.change/mean"] > 0
    rewards = yaml.safe_load((run / "config.yaml").read_text())["rewards"]
    assert rewards["restraint"]["kind"] == "own_reward:Restraint"


def test_the_audit_confirms_what_the_example_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = ("audit-reward", "--preset", "tiny-rc-grpo", "--term", "restraint", "--tasks", "2")
    override = "rewards.restraint={kind: own_reward:Restraint, tolerance: 0.5, weight: 1}"
    # The exit code is not asserted: two tasks are too few for every verdict.
    command(monkeypatch, capsys, *audit, override, "--out", tmp_path)
    (term,) = read_json(tmp_path / "audit.json")["terms"]
    assert term["kind"] == "own_reward:Restraint" and term["expects"] == ["outside"]
    verdicts = {check["name"]: check["verdict"] for check in term["checks"]}
    assert verdicts["valid"] == verdicts["range"] == verdicts["localisation"] == "pass"


def test_a_class_is_named_after_itself_and_its_source_is_part_of_its_fingerprint() -> None:
    term = RunConfig(rewards={"mine": RESTRAINT}).rewards["mine"]
    assert term.name == "mine" and type(term)().name == "Restraint"
    assert len(term.fingerprint()["source"]) == 64
    # A resumed run reads its configuration back and must find the very class.
    written = RunConfig(rewards={"mine": RESTRAINT}).model_dump(mode="json")
    assert RunConfig(**written).rewards["mine"] == term


def test_a_composite_wraps_a_class_of_the_users() -> None:
    rewards = {"pasted": {"kind": "composite", "weight": 1.0, "of": RESTRAINT}}
    pasted: Any = RunConfig(rewards=rewards).rewards["pasted"]
    assert type(pasted.of).__name__ == "Restraint"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("own_reward:Missing", "has no frozen pydantic model 'Missing'"),
        ("no_such_module:Term", "cannot be imported"),
        ("test_own_reward:Impostor", "lacks .*score.*which rewards asks for"),
    ],
)
def test_a_class_that_is_no_term_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RunConfig(rewards={"mine": {**RESTRAINT, "kind": kind}})


def test_a_term_that_does_not_declare_what_it_responds_to_is_refused_at_definition() -> None:
    # At definition: later, only an audit would find out.
    with pytest.raises(TypeError, match="'Silent' does not declare what it responds to"):

        class Silent(RewardTerm):
            kind: Literal["silent"] = "silent"

            def score(self, candidates: Candidates) -> tuple[Score, ...]:
                return ()


def test_a_term_that_leaves_out_part_of_its_contract_is_refused_at_definition() -> None:
    # Otherwise the first run that asks for the attribute ends in a traceback.
    with pytest.raises(TypeError, match="'Partial' does not declare high, needs_attention"):

        class Partial(RewardTerm):
            kind: Literal["partial"] = "partial"
            responds_to: ClassVar[Sides] = "inside"
            requires: ClassVar[frozenset[str]] = frozenset()
            low: float = 0.0  # a setting declares it as well

            def score(self, candidates: Candidates) -> tuple[Score, ...]:
                return ()
