"""The report page: what it shows, what it says about missing parts, and that it needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from rl_edit.cli.report import report_command
from rl_edit.errors import InputError
from rl_edit.report import render_report, write_figure
from rl_edit.report.axes import nice_ticks
from rl_edit.report.charts import Series, line_chart, moving_average, stacked_chart
from rl_edit.report.figure import FOOT, GAP, HEAD, MARGIN, PANEL, draw_figure
from rl_edit.report.numbers import format_number, format_signed
from rl_edit.report.run_files import read_run
from rl_edit.report.strips import amplified_difference, heat_overlay, mask_outline, read_strip

TYPES = ("add", "recolour", "remove", "replace", "two regions")
INSTRUCTIONS = (
    "add a small red circle next to the blue square",
    "recolour the green triangle to yellow",
    "remove the orange square",
    "replace the purple circle with a white star",
)
HOSTILE = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'


def write_run(directory: Path, *, updates: int = 40, examples: int = 4) -> Path:
    """A run directory with everything a report can show, made of smooth curves and drawn rectangles."""
    rng = np.random.default_rng(7)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / "run.json",
        {
            "name": "tiny-rc-grpo-seed1",
            "method": "rc-grpo",
            "editor": "tiny-kontext",
            "seed": 1,
            "status": "finished",
            "updates": 50,
            "versions": {
                "python": "3.11.9",
                "torch": "2.13.0",
                "diffusers": "0.42.1",
                "commit": "0123abc",
            },
            "hardware": {"cpu": "2 cores", "memory_gb": 8, "gpu": None},
            "command": "rl-edit train --preset tiny-rc-grpo",
            "started": "2025-01-02T10:00:00Z",
            "finished": "2025-01-02T10:06:30Z",
            "left_out_rewards": ["editscore: no endpoint configured"],
        },
    )
    (directory / "config.yaml").write_text(
        "method: rc-grpo\nrollout:\n  group_size: 8\nrewards:\n- kind: judge\n  weight: 1.0\n"
    )
    lines = [json.dumps(metrics_row(update, updates, rng)) for update in range(updates)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    events = [
        {"time": 1735812000.0 + i, "event": "update_done", "update": i} for i in range(updates)
    ]
    events.insert(
        5,
        {
            "time": 1735812004.5,
            "event": "group_dropped",
            "reason": "no spread: all candidates score 0.41",
            "task_id": "t-0012",
        },
    )
    events.insert(
        9,
        {"time": 1735812008.5, "event": "warning", "message": "reward actor answered after 9.5 s"},
    )
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(directory / "evaluation.json", evaluation())
    for index in range(examples):
        write_example(directory / "evaluation" / "images" / f"shapes-{index:04d}", index, rng)
    return directory


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def metrics_row(update: int, updates: int, rng: np.random.Generator) -> dict[str, Any]:
    gain, jitter = 1.0 - math.exp(-3.0 * update / updates), rng.normal(size=12)
    return {
        "update": update,
        "reward/total/mean": 0.9 + 0.25 * gain + 0.05 * jitter[0],
        "reward/total/spread": 0.12 + 0.02 * jitter[1],
        "reward/judge/mean": 0.5 + 0.2 * gain + 0.05 * jitter[2],
        "reward/judge/spread": 0.1 + 0.02 * jitter[3],
        "reward/preservation/mean": 0.8 + 0.03 * gain + 0.01 * jitter[4],
        "reward/preservation/spread": 0.01 + 0.002 * jitter[5],
        "reward/concentration/mean": 1.4 + 0.3 * gain + 0.05 * jitter[6],
        "component/judge.instruction/mean": 0.45 + 0.25 * gain + 0.05 * jitter[2],
        "component/judge.clean/mean": 0.9 + 0.01 * jitter[7],
        "background/psnr/mean": 31.8 + 0.4 * gain + 0.15 * jitter[8],
        "background/psnr/spread": 0.36 + 0.03 * jitter[9],
        "concentration/mean": 1.4 + 0.3 * gain + 0.05 * jitter[6],
        "ratio/mean": 1.0 + 0.002 * jitter[10],
        "ratio/max_deviation": 0.05 + 0.02 * abs(jitter[11]),
        "clip/share": 0.0 if update < 3 else 0.04 + 0.01 * abs(jitter[1]),
        "gradient/norm": 0.3 + 0.1 * abs(jitter[0]),
        "groups/used": 8 - (update % 9 == 4),
        "groups/dropped": int(update % 9 == 4),
        "adapter": f"{update + 1}:ab12cd34ef56",
        "staleness": update % 2,
        "seconds/rollout": 2.6 + 0.2 * abs(jitter[3]),
        "seconds/reward": 0.3,
        "seconds/learn": 1.4 + 0.1 * abs(jitter[4]),
        "seconds/publish": 0.05,
        "seconds/update": 4.0 + 0.2 * abs(jitter[5]),
    }


def interval(mean: float, half: float, n: int = 256) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def comparison(shift: float = 0.0, n: int = 256) -> dict[str, Any]:
    rows = {
        "instruction": (0.495, 0.131 + shift, 0.018),
        "reward": (1.102, 0.204 + shift, 0.025),
        "background_psnr_masked": (32.0, -0.03 + shift, 0.06),
        "background_psnr_zero_filled": (33.9, -0.31, 0.1),
        "background_ssim": (0.9412, 0.0005, 0.0011),
        "concentration": (1.41, 0.22, 0.03),
        "sharpness_index": (0.5, 0.01, 0.002),
    }
    return {
        "base": {name: interval(base, half, n) for name, (base, _, half) in rows.items()},
        "trained": {
            name: interval(base + delta, half, n) for name, (base, delta, half) in rows.items()
        },
        "delta": {name: interval(delta, half, n) for name, (_, delta, half) in rows.items()},
    }


def evaluation() -> dict[str, Any]:
    by_type = {kind: comparison(0.02 * (index - 2), 51) for index, kind in enumerate(TYPES)}
    meta = {
        "num_tasks": 256,
        "num_noises": 2,
        "seed": 3,
        "steps": 6,
        "adapter": "40:ab12cd34ef56",
        "psnr_convention": "masked: mean over pixels outside the mask only; zero-filled: inside set to zero in both",
    }
    return {**comparison(), "by_type": by_type, "meta": meta}


def write_example(
    directory: Path,
    index: int,
    rng: np.random.Generator,
    *,
    size: int = 64,
    instruction: str | None = None,
) -> None:
    directory.mkdir(parents=True)
    rows, columns = np.mgrid[0:size, 0:size]
    ground = np.stack([90 + rows, 120 + columns // 2, 150 - rows // 2], axis=2) + rng.integers(
        -8, 9, (size, size, 1)
    )
    source = np.clip(ground, 0, 255).astype(np.uint8)
    source[size // 8 : size // 3, size // 2 : size * 7 // 8] = (210, 180, 60)
    mask = (rows - size * 0.62) ** 2 + (columns - size * (0.3 + 0.1 * index % 0.4)) ** 2 < (
        size * 0.2
    ) ** 2
    target, base, trained = source.copy(), source.copy(), source.copy()
    target[mask], base[mask], trained[mask] = (210, 40, 40), (150, 90, 100), (200, 50, 48)
    trained = np.clip(trained.astype(int) + rng.integers(-4, 5, trained.shape), 0, 255).astype(
        np.uint8
    )
    pictures = {
        "source": source,
        "mask": mask.astype(np.uint8) * 255,
        "target": target,
        "base": base,
        "trained": trained,
    }
    tokens = mask[:: size // 16, :: size // 16].astype(float)
    pictures["attention_base"] = (40 + 90 * tokens + rng.uniform(0, 60, tokens.shape)).astype(
        np.uint8
    )
    pictures["attention_trained"] = (20 + 190 * tokens + rng.uniform(0, 30, tokens.shape)).astype(
        np.uint8
    )
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(directory / f"{name}.png")
    write_json(
        directory / "task.json",
        {
            "task_id": directory.name,
            "task_type": TYPES[index % len(TYPES)],
            "instruction": instruction or INSTRUCTIONS[index % len(INSTRUCTIONS)],
            "metrics": {
                "base": {"instruction": 0.31, "background_psnr_masked": 30.1, "reward": 0.9},
                "trained": {
                    "instruction": 0.72 + index / 100,
                    "background_psnr_masked": 31.0,
                    "reward": 1.3,
                },
            },
        },
    )


class Page(HTMLParser):
    """The parts of a page that tests ask for: tags with attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny-rc-grpo-seed1")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> str:
    path = render_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_title_block_names_run_method_editor_seed_adapter_and_updates(page: str) -> None:
    text = Page(page).text
    for fact in (
        "tiny-rc-grpo-seed1",
        "rc-grpo",
        "tiny-kontext",
        "40:ab12cd34ef56",
        "40 of 50",
        "finished",
    ):
        assert fact in text, fact
    assert "Seed 1" in text


