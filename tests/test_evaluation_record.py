"""The files of an evaluation: written and read by one record, also those of the version before."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from report_runs import comparison, write_json
from rl_edit.errors import InputError
from rl_edit.evaluation.evaluated_run import PROTOCOL
from rl_edit.evaluation.examples import ExampleQuota, read_example, write_example
from rl_edit.evaluation.record import (
    EvaluationMeta,
    EvaluationRecord,
    ExampleRecord,
    Row,
)
from rl_edit.files import validated
from rl_edit.measures.intervals import Interval
from rl_edit.report.run_files import read_run
from rl_edit.run_record import RunRecord, read_run_record

EARLIER = Path(__file__).parent / "fixtures" / "earlier_version" / "run"


def as_written(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def test_files_of_the_version_before_are_read_and_written_back_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    text = (EARLIER / "evaluation.json").read_text()
    record = validated(EvaluationRecord, json.loads(text))
    assert as_written(record.model_dump(mode="json")) == text
    meta = record.complete_meta()
    assert meta is not None and meta.model_dump(mode="json") == record.meta
    for line in (EARLIER / "evaluation" / "rows.jsonl").read_text().splitlines():
        assert json.dumps(validated(Row, json.loads(line)).model_dump()) == line
    (directory,) = (EARLIER / "evaluation" / "images").iterdir()
    write_example(tmp_path, read_example(directory))
    names = sorted(path.name for path in directory.iterdir())
    assert sorted(path.name for path in (tmp_path / directory.name).iterdir()) == names
    record_file = tmp_path / directory.name / "task.json"
    assert record_file.read_bytes() == (directory / "task.json").read_bytes()
    for name in names:
        if name.endswith(".png"):
            images = [Image.open(place / name) for place in (directory, tmp_path / directory.name)]
            assert images[0].mode == images[1].mode
            assert np.array_equal(*map(np.asarray, images))


def test_the_run_record_of_the_version_before_is_read_and_written_back_to_the_same_bytes(
    tmp_path: Path,
) -> None:
    record = read_run_record(EARLIER)
    assert record is not None and record.status == "done"
    record.write(tmp_path)
    assert (tmp_path / "run.json").read_bytes() == (EARLIER / "run.json").read_bytes()


def test_a_run_record_is_read_for_what_it_has(tmp_path: Path) -> None:
    assert read_run_record(tmp_path) is None
    write_json(tmp_path / "run.json", {"adapter": None, "colour": "blue"})
    assert read_run_record(tmp_path) == RunRecord(adapter=None)
    write_json(tmp_path / "run.json", {"updates": "many"})
    with pytest.raises(ValueError, match="updates: "):
        read_run_record(tmp_path)
    with pytest.raises(InputError, match=r"run\.json is damaged \(updates: "):
        read_run(tmp_path)


def test_unknown_keys_are_ignored_in_records_and_stay_in_the_meta() -> None:
    content = {**comparison(), "meta": {"steps": 6}, "colour": "blue"}
    record = validated(EvaluationRecord, content)
    assert record.meta == {"steps": 6} and record.by_type == {}
    assert record.complete_meta() is None, "num_steps and more are missing"
    row = {"task_id": "t", "task_type": "add", "values": {"base": {"reward": 1.0}}, "colour": 1}
    assert validated(Row, row).values == {"base": {"reward": 1.0}}


def test_an_unknown_end_is_infinite_here_and_null_in_the_file() -> None:
    written = {"mean": 0.5, "low": None, "high": None, "n": 1}
    record = validated(EvaluationRecord, {"delta": {"reward": written}})
    assert record.delta["reward"] == Interval(0.5, -math.inf, math.inf, 1)
    assert record.delta["reward"].sign == 0
    assert record.model_dump(mode="json")["delta"] == {"reward": written}


def test_a_metric_without_a_mean_was_not_measured() -> None:
    sides = {"reward": {"mean": None}, "instruction": {"mean": math.nan, "n": 3}, "x": {"mean": 1}}
    assert list(validated(EvaluationRecord, {"base": sides}).base) == ["x"]


def test_every_setting_that_a_comparison_needs_is_a_field_without_default() -> None:
    fields = EvaluationMeta.model_fields
    required = {name for name, field in fields.items() if field.is_required()}
    assert required == {*PROTOCOL, "adapter"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"base": []}, "base: "),
        ({"delta": {"reward": 3.0}}, "delta.reward: "),
        ({"delta": {"reward": {"mean": 1.0, "low": "x", "n": 3}}}, "delta.reward.low: "),
        ({"meta": None}, "meta: "),
        ({"by_type": {"add": 3}}, "by_type.add: "),
    ],
)
def test_damage_is_named_by_field_in_one_line(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as damage:
        validated(EvaluationRecord, content)
    assert "\n" not in str(damage.value)
    write_json(tmp_path / "evaluation.json", content)
    with pytest.raises(InputError, match=rf"evaluation\.json is damaged \({words}"):
        read_run(tmp_path)


def test_examples_are_spread_over_task_types_in_order_of_appearance() -> None:
    quota = ExampleQuota(num_examples=3, num_types=2)
    taken = [True, True, False, True, False]
    assert [quota.take(kind) for kind in "aaabb"] == taken
    none = ExampleQuota(num_examples=0, num_types=4)
    assert not none.take("a")


def test_an_example_without_a_name_takes_that_of_its_directory(tmp_path: Path) -> None:
    (directory,) = (EARLIER / "evaluation" / "images").iterdir()
    example = read_example(directory)
    assert example.record.task_id == "heldout-000000"
    write_example(tmp_path, example)
    write_json(tmp_path / "heldout-000000" / "task.json", {"instruction": "remove it"})
    assert read_example(tmp_path / "heldout-000000").record == ExampleRecord(
        task_id="heldout-000000", instruction="remove it"
    )
    write_json(tmp_path / "heldout-000000" / "task.json", {"metrics": 3})
    with pytest.raises(InputError, match=r"task\.json is damaged \(metrics: "):
        read_example(tmp_path / "heldout-000000")
