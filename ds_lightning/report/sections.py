"""The sections of a run's page, each a function from the run to HTML; an empty text where there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_lightning.cost.ledger_report import energy_text
from ds_lightning.report.charts import heatmap, stacked_bar
from ds_lightning.report.results import (
    EQUAL_REWARDS,
    Compared,
    equal_reward_share,
    gain_of,
    planned_and_actual,
    result_of,
    without_gradient,
)
from ds_lightning.report.run_data import CONFIG, RECIPE, RunData, StageData
from ds_lightning.report.text import clock, column, hours, percent, ratio, safe, significant, usd

DASH = "\u2013"
SAMPLES = 10
"""Completions that a page shows."""


def headline(run: RunData) -> str:
    """Return the result in one sentence, and the money."""
    result, terms = result_of(run), run.ledger["terms"][-1] if run.ledger["terms"] else None
    kind = "recipe" if run.recipe else "run"
    overline = [f"{kind} {safe(run.name)}", *([f"seed {safe(run.seed)}"] if run.seed is not None else [])]
    if terms is not None:
        devices = f"{terms['num_devices']:,} \u00d7 " if terms["num_devices"] > 1 else ""
        overline.append(f"{devices}{safe(terms['device'])} at {usd(terms['usd_per_device_hour'])} an hour")
    if result is None:
        value, words = "not finished", "no result yet"
    elif result.kind == "pass@1":
        value, words = percent(result.value), "of held-out problems solved at the first try"
    else:
        value, words = f"{result.value:.3f}", "bits per byte of held-out text"
    tiles = [("dollars", usd(run.usd)), ("device-hours", hours(run.device_hours))]
    tiles.append(("wall-clock", clock(run.ledger["wall_seconds"])))
    if result is not None and result.usd_per_unit is not None:
        tiles.append((f"a {result.unit}", usd(result.usd_per_unit)))
    shown = "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(figure)}</dd></div>" for name, figure in tiles)
    over = " \u00b7 ".join(overline)
    return (
        f'<header><p class="over">{over}</p><h1><b>{safe(value)}</b> <span>{safe(words)}</span></h1>'
        f'<dl class="tiles">{shown}</dl></header>'
    )


def stages(run: RunData) -> str:
    """Return the table of a recipe's stages: what each cost and what it did to pass@1."""
    if not run.recipe:
        return ""
    head = ["stage", "|what", ">|device-hours", ">dollars", ">pass@1", ">points", ">|dollars a point"]
    money, held = column([run.usd], "$"), column([run.device_hours])
    rows = []
    for number, stage in enumerate(run.stages, start=1):
        gain = gain_of(run, stage)
        cost = DASH if gain.usd_per_point is None else usd(gain.usd_per_point)
        points = DASH if gain.points is None else f"{gain.points:+.1f}"
        solved = percent(gain.after) if gain.after is not None else DASH if stage.figures else "not finished"
        start = f" <small>from {safe(stage.start)}</small>" if stage.start else ""
        name = safe(stage.name)
        if stage.page is not None:
            name = f'<a href="{safe(stage.page)}">{name}</a>'
        spent = [safe(held(stage.spent["device_hours"])), safe(money(stage.usd))]
        rows.append([f'<i class="number">{number}</i>{name}{start}', safe(stage.what), *spent, solved, points, cost])
    between = run.ledger.get("between", {"device_hours": 0.0, "usd": 0.0})
    rows.append(["between stages", "", safe(held(between["device_hours"])), safe(money(between["usd"])), "", "", ""])
    rows.append(["total", "", held(run.device_hours), money(run.usd), "", "", ""])
    note = "Points are over the stage that a stage starts from; the first one starts from nothing solved."
    return _section("Stages", _table(head, rows, last_is_total=True), note)


def comparison(run: RunData) -> str:
    """Return planned and actual dollars by stage and phase, and peak memory."""
    by_phase: list[Compared] = []
    by_stage: list[Compared] = []
    for stage in run.stages:
        lines = planned_and_actual(stage)
        by_phase += lines
        by_stage.append(lines[-1])
    if run.recipe:
        body = _compared(by_stage, "stage")
        body += f"<details><summary>by phase</summary>{_compared(by_phase, 'stage, phase')}</details>"
    else:
        body = _compared(by_phase, "phase")
    body += "".join(_memory(stage, run.recipe) for stage in run.stages)
    by_note: dict[str, list[str]] = {}
    for stage in run.stages:
        by_note.setdefault(_basis(stage), []).append(stage.name)
    notes = [f"{', '.join(names)}: {note}" if run.recipe else note for note, names in by_note.items()]
    return _section("Planned and actual", body, *notes)