def test_headline_tiles_show_delta_interval_n_and_colour_by_whether_zero_is_excluded(
    page: str,
) -> None:
    tiles = dict(
        re.findall(r'<div class="card tile (\w+)">\s*<h2>([^<]+)', page)[i][::-1] for i in range(3)
    )
    assert tiles == {
        "Training reward": "better",
        "Instruction score": "better",
        "Background PSNR": "unclear",
    }
    text = Page(page).text
    assert "+0.131 " in text and "95 % paired interval +0.113 to +0.149, n = 256" in text
    assert "\u22120.03 dB" in text and "95 % paired interval \u22120.09 to +0.03, n = 256" in text
    assert "base 0.495 \u2192 trained 0.626" in text


def test_comparison_table_has_every_metric_with_known_ones_first(page: str) -> None:
    table = page[page.index("Base against trained") : page.index("By task type")]
    labels = re.findall(r"<tr><th>([^<]+)", table)
    assert [label.strip() for label in labels[1:]] == [
        "Training reward",
        "Instruction score",
        "Background PSNR",
        "Background PSNR, zero-filled",
        "Background SSIM",
        "Attention concentration",
        "sharpness index",
    ]
    assert 'num worse"><b>\u22120.31</b>' in table


def test_a_clear_change_of_a_quantity_without_a_good_direction_is_neither_green_nor_red(
    page: str,
) -> None:
    row = next(part for part in page.split("<tr>") if part.startswith("<th>sharpness index"))
    assert 'class="num moved"' in row and "better" not in row and "worse" not in row


