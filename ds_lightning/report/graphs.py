"""The curves of a page, all against dollars."""

from __future__ import annotations

from ds_lightning.report.charts import Chart, Format, Line, line_chart
from ds_lightning.report.results import curve_parts
from ds_lightning.report.run_data import RunData
from ds_lightning.report.text import percent, safe, significant, usd


def graphs(run: RunData) -> str:
    """Return the section of curves; an empty text where nothing was logged."""
    drawn = [
        _graph(
            run,
            "Held-out problems solved",
            {"val/pass_at_1": "sampled (pass@1)", "val/pass_at_1_greedy": "greedy"},
            y_format=_whole_percent,
            from_zero=True,
        ),
        _graph(
            run,
            "Response length in tokens",
            {"completions/mean_length": "in training", "val/completion_length": "on held-out problems"},
            y_format=_short,
            from_zero=True,
        ),
        _graph(run, "Reward in training", {"reward": "mean over answers"}, y_format=_short),
        _graph(
            run,
            "Groups of equal rewards, which give no gradient",
            {"frac_reward_zero_std": "share of groups"},
            y_format=_whole_percent,
            from_zero=True,
        ),
        *([] if run.recipe else _text_graphs(run)),
        _graph(run, "Imbalance of the experts (MaxVio)", {"moe/max_violation": "mean over layers"}, y_format=_short),
    ]
    figures = "".join(drawn)
    if not figures:
        return ""
    return f'<section><h2>Curves against dollars</h2><div class="charts">{figures}</div></section>'


def _text_graphs(run: RunData) -> list[str]:
    """Return what is measured on held-out text; stages of a recipe hold out different text."""
    losses = {"val/loss": "validation"}
    if not any("reward" in stage.curves for stage in run.stages):  # that of policies says little
        losses = {"train/loss": "training", **losses}
    bits = {"val/bits_per_byte": "model"}
    return [
        _graph(run, "Bits per byte of held-out text", bits, y_format=_short, levels=_compressors(run)),
        _graph(run, "Loss", losses, y_format=_short),
    ]


def _graph(
    run: RunData,
    title: str,
    names: dict[str, str],
    *,
    y_format: Format,
    levels: tuple[tuple[str, float], ...] = (),
    from_zero: bool = False,
) -> str:
    """Return one chart with its legend; metrics by name with what to call them, the first in the accent's colour."""
    lines = []
    for (name, label), style in zip(names.items(), ("main", "second"), strict=False):
        parts = [part for part in curve_parts(run, name) if part]
        if any(len(part) > 1 for part in parts) or len(parts) > 1:
            lines.append(Line(label, parts, style, dots=name.startswith("val/")))
    if not lines:
        return ""
    first, last = lines[0].parts[0][0], lines[0].parts[-1][-1]
    ends = (f"{y_format(value)} at {usd(spent)}" for spent, value in (first, last))
    chart = Chart(
        title=f"{title} against dollars",
        description=f"{lines[0].label}: from {' to '.join(ends)}",
        lines=lines,
        x_label="dollars" + (" of all stages" if run.recipe else ""),
        x_format=_dollars,
        y_format=y_format,
        levels=levels,
        bands=_bands(run),
        from_zero=from_zero,
    )
    legend = "".join(f'<li><i class="stroke {line.style}"></i>{safe(line.label)}</li>' for line in lines)
    bands = enumerate((name for name, _, _ in chart.bands), start=1)
    stages = " ".join(f'<span><i class="number">{index}</i>{safe(name)}</span>' for index, name in bands)
    numbered = f'<p class="bands">{stages}</p>' if stages else ""
    drawn = f'{line_chart(chart)}<ul class="legend">{legend}</ul>{numbered}'
    return f"<figure><figcaption>{safe(title)}</figcaption>{drawn}</figure>"


def _bands(run: RunData) -> list[tuple[str, float, float]]:
    if not run.recipe:
        return []
    bands, before = [], 0.0
    for stage in run.stages:
        bands.append((stage.name, before, before + stage.usd))
        before += stage.usd
    return bands


def _compressors(run: RunData) -> tuple[tuple[str, float], ...]:
    """Return what compressors of files need for the text, where it was measured."""
    for stage in run.stages:
        measured = stage.figures.get("bits_per_byte", {})
        others = tuple((name.replace("_", " -"), value) for name, value in measured.items() if name != "model")
        if others:
            return others
    return ()


def _short(value: float) -> str:
    return significant(value, 3) if abs(value) < 1000 else f"{value:,.0f}"


def _whole_percent(value: float) -> str:
    return f"{value:.0%}" if abs(value * 100 - round(value * 100)) < 0.05 else percent(value)


def _dollars(value: float) -> str:
    """Return a tick of an axis of dollars: a round number, without zeros at its end."""
    if value >= 1:
        return f"${value:,.6g}"
    return "$" + significant(value, 3).rstrip("0").rstrip(".") if value else "$0"
