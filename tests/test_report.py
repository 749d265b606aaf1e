"""The report page: its content, its words on missing parts, and that it needs nothing else."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from report_runs import (
    INSTRUCTIONS,
    TYPES,
    comparison,
    interval,
    write_example,
    write_json,
    write_run,
)
from rl_edit.cli.report import report_command
from rl_edit.errors import InputError
from rl_edit.report import render_report
from rl_edit.report.run_files import read_run
from rl_edit.report.strips import amplified_difference, heat_overlay, mask_outline, read_strip

HOSTILE = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'


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
    cells = (
        '<td class="num">0.495</td><td class="num">0.586</td><td class="num better"><b>+0.091</b>'
    )
    assert f"<th>add</th>{cells}" in section


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


def test_large_images_are_embedded_small_and_smooth(tmp_path: Path) -> None:
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


def test_evaluated_and_last_adapter_are_both_shown_when_they_differ(tmp_path: Path) -> None:
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
    with pytest.raises(InputError, match=r"no run at|nothing to report"):
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
    app = typer.Typer()
    app.command()(report_command)
    result = CliRunner().invoke(app, [str(run_dir)])
    assert result.exit_code == 0
    assert result.output.strip() == str(run_dir / "report.html")


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