def test_every_task_type_has_base_trained_and_delta_for_each_headline_metric(page: str) -> None:
    section = page[page.index("By task type") : page.index("Other metrics by task type")]
    for kind in TYPES:
        assert section.count(f"<th>{kind}</th>") == 4
    assert (
        '<th>add</th><td class="num">0.495</td><td class="num">0.586</td><td class="num better"><b>+0.091</b>'
        in section
    )


def test_every_metric_key_is_drawn_in_a_chart_with_axis_names_and_last_value(
    page: str, run_dir: Path
) -> None:
    titles = re.findall(r'<svg class="plot"[^>]*aria-label="([^"]+)"', page)
    for title in (
        "Total reward",
        "Reward term: judge",
        "Part of a reward: judge.instruction",
        "Background PSNR",
        "Background PSNR, spread within a group",
        "Concentration, mean",
        "Spread of the total reward",
        "Spread of preservation",
        "Probability ratio, largest |ratio \u2212 1|",
        "Share of ratios clipped",
        "Gradient norm",
        "Groups used and dropped",
        "Staleness",
        "Seconds per phase",
    ):
        assert titles.count(title) == 1, title
    assert "Other numbers" not in page
    assert page.count(">update</text>") == len(titles)
    last = read_run(run_dir).column("background/psnr/mean")[-1][1]
    assert f"<b>{last:.4g}</b> dB" in page
    assert re.search(r"<title>update 12\n[\d.]+ dB</title>", page)


