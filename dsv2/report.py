"""`report.html`: a run as one page to look at, without files beside it. Plots by matplotlib, text by jinja2."""

from __future__ import annotations

import html
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2.files import write_text
from dsv2.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
pre { background: #f6f6f4; padding: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { background: #e3ecfa; font-weight: normal; } .note { color: #555; }
</style></head><body>
<h1>{{ title }}</h1>
{% for s in sections %}<section><h2>{{ s.title }}</h2>
{% if s.note %}<p class="note">{{ s.note }}</p>{% endif %}
{% if s.rows %}<table><tr>{% for c in s.header %}<th>{{ c }}</th>{% endfor %}</tr>
{% for row in s.rows %}<tr>{% for c in row %}<td>{{ c }}</td>{% endfor %}</tr>{% endfor %}</table>{% endif %}
{{ s.markup | safe }}</section>
{% endfor %}</body></html>
"""


# Of load times the number of experts: balance is the middle.
_HEAT: dict[str, Any] = {"aspect": "auto", "cmap": "viridis", "vmin": 0, "vmax": 2}


@dataclass(slots=True)
class Section:
    """A heading, an optional sentence, an optional table, and optional markup that is already safe."""

    title: str
    note: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = field(default_factory=list)
    markup: str = ""


def write_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Render the page and put it in place by one rename."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_PAGE).render(title=title, sections=sections)
    write_text(path, text)


def run_sections(run_dir: Path) -> list[Section]:
    """What every training run shows: losses, held-out bits per byte, learning rate, expert load, balance.

    Raises ValueError where the directory holds no metrics.
    """
    records = read_metrics(run_dir)
    steps = [r for r in records if "loss" in r]
    if not steps:
        raise ValueError(f"{run_dir} holds no training metrics")
    sections = [Section("Training loss", "Cross-entropy on the training text, nats a token.", markup=_loss_plot(steps))]
    evals = [r for r in records if "held_out_bits_per_byte" in r]
    if evals:
        note = "Text the model never saw, by source; lower is better."
        sections.append(Section("Held-out bits per byte", note, markup=_held_out_plot(evals)))
    if "expert_load" in steps[-1]:
        note = (
            "Share of the routed tokens that each expert received over the last steps, times the number of experts: "
            "1 is balance. Below: the busiest expert over the mean, worst layer, as training went on."
        )
        sections.append(Section("Expert load", note, markup=_load_plot(steps)))
        note = "The same share from the first steps to the last; a row is an expert."
        sections.append(Section("Expert load over time", note, markup=_load_history_plot(steps)))
    # One device is always in balance.
    if any(r["balance_loss"]["device"] != 1 for r in steps if "balance_loss" in r):
        note = (
            "Losses before their weights (1 is balance), devices that a token is sent to, and the share of the routed "
            "tokens that were dropped because a device was full; means over the layers."
        )
        sections.append(Section("Balance between devices", note, markup=_balance_plot(steps)))
    return sections


def data_sections(report: dict[str, Any]) -> list[Section]:
    """What `dsv2 data prepare` kept, dropped and why, and how the kept text is mixed; `report` is its report.json."""
    outcomes = report["outcomes"]
    num_read = sum(row["documents"] for row in outcomes)
    kept = [row for row in outcomes if row["outcome"] == "kept"]
    num_kept = sum(row["documents"] for row in kept)
    train, held_out = report["train"], report["held_out"]
    note = (
        f"Of {num_read:,} documents read, {num_kept:,} passed filters and deduplication. {held_out['documents']:,} "
        f"of them are held out; the rest is used {train['documents']:,} times, {train['tokens']:,} tokens to train on."
    )
    totals = Counter({row["outcome"]: 0 for row in outcomes})
    for row in outcomes:
        totals[row["outcome"]] += row["documents"]
    names = [name.replace("_", " ") for name in totals]
    header = ("outcome", "source", "language", "documents", "MB")
    rows = [
        (r["outcome"], r["source"], r["language"], f"{r['documents']:,}", f"{r['bytes'] / 1e6:,.2f}") for r in outcomes
    ]
    plot = bar_plot(names, list(totals.values()), "documents")
    shares = report["mixture"]
    return [
        Section("What became of the documents", note, header, rows, plot),
        _mixture_section(shares),
        Section(
            "Lengths of kept documents", "Duplicates are not counted.", markup=_lengths_plot(report["document_tokens"])
        ),
        _examples_section(report["examples"]),
    ]


def _mixture_section(shares: Sequence[dict[str, Any]]) -> Section:
    total = sum(s["tokens"] for s in shares)
    header = ("source", "language", "tokens available", "epochs", "tokens used", "share")
    rows = [
        (
            s["source"],
            s["language"],
            f"{s['available_tokens']:,}",
            f"{s['epochs']:.2f}",
            f"{s['tokens']:,}",
            f"{s['tokens'] / max(total, 1):.1%}",
        )
        for s in shares
    ]
    labels = [_label(f"{s['source']}, {s['language']}") for s in shares]
    plot = bar_plot(labels, [s["tokens"] for s in shares], "tokens used")
    return Section("Mixture", "Tokens to train on, held-out documents not counted.", header, rows, plot)


def _examples_section(examples: dict[str, list[dict[str, str]]]) -> Section:
    rows = [(reason, e["id"], e["text"]) for reason, found in examples.items() for e in found]
    return Section(
        "Examples of what the filters dropped", "The beginning of each.", ("reason", "document", "text"), rows
    )


def _lengths_plot(lengths: Sequence[dict[str, int]]) -> str:
    figure = _figure(2.8)
    axes = figure.subplots()
    axes.bar([f"< {row['below']:,}" for row in lengths], [row["documents"] for row in lengths], color="#3b6fb6")
    axes.tick_params(axis="x", rotation=40)
    axes.set_xlabel("tokens")
    axes.set_ylabel("documents")
    return _svg(figure)


def samples_section(samples: Sequence[dict[str, str]]) -> Section:
    """Prompts and continuations, the continuation marked."""
    blocks = [
        f"<h3>{html.escape(s['title'])}</h3><pre>{html.escape(s['prompt'])}<b>{html.escape(s['completion'])}</b></pre>"
        for s in samples
    ]
    return Section("Samples", "The prompt, and what the model made of it (marked).", markup="".join(blocks))


def bar_plot(labels: Sequence[str], values: Sequence[float], xlabel: str) -> str:
    """Horizontal bars with their values, as SVG."""
    figure = _figure(0.5 * len(labels) + 0.9)
    axes = figure.subplots()
    bars = axes.barh(list(labels), list(values), color="#3b6fb6")
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(xlabel)
    return _svg(figure)


def _loss_plot(steps: Sequence[dict[str, Any]]) -> str:
    figure = _figure(3.4)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    tokens = [r["tokens"] / 1e6 for r in steps]
    loss.plot(tokens, [r["loss"] for r in steps], color="#3b6fb6")
    loss.set_ylabel("loss [nats a token]")
    rate.plot(tokens, [r["lr"] for r in steps], color="#888")
    rate.set_ylabel("lr")
    rate.set_xlabel("training tokens [millions]")
    return _svg(figure)


def _held_out_plot(evals: Sequence[dict[str, Any]]) -> str:
    figure = _figure(3.0)
    axes = figure.subplots()
    for source in evals[-1]["held_out_bits_per_byte"]:
        points = [(r["step"], r["held_out_bits_per_byte"].get(source)) for r in evals]
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=_label(source))
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.legend()
    return _svg(figure)


def _load_plot(steps: Sequence[dict[str, Any]]) -> str:
    load = steps[-1]["expert_load"]
    num_experts = len(load[0])
    figure = _figure(1.6 + 0.28 * len(load) + 1.6)
    heat, busiest = figure.subplots(2, 1, height_ratios=(0.28 * len(load) + 0.4, 1.6))
    image = heat.imshow([[x * num_experts for x in row] for row in load], **_HEAT)
    heat.set_yticks(range(len(load)), _layer_names(load))
    heat.set_xlabel("expert")
    figure.colorbar(image, ax=heat, label="load x E")
    worst = [max(r["load_max_over_mean"].values()) for r in steps]
    busiest.plot([r["step"] for r in steps], worst, color="#b6553b")
    busiest.set_xlabel("step")
    busiest.set_ylabel("max / mean")
    busiest.set_ylim(bottom=1)
    return _svg(figure)


def _load_history_plot(steps: Sequence[dict[str, Any]]) -> str:
    """One column a record, one row an expert, layer under layer."""
    load = steps[-1]["expert_load"]
    num_layers, num_experts = len(load), len(load[0])
    figure = _figure(1.2 + 0.6 * num_layers)
    axes = figure.subplots()
    columns = [[x * num_experts for row in r["expert_load"] for x in row] for r in steps]
    image = axes.imshow(list(zip(*columns, strict=True)), interpolation="nearest", **_HEAT)
    axes.set_yticks([(i + 0.5) * num_experts - 0.5 for i in range(num_layers)], _layer_names(load))
    for i in range(1, num_layers):
        axes.axhline(i * num_experts - 0.5, color="white", linewidth=1.5)
    shown = range(0, len(steps), max(len(steps) // 8, 1))
    axes.set_xticks(list(shown), [str(steps[i]["step"]) for i in shown])
    axes.set_xlabel("step")
    figure.colorbar(image, ax=axes, label="load x E")
    return _svg(figure)


def _balance_plot(steps: Sequence[dict[str, Any]]) -> str:
    figure = _figure(4.6)
    losses, devices, dropped = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    at = [r["step"] for r in steps]
    for name in steps[-1]["balance_loss"]:
        losses.plot(at, [r["balance_loss"][name] for r in steps], label=name)
    losses.set_ylabel("balance loss")
    losses.legend()
    devices.plot(at, [r["devices_per_token"] for r in steps], color="#3b6fb6")
    devices.set_ylabel("devices")
    dropped.plot(at, [100 * r["drop_rate"] for r in steps], color="#b6553b")
    dropped.set_ylabel("dropped [%]")
    dropped.set_xlabel("step")
    return _svg(figure)


def _layer_names(load: Sequence[Any]) -> list[str]:
    return [f"MoE layer {i}" for i in range(1, len(load) + 1)]


def _label(text: str) -> str:
    """Text that matplotlib neither hides (a leading _) nor sets as mathematics ($)."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8.5, height), layout="constrained")


def _svg(figure: Figure) -> str:
    """Text stays text, in a font of the reader's: matplotlib's own lacks most scripts, and warns of each letter."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
