"""The report page: what it shows, and that text from a model cannot become markup."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest

from dsv2.report import Section, bar_plot, data_sections, run_sections, samples_section, write_report

DENSE_STEP = {"tokens": 100, "loss": 2.0, "lr": 0.1}
STEP = DENSE_STEP | {
    "balance_loss": {"expert": 1.1, "device": 1.05, "communication": 0.8},
    "drop_rate": 0.02,
    "devices_per_token": 1.6,
    "load_max_over_mean": {"moe_layer_1": 1.0, "moe_layer_2": 1.4},
    "expert_load": [[0.5, 0.5], [0.7, 0.3]],
}


def run_with(tmp_path: Path, *records: dict) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return tmp_path


def test_a_run_shows_loss_held_out_text_and_load(tmp_path):
    run = run_with(tmp_path, {"step": 0, "held_out_bits_per_byte": {"a": 3.0}}, {"step": 1, **STEP})
    sections = run_sections(run)
    assert [s.title for s in sections] == [
        *("Training loss", "Held-out bits per byte"),
        *("Expert load", "Expert load over time", "Balance between devices"),
    ]
    assert all(s.markup.startswith("<svg") for s in sections)


def test_a_dense_run_has_no_load(tmp_path):
    sections = run_sections(run_with(tmp_path, {"step": 1, **DENSE_STEP}))
    assert [s.title for s in sections] == ["Training loss"]


def test_a_run_on_one_device_has_no_balance_between_devices(tmp_path):
    step = {"step": 1, **STEP, "balance_loss": {"expert": 1.1, "device": 1.0, "communication": 1.0}}
    titles = [s.title for s in run_sections(run_with(tmp_path, step))]
    assert titles == ["Training loss", "Expert load", "Expert load over time"]


def test_a_line_cut_short_by_a_kill_is_passed_over(tmp_path):
    run = run_with(tmp_path, {"step": 1, **STEP})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss"')
    assert run_sections(run)


def test_a_directory_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no training metrics"):
        run_sections(tmp_path)


def test_text_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>"
    sections = [samples_section([{"title": evil, "prompt": evil, "completion": evil}])]
    sections.append(Section(evil, evil, (evil,), [(evil,)]))
    write_report(tmp_path / "r.html", evil, sections)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 9


def test_bars_carry_their_labels_and_values():
    plot = bar_plot(["MLA", "MHA"], [320, 1024], "elements")
    assert plot.startswith("<svg")
    assert "1,024" in plot


@pytest.mark.parametrize("source", ["文言", "_hidden", "$x$", r"$\broken", "a & b <i>"])
def test_a_source_of_any_name_stands_in_the_legend(tmp_path, source):
    run = run_with(tmp_path, {"step": 0, "held_out_bits_per_byte": {source: 3.0}}, {"step": 1, **STEP})
    (section,) = [s for s in run_sections(run) if s.title == "Held-out bits per byte"]
    assert f"{html.escape(source, quote=False)}</text>" in section.markup


def test_the_page_holds_titles_tables_and_plots(tmp_path):
    run = run_with(tmp_path, {"step": 1, **STEP})
    table = Section("Scores", "A note.", ("text", "bits"), [("prose", "1.234")])
    write_report(tmp_path / "report.html", "A run", [table, *run_sections(run)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>A run</title>" in page
    assert "<th>bits</th>" in page
    assert "<td>1.234</td>" in page
    assert "A note." in page
    assert page.count("<svg") == 4
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


DATA = {
    "outcomes": [
        {"source": "web", "language": "english", "outcome": "too_short", "documents": 1200, "bytes": 5_000_000},
        {"source": "web", "language": "english", "outcome": "kept", "documents": 3400, "bytes": 90_000_000},
    ],
    "mixture": [
        {"source": "web", "language": "english", "available_tokens": 1000, "tokens": 2000, "epochs": 2.0},
    ],
    "train": {"documents": 6700, "tokens": 2000},
    "held_out": {"documents": 50, "tokens": 30},
    "document_tokens": [{"below": 64, "documents": 3000}, {"below": 128, "documents": 400}],
    "examples": {"too_short": [{"id": "a<b", "text": "<script>"}]},
}


def test_prepared_data_shows_outcomes_mixture_lengths_and_examples(tmp_path):
    write_report(tmp_path / "report.html", "Data", data_sections(DATA))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Of 4,600 documents read, 3,400 passed", "<td>too_short</td>", "<td>2.00</td>", "&lt; 128", "a&lt;b"):
        assert text in page
    assert page.count("<svg") == 3
    assert "<script>" not in page


def test_a_source_that_appears_later_is_drawn_from_then_on(tmp_path):
    evals = [{"step": i, "held_out_bits_per_byte": {"a": 3.0} | ({"b": 2.0} if i else {})} for i in range(3)]
    assert len(run_sections(run_with(tmp_path, *evals, {"step": 3, **DENSE_STEP}))) == 2


def test_the_load_of_every_record_and_layer_stands_in_the_history(tmp_path):
    records = [{"step": step, **STEP} for step in (10, 20, 30, 34)]
    (section,) = [s for s in run_sections(run_with(tmp_path, *records)) if s.title == "Expert load over time"]
    for label in ("10", "20", "30", "34", "MoE layer 1", "MoE layer 2"):
        assert f">{label}</text>" in section.markup, label