def test_a_key_this_page_does_not_know_is_still_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"update": 0, "novel/quantity": 3.25}\n')
    text = render_report(tmp_path).read_text()
    assert 'aria-label="novel/quantity"' in text and "<b>3.25</b>" in text


def test_background_terms_are_shown_outside_the_mask(page: str) -> None:
    inside = page[page.index("<h3>Inside the mask") : page.index("<h3>Outside the mask")]
    outside = page[page.index("<h3>Outside the mask") : page.index("<h3>Where the editor looks")]
    assert "Reward term: preservation" in outside and "Reward term: preservation" not in inside
    assert "Reward term: judge" in inside


def test_every_strip_has_all_its_panels_and_numbers(page: str) -> None:
    strips = page.split('<article class="card strip">')[1:]
    assert len(strips) == 4
    for index, strip in enumerate(strips):
        captions = re.findall(r"<figcaption>([^<]+)</figcaption>", strip)
        assert captions == [
            "source, mask outlined",
            "mask (white may change)",
            "target",
            "base",
            "trained",
            "|trained \u2212 base| \u00d7 4",
            "attention, base",
            "attention, trained",
        ]
        assert INSTRUCTIONS[index] in strip and f"shapes-{index:04d}" in strip
        assert f"Instruction score <b>0.310 &rarr; {0.72 + index / 100:.3f}</b>" in strip
        assert "Background PSNR <b>30.10 &rarr; 31.00 dB</b> <small>(+0.90)</small>" in strip
        assert strip.count("data:image/png;base64,") == 8 and strip.count('class="pixelated"') == 8


def test_optional_target_and_attention_are_left_out_of_the_strip_when_absent(
    tmp_path: Path,
) -> None:
    write_example(tmp_path / "a", 0, np.random.default_rng(0))
    for name in ("target", "attention_base", "attention_trained"):
        (tmp_path / "a" / f"{name}.png").unlink()
    titles = [panel.title for panel in read_strip(tmp_path / "a").panels]
    assert len(titles) == 5 and not any(
        "target" in title or "attention" in title for title in titles
    )


def test_large_pictures_are_embedded_small_and_smooth(tmp_path: Path) -> None:
    write_example(tmp_path / "a", 0, np.random.default_rng(0), size=512)
    strip = read_strip(tmp_path / "a")
    assert not any(panel.pixelated for panel in strip.panels)
    assert (strip.width, strip.height) == (512, 512)


def test_an_example_that_cannot_be_drawn_is_named_with_the_reason_and_the_others_are_drawn(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", updates=2, examples=4)
    images = run / "evaluation" / "images"
    Image.new("RGB", (32, 32)).save(images / "shapes-0000" / "trained.png")
    (images / "shapes-0001" / "base.png").write_bytes(b"not an image")
    (images / "shapes-0002" / "task.json").unlink()
    text = render_report(run).read_text()
    assert text.count('<article class="card strip">') == 1
    notice = text[text.index("could not be drawn") :]
    assert "<code>shapes-0000</code>: trained.png is 32x32 but source.png is 64x64" in notice
    assert "<code>shapes-0001</code>: base.png is not a readable image" in notice
    assert "<code>shapes-0002</code>: task.json is missing" in notice


def test_user_text_is_escaped_everywhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=3, examples=0)
    write_example(
        run / "evaluation" / "images" / "t", 0, np.random.default_rng(0), instruction=HOSTILE
    )
    about = json.loads((run / "run.json").read_text())
    write_json(
        run / "run.json",
        {**about, "name": HOSTILE, "method": HOSTILE, "command": HOSTILE, "status": HOSTILE},
    )
    (run / "config.yaml").write_text(HOSTILE)
    (run / "events.jsonl").write_text(
        json.dumps({"time": HOSTILE, "event": "warning", "message": HOSTILE}) + "\n"
    )
    row = {
        "update": 3,
        f"reward/{HOSTILE}/mean": 1.0,
        f"seconds/{HOSTILE}": 1.0,
        f"groups/{HOSTILE}": 1.0,
        HOSTILE: 2.0,
    }
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    page = Page(render_report(run).read_text())
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert page.text.count('<script>alert("x")</script>') >= 8