def _compared(lines: Sequence[Compared], first: str) -> str:
    """Return the table of some lines; with phases of several stages, a stage's total stands above its phases."""
    money = column([amount for line in lines for amount in (line.planned or 0.0, line.actual)], "$")
    rows, phases = [], list[list[str]]()
    for line in lines:
        planned = DASH if line.planned is None else safe(money(line.planned))
        over = DASH if line.planned is None else ratio(line.actual, line.planned)
        name = safe(line.phase) if line.phase != "total" else "total" if first == "phase" else safe(line.stage)
        row = [name, planned, safe(money(line.actual)), over]
        if first != "stage, phase":
            rows.append(row)
        elif line.phase == "total":
            rows += [[f"<b>{name}</b>", *row[1:]], *phases]
            phases = []
        else:
            phases.append([f'<span class="phase">{name}</span>', *row[1:]])
    return _table([first, ">planned", ">actual", ">ratio"], rows, last_is_total=first == "phase")


def _basis(stage: StageData) -> str:
    """Say what the plan rests on, or why there is none."""
    if stage.plan is None:
        return "no plan was stored at the start."
    plan = stage.plan["plan"]
    if plan is None:
        return f"not planned, since {stage.plan['reason']}."
    return f"planned on {stage.plan['date']}; it rests on this: {plan['assumption']}."


def _memory(stage: StageData, named: bool) -> str:
    peak, plan = stage.figures.get("peak_memory_gb"), (stage.plan or {}).get("plan")
    if peak is None or plan is None:
        return ""
    planned = plan["memory_gb"]["total"]
    tensors = "" if plan["memory_gb"].get("base") else " of tensors alone"
    where = f"{stage.name}: peak" if named else "Peak"
    return (
        f'<p class="fact">{safe(where)} memory of a device: planned {significant(planned, 3)} GB{tensors}, actual '
        f"{significant(peak, 3)} GB ({ratio(peak, planned)}); tokens: planned {plan['tokens']:,}, actual "
        f"{stage.figures['tokens']:,}.</p>"
    )


def gradients(run: RunData) -> str:
    """Return the share of the dollars that bought no gradient, by reason."""
    if run.usd <= 0:
        return ""
    reasons = without_gradient(run)
    wasted = sum(reasons.values())
    money = column([run.usd], "$")
    parts = [("bought gradients", run.usd - wasted, "good")]
    parts += [(words, dollars, f"rest{index % 4}") for index, (words, dollars) in enumerate(reasons.items())]
    legend = "".join(
        f'<li><i class="{style}"></i>{safe(words)} <b>{safe(money(dollars))}</b> '
        f"<small>{percent(dollars / run.usd)}</small></li>"
        for words, dollars, style in parts
    )
    notes = []
    if EQUAL_REWARDS in reasons:
        shares = [(stage, equal_reward_share(stage)) for stage in run.stages]
        named = ", ".join(f"{percent(share)} in {stage.name}" for stage, share in shares if share is not None)
        notes.append(
            f"Groups whose answers all earned the same give no gradient ({named}); that share of the rollouts, their "
            "scoring and the training on them is counted here."
        )
    body = (
        f'<p class="fact"><b class="big">{percent(wasted / run.usd)}</b> of the dollars bought no gradient.</p>'
        f'{stacked_bar(parts, "Dollars that bought gradients, and those that did not")}<ul class="legend">{legend}</ul>'
    )
    return _section("Dollars without a gradient", body, *notes)


def bill(run: RunData) -> str:
    """Return what each phase cost, over all stages."""
    phases = run.ledger["phases"]
    money, held = column([run.usd], "$"), column([run.device_hours])
    rows = [
        [safe(phase), safe(held(row["device_hours"])), _share(row["share"]), safe(money(row["usd"]))]
        for phase, row in phases.items()
    ]
    rows.append(["total", held(run.device_hours), "", money(run.usd)])
    prices = dict.fromkeys(
        f"{term['device']} at {usd(term['usd_per_device_hour'])} an hour ({term['market']}, {term['price_date']})"
        for term in run.ledger["terms"]
    )
    attempts = run.ledger["attempts"]
    note = (
        f"{'; '.join(prices)}. {attempts} attempt{'s' if attempts != 1 else ''}; hash chain of "
        f"{run.ledger['records']:,} records: {run.ledger['chain']}."
    )
    if run.ledger["energy"]["metered_device_hours"]:
        note += f" {energy_text(run.ledger)}."
    return _section("The bill by phase", _table(["phase", ">device-hours", ">share", ">dollars"], rows, True), note)


