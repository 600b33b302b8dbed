"""Oracles: the published figures and their arithmetic, written out here a second time, and small claims by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ds_lightning.cli import main
from ds_lightning.cost import audit, audit_tables
from ds_lightning.cost.audit import STATUSES
from ds_lightning.cost.claims import CLAIMS_DIR
from tests.cost.small_claim import Change, line, write

CLAIMS = sorted(path.stem for path in CLAIMS_DIR.glob("*.yaml"))


def named(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [row for row in report["lines"] if row["name"] == name]
    assert len(found) == 1
    return found[0]


def test_deepseek_r1_is_147336_hours_and_294672_dollars(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "deepseek-r1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"] == {
        "device_hours": 512 * 198 + 512 * 80 + 5000,
        "published_device_hours": 147_000,
        "usd": 294_672,
        "published_usd": 294_000,
        "excluded_usd": 5_566_000,
        "usd_with_excluded": 5_860_672,
    }
    hours, dollars = named(report, "total hours"), named(report, "total dollars")
    assert (hours["status"], hours["published"], hours["recomputed"]) == ("ROUNDED", "147K", 147_336)
    assert (dollars["status"], dollars["published"], dollars["recomputed"]) == ("ROUNDED", "$294K", 294_672)
    assert hours["arithmetic"] == "101,376 + 5,000 + 40,960 = 147,336"
    wrong = {row["name"]: row for row in report["lines"] if row["status"] == "UNRECONCILED"}
    assert set(wrong) == {"prompts of R1-Zero", "R1 wall-clock"}
    assert (wrong["prompts of R1-Zero"]["recomputed"], wrong["prompts of R1-Zero"]["published_value"]) == (
        208_000,
        88_000,
    )
    assert wrong["prompts of R1-Zero"]["arithmetic"].startswith("10,400 x 32 / 1.6 = 208,000, but published: 88,000")
    assert wrong["R1 wall-clock"]["arithmetic"] == "4 x 24 = 96, but published: 80 hours"
    base = named(report, "base model (DeepSeek-V3-Base)")
    assert (base["status"], base["published"], base["recomputed"]) == ("EXCLUDED", None, 5_566_000)
    assert report["implied"]["device_seconds_per_sample"] == pytest.approx(101_376 * 3600 / (10_400 * 512))
    assert report["implied"]["usd_per_sample"] == pytest.approx(0.0381, abs=5e-5)
    (verl,) = report["measured"]
    assert verl["device_seconds_per_sample"] == 96 * 1700 / (96 * 8)
    assert verl["claim_over_measured"] == pytest.approx(3.10, abs=5e-3)  # 212.5 s over 68.5 s: the claim is faster
    assert "18.9 times the claimed 294,672" in report["verdict"]


def test_deepseek_v3_adds_up_and_its_speed_is_40_percent_of_the_peak() -> None:
    report = audit("deepseek-v3")
    total = named(report, "total hours")
    assert (total["status"], total["recomputed"]) == ("CONSISTENT", 2_664_000 + 119_000 + 5_000)
    assert named(report, "pretraining hours")["status"] == "CONSISTENT"
    assert named(report, "days per trillion tokens")["status"] == "ROUNDED"
    assert report["counts"]["UNRECONCILED"] == 0
    implied = report["implied"]
    assert round(implied["tokens_per_second_per_device"]) == 1543
    assert round(implied["mfu_bf16"], 3) == 0.406
    assert round(implied["mfu_bf16_without_mtp"], 3) == 0.391
    assert round(implied["mfu_bf16_full_attention"], 3) == 0.455  # 291.8e9 FLOPs a token
    assert round(implied["mfu_fp8"], 3) == 0.203
    assert implied["usd_per_million_tokens"] == 0.36
    assert implied["days"] == pytest.approx(54.2, abs=0.05)
    ratios = {row["system"]: round(row["claim_over_measured"], 2) for row in report["measured"]}
    assert ratios["1024 H100, FP8"] == 1.19
    assert ratios["256 GB300, MXFP8"] == 0.25
    parity = {row["system"]: round(row["usd_per_device_hour_at_parity"], 2) for row in report["measured"]}
    assert (parity["1024 H100, BF16"], parity["256 GB200, MXFP8"]) == (1.38, 6.14)
    assert "1.19 to 1.45 times that of 2 independent measurements" in report["verdict"]
    assert "of which none reaches it" in report["verdict"]


def test_other_claims_have_their_published_totals() -> None:
    assert audit("olmo-3")["totals"]["usd"] == 56 * 24 * 1024 * 2
    assert audit("nanochat")["totals"]["usd"] == pytest.approx(10949.46713 / 3600 * 24)
    llama = audit("llama-3-405b")
    assert named(llama, "hours of all three")["status"] == "CONSISTENT"
    assert llama["implied"]["usd_per_device_hour"] == 2.95
    assert round(llama["implied"]["mfu_bf16"], 3) == 0.345
    assert "1 independent" not in llama["verdict"]  # Meta's own is no part of it
    assert "only independent measurement" in llama["verdict"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_report_is_plain_and_every_status_follows_from_its_figures(name: str) -> None:
    report = json.loads(json.dumps(audit(name)))
    for row in report["lines"]:
        assert {"name", "published", "recomputed", "unit", "status", "arithmetic", "source"} <= set(row)
        published, recomputed = row["published_value"], row["recomputed"]
        assert row["status"] in STATUSES
        assert (row["status"] == "EXCLUDED") == (published is None)
        assert (row["status"] == "STATED") == (published is not None and recomputed is None)
        if row["status"] in ("CONSISTENT", "ROUNDED", "UNRECONCILED"):
            assert (published == recomputed) == (row["status"] == "CONSISTENT")
    for key, (low, high) in report["implied_range"].items():
        assert low <= report["implied"][key] <= high


@pytest.mark.parametrize("name", CLAIMS)
def test_the_tables_fit_80_columns_and_hold_every_line(name: str, tmp_path: Path) -> None:
    report = audit(name)
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(audit_tables(report))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text  # nothing is cut off
    for status, count in report["counts"].items():
        assert text.count(status) == count
    assert " ".join(report["verdict"].split()) in " ".join(text.split())


@pytest.mark.parametrize(
    ("published", "status"),
    [("$20", "CONSISTENT"), ("$20.9", "ROUNDED"), ("$21.1", "UNRECONCILED"), ("about $40", "UNRECONCILED")],
)
def test_the_status_says_whether_rounding_explains_it(tmp_path: Path, published: str, status: str) -> None:
    report = audit(write(tmp_path, lambda v: (line(0, rounded_to=0)(v), line(2, published=published)(v))))
    row = named(report, "cost")
    assert row["status"] == status
    assert report["totals"]["usd"] == (row["published_value"] if status == "UNRECONCILED" else 20)


def test_differences_and_nested_operations_are_written_as_they_are_computed(tmp_path: Path) -> None:
    parts = {"difference": [{"quotient": [{"sum": ["hours", 2]}, {"product": [2, 3]}]}, {"difference": [5, 4]}, 0.5]}
    row = named(audit(write(tmp_path, line(2, follows_from=parts))), "cost")
    assert row["recomputed"] == 12 / 6 - 1 - 0.5
    assert row["arithmetic"].startswith("(10 + 2) / (2 x 3) - (5 - 4) - 0.5 = 0.5")


WRONG: list[tuple[Change, str]] = [
    (line(2, follows_from={"quotient": ["hours", 0]}), r"10 / 0 divides by a part, which is 0; expected a divisor"),
    (
        lambda v: (line(1, rounded_to=40)(v), line(2, follows_from={"quotient": ["price", "hours"]})(v)),
        "2 / 10 divides by 'hours', which is 10, which may be 0 within its rounding",
    ),
    (line(2, follows_from={"product": [1e40, 1e40]}), "a figure is above 1e60, expected one that a training can have"),
    (line(2, follows_from={"product": [1e-40, 1e-40]}), "a figure is below 1e-60, expected one that a training can"),
    (lambda v: v["implied"].update(tokens=0), "implied: tokens is 0, expected more than 0"),
    (lambda v: v["implied"].update(model="v9", seq_len=4), "implied: model is 'v9', expected a name in configs/model"),
    (lambda v: v["measured"][0].update(tokens_per_second_per_device=-1), "device is -1, expected more than 0"),
    (lambda v: v.pop("implied"), "has nothing to stand beside, expected what it needs under implied"),
    (
        lambda v: (v["implied"].pop("usd_per_device_hour"), v["implied"].update(device="abacus")),
        "no on-demand price for device 'abacus'",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_cannot_be_computed_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit(write(tmp_path, change))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not YAML"),
        ("3", "is int, expected the fields of a model"),
        ("{vocab_size: 3}", "lacks the key hidden"),
    ],
)
def test_a_model_file_is_checked(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.yaml.*{message}"):
        audit(write(tmp_path, lambda v: v["implied"].update(model="model.yaml", seq_len=4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepseek-r2"], "ds-lightning: no claim 'deepseek-r2' (did you mean deepseek-r1"),
        (["nowhere/none.yaml"], "ds-lightning: nowhere/none.yaml: No such file or directory"),
        ([], "claim"),
    ],
)
def test_the_command_answers_wrong_input_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