def test_page_loads_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert (
        "http://" not in page
        and "https://" not in page
        and "@import" not in page
        and "url(" not in page
    )
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "iframe", "object", "embed"}
        for name in ("src", "srcset", "data", "href", "xlink:href", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, name)
    policy = next(
        a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy


def test_configuration_environment_and_notable_events_are_shown(page: str) -> None:
    text = Page(page).text
    assert "group_size: 8" in text and "rl-edit train --preset tiny-rc-grpo" in text
    assert "torch 2.13.0" in text and "cpu 2 cores" in text
    assert (
        "no spread: all candidates score 0.41" in text
        and "reward actor answered after 9.5 s" in text
    )
    assert "2025-01-02 10:00:04 UTC" in text
    assert "update_done \u00d7 40" in text and "update: 17" not in text
    assert "editscore: no endpoint configured" in text


def test_a_half_written_last_line_is_no_fault_but_a_broken_middle_line_is_counted(
    tmp_path: Path,
) -> None:
    good = [json.dumps({"update": i, "reward/total/mean": 0.5 + i}) for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(good) + '\n{"update": 3, "reward/tot')
    text = render_report(tmp_path).read_text()
    assert "3 of ?" in text and "could not be read" not in text
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([good[0], '{"update": 1, "rew', *good[1:]]) + "\n"
    )
    text = render_report(tmp_path).read_text()
    assert "3 of ?" in text and "1 line of metrics.jsonl could not be read" in text


def test_nan_none_and_infinity_are_skipped_not_drawn(tmp_path: Path) -> None:
    rows = [
        '{"update": 0, "gradient/norm": 0.5}',
        '{"update": 1, "gradient/norm": NaN}',
        '{"update": 2, "gradient/norm": null}',
    ]
    rows += [
        '{"update": 3, "gradient/norm": Infinity}',
        '{"update": 4, "gradient/norm": 0.75, "clip/share": NaN}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert read_run(tmp_path).column("gradient/norm") == ((0.0, 0.5), (4.0, 0.75))
    text = render_report(tmp_path).read_text()
    assert "Share of ratios clipped" not in text
    assert not re.search(r"\b(nan|inf)\b", text.lower())


def test_metrics_without_a_number_read_as_a_dash(tmp_path: Path) -> None:
    value = {
        "base": {"reward": {"mean": None}, "instruction": interval(0.5, 0.1)},
        "trained": {},
        "delta": {"instruction": {"mean": math.nan}},
    }
    write_json(tmp_path / "evaluation.json", value)
    text = render_report(tmp_path).read_text()
    assert text.count("Not measured in this evaluation.") == 3
    assert '<th>Instruction score</th><td class="num">0.500</td><td class="num">\u2014</td>' in text


def test_a_resumed_run_counts_a_repeated_update_once_with_its_later_value(tmp_path: Path) -> None:
    rows = [(0, 0.1), (1, 0.2), (2, 0.3), (1, 0.25), (2, 0.35), (3, 0.4)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"update": u, "reward/total/mean": r}) + "\n" for u, r in rows)
    )
    assert read_run(tmp_path).column("reward/total/mean") == (
        (0.0, 0.1),
        (1.0, 0.25),
        (2.0, 0.35),
        (3.0, 0.4),
    )
    assert "4 of ?" in render_report(tmp_path).read_text()