def _share(share: float) -> str:
    bar = f'<span class="meter"><i style="width:{100 * share:.1f}%"></i></span>'
    return f'{bar}<span class="share">{percent(share)}</span>'


def experts(run: RunData) -> str:
    """Return the load of the experts at the end of each stage that has any."""
    maps = []
    for stage in run.stages:
        load = stage.figures.get("expert_load")
        if load:
            chart = heatmap(load, f"Load of the experts after {stage.name}")
            maps.append(f"<figure><figcaption>{safe(stage.name)}</figcaption>{chart}</figure>")
    note = "Tokens of the last optimizer step: a row a layer, a column an expert, full colour at twice a fair share."
    return _section("Expert load", f'<div class="charts">{"".join(maps)}</div>', note) if maps else ""


def samples(run: RunData) -> str:
    """Return what the model wrote before and after, at most ten pieces; nothing in it is markup."""
    finished = [stage for stage in run.stages if stage.figures]
    if not finished:
        return ""
    answered = [stage for stage in finished if stage.figures.get("answers")]
    if answered:
        first, last = answered[0], answered[-1]
        early = first.figures["first_answers" if first is last else "answers"]
        pairs = list(zip(early, last.figures["answers"], strict=False))[:SAMPLES]
        names = (
            (f"after {first.name}", f"after {last.name}") if first is not last else ("first validation", "at the end")
        )
        shown = "".join(_answers(before, after, names) for before, after in pairs)
        return _section("Answers before and after", f'<ol class="samples">{shown}</ol>')
    figures = finished[-1].figures
    before, after = figures.get("first_samples") or [], figures.get("samples") or []
    if before == after:
        before = [None] * len(after)
    shown = "".join(
        "<li>" + ("" if one is None else _text("first sample", one)) + _text("at the end", two) + "</li>"
        for one, two in list(zip(before, after, strict=False))[:SAMPLES]
    )
    return _section("Samples", f'<ol class="samples">{shown}</ol>') if shown else ""


def _answers(before: dict[str, Any], after: dict[str, Any], names: tuple[str, str]) -> str:
    if before["prompt"] != after["prompt"]:  # stages that were asked different questions
        return f"<li><p><bdi>{safe(after['prompt'])}</bdi></p>{_answer(names[1], after)}</li>"
    return f"<li><p><bdi>{safe(before['prompt'])}</bdi></p>{_answer(names[0], before)}{_answer(names[1], after)}</li>"


def _answer(name: str, answer: dict[str, Any]) -> str:
    right = answer["reward"] >= 1
    mark = f'<em class="{"right" if right else "wrong"}">{"right" if right else "wrong"}</em>'
    return f"<div><small>{safe(name)} {mark}</small><pre><bdi>{safe(answer['answer'])}</bdi></pre></div>"


def _text(name: str, text: str) -> str:
    return f"<div><small>{safe(name)}</small><pre><bdi>{safe(text)}</bdi></pre></div>"


def config(run: RunData) -> str:
    """Return the resolved config."""
    if not run.config:
        return ""
    name = RECIPE if run.recipe else CONFIG
    return _section("Config", f"<details><summary>{name}</summary><pre>{safe(run.config)}</pre></details>")


def _section(title: str, body: str, *notes: str) -> str:
    said = "".join(f'<p class="said">{safe(note)}</p>' for note in notes)
    return f"<section><h2>{safe(title)}</h2>{body}{said}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last_is_total: bool = False) -> str:
    """Return a table of HTML cells; columns marked ``>`` hold numbers, those marked ``|`` are left out on a phone."""
    styles = [" ".join((["n"] if ">" in name else []) + (["wide"] if "|" in name else [])) for name in head]
    names = "".join(
        f'<th scope="col" class="{style}">{safe(name.lstrip(">|"))}</th>'
        for name, style in zip(head, styles, strict=True)
    )
    body = ""
    for number, row in enumerate(rows, start=1):
        cells = "".join(f'<td class="{style}">{cell}</td>' for cell, style in zip(row, styles, strict=True))
        body += f"<tr{' class=total' if last_is_total and number == len(rows) else ''}>{cells}</tr>"
    return f"<div class=scroll><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"