def test_missing_parts_are_said_plainly(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"name": "young", "status": "running", "updates": 10})
    text = Page(render_report(tmp_path).read_text()).text
    for sentence in (
        "0 of 10",
        "Not evaluated yet.",
        "No evaluated examples",
        "No curves: metrics.jsonl is missing",
        "No events: events.jsonl is missing",
        "No configuration: config.yaml is missing",
        "No environment: run.json names no versions",
    ):
        assert sentence in text, sentence


def test_evaluated_and_last_adapter_are_told_apart_when_they_differ(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"update": 9, "adapter": "10:bbbb", "reward/total/mean": 1.0}\n'
    )
    write_json(tmp_path / "evaluation.json", {**comparison(), "meta": {"adapter": "5:aaaa"}})
    text = Page(render_report(tmp_path).read_text()).text
    assert "Adapter, evaluated 5:aaaa" in text and "Adapter, last update 10:bbbb" in text


@pytest.mark.parametrize(
    "content", [None, {}, {"config.yaml": "seed: 1\n"}, {"metrics.jsonl": '{"update": 0, "rew'}]
)
def test_nothing_to_show_is_an_input_error_and_writes_nothing(
    tmp_path: Path, content: dict[str, str] | None
) -> None:
    run = tmp_path / "run"
    if content is not None:
        run.mkdir()
        for name, text in content.items():
            (run / name).write_text(text)
    with pytest.raises(InputError, match=r"no run directory|nothing to report"):
        render_report(run)
    assert not (run / "report.html").exists()


def test_a_broken_evaluation_is_an_input_error_and_keeps_the_old_page(
    run_dir: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", updates=2, examples=0)
    before = render_report(run).read_bytes()
    (run / "evaluation.json").write_text('{"base": {')
    with pytest.raises(InputError, match=r"evaluation\.json is not JSON"):
        render_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_the_same_files_give_the_same_page(run_dir: Path) -> None:
    assert render_report(run_dir).read_bytes() == render_report(run_dir).read_bytes()


def test_a_run_of_thousands_of_updates_stays_a_light_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", updates=5000, examples=0)
    page = render_report(run)
    assert page.stat().st_size < 3_000_000
    assert "5000 of 50" in page.read_text()


def test_command_prints_the_path_of_the_page(run_dir: Path) -> None:
    result = CliRunner().invoke(report_app(), [str(run_dir)])
    assert result.exit_code == 0
    assert result.output.strip() == str(run_dir / "report.html")


def report_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(report_command)
    return app


def test_the_figure_has_a_row_for_each_kind_of_edit_and_is_a_small_png(
    run_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "images" / "figure.png"
    result = CliRunner().invoke(report_app(), [str(run_dir), "--figure", str(path)])
    assert result.exit_code == 0
    assert result.output.split() == [str(run_dir / "report.html"), str(path)]
    with Image.open(path) as figure:
        assert figure.format == "PNG"
        assert figure.width == 1600
        assert figure.height == 2 * (HEAD + 4 * (PANEL + GAP) + FOOT)
    assert path.stat().st_size < 200_000


def test_the_figure_shows_the_first_example_of_each_kind_without_blur(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=2, examples=7)
    left, top, side = 800 - MARGIN - PANEL, HEAD, 2 * PANEL
    figure = np.asarray(draw_figure(run))
    for row in range(5):  # the sixth and seventh example are of the first two kinds again
        place = np.s_[2 * (top + row * (PANEL + GAP)) :, 2 * (left - 4 * (PANEL + GAP)) :]
        drawn = figure[place][:side, :side]
        source = np.asarray(Image.open(run / f"evaluation/images/shapes-{row:04d}/source.png"))
        assert (drawn == source.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_the_figure_does_without_target_attention_metrics_and_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", updates=2, examples=2)
    (run / "evaluation.json").unlink()
    for name in ("target", "attention_base", "attention_trained"):
        (run / "evaluation" / "images" / "shapes-0000" / f"{name}.png").unlink()
    write_json(
        run / "evaluation" / "images" / "shapes-0000" / "task.json",
        {"task_type": "add", "instruction": "a very long instruction " * 9},
    )
    assert write_figure(run, tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("examples", "name", "words"),
    [
        (0, "figure.png", "has no evaluated examples"),
        (1, "figure.jpg", "no PNG"),
        (1, "run.json/figure.png", "cannot write"),
    ],
)
def test_a_figure_that_cannot_be_made_is_an_input_error(
    tmp_path: Path, examples: int, name: str, words: str
) -> None:
    run = write_run(tmp_path, updates=2, examples=examples)
    with pytest.raises(InputError, match=words):
        write_figure(run, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_difference_is_absolute_times_four_and_clipped() -> None:
    first, second = (
        np.array([[[10, 200, 0]]], dtype=np.uint8),
        np.array([[[12, 100, 0]]], dtype=np.uint8),
    )
    assert amplified_difference(first, second).tolist() == [[[8, 255, 0]]]
    assert amplified_difference(second, first).tolist() == [[[8, 255, 0]]]


def test_heat_overlay_keeps_tokens_square_and_is_hottest_where_attention_is() -> None:
    source = np.full((4, 8, 3), 100, dtype=np.uint8)
    overlay = heat_overlay(source, np.array([[0, 200]], dtype=np.uint8), peak=200.0)
    assert overlay.shape == (4, 8, 3)
    assert (overlay[:, :4] == overlay[0, 0]).all() and (overlay[:, 4:] == overlay[0, 4]).all()
    assert int(overlay[0, 4].sum()) > int(overlay[0, 0].sum())


def test_mask_outline_follows_pixel_edges_even_at_the_border() -> None:
    mask = np.zeros((3, 4), dtype=bool)
    mask[0:2, 1:3] = True
    assert mask_outline(mask) == "M1 0H3M1 2H3M1 0V2M3 0V2"


def test_moving_average_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert moving_average([2.0, 2.0, 2.0], 5) == pytest.approx([2.0, 2.0, 2.0])
    weight = 2.0 / 4.0
    expected = ((1 - weight) * weight * 1.0 + weight * 3.0) / (1 - (1 - weight) ** 2)
    assert moving_average([1.0, 3.0], 3) == pytest.approx([1.0, expected])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-3.2, 17.0), (31.91, 32.04), (5.0, 5.0), (0.0, 0.0), (1e-9, 3e-9), (-2e6, 4e6)],
)
def test_ticks_are_even_enclose_the_data_and_stay_few(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_numbers_have_real_minus_signs_and_no_negative_zero() -> None:
    assert (
        format_number(-0.5),
        format_number(-0.0004, 3),
        format_number(12.0),
        format_number(123456.0),
        format_number(2e-7),
    ) == (
        "\u22120.5",
        "0.000",
        "12",
        "1.23e+05",
        "2.00e-07",
    )
    assert (format_signed(0.25, 2), format_signed(-0.25, 2), format_signed(0.001, 2)) == (
        "+0.25",
        "\u22120.25",
        "0.00",
    )


def test_a_single_update_draws_a_dot_and_no_data_draws_no_chart() -> None:
    chart = line_chart(title="t", unit="dB", series=[Series(label="t", points=((0.0, 1.5),))])
    assert chart is not None and chart.svg.count("<circle") == 1 and chart.legend[0].last == "1.5"
    assert line_chart(title="t", unit="dB", series=[Series(label="t", points=())]) is None
    assert stacked_chart(title="t", unit="s", phases={"a": ()}) is None


def test_stacked_bars_add_up_to_the_height_of_their_sum() -> None:
    chart = stacked_chart(title="t", unit="s", phases={"a": ((0.0, 1.0),), "b": ((0.0, 3.0),)})
    assert chart is not None
    heights = [
        float(height) for height in re.findall(r'<rect class="bar[^>]*height="([\d.]+)"', chart.svg)
    ]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.3)
    assert "a: 1 s\nb: 3 s" in chart.svg
