"""Oracle: a small claim that is right, and copies of it made wrong on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_lightning.cost.claims import CLAIMS_DIR, claim_path, read_claim
from tests.cost.small_claim import Change, line, write


def test_a_claim_is_read(tmp_path: Path) -> None:
    claim = read_claim(write(tmp_path))
    assert [line.name for line in claim.lines] == ["price", "hours", "cost"]
    assert claim.lines[0].date == "2026-01-02"


def test_a_date_without_quotes_is_a_date(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text().replace("'2026-01-02'", "2026-01-02"))
    assert read_claim(path).lines[0].date == "2026-01-02"


@pytest.mark.parametrize("path", sorted(CLAIMS_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_claim_that_ships_loads_by_its_name(path: Path) -> None:
    claim = read_claim(path.stem)
    assert claim.path == path
    assert {line.source for line in claim.lines} <= set(claim.sources)
    assert claim.excluded


def test_the_claims_that_are_promised_are_there() -> None:
    names = {path.stem for path in CLAIMS_DIR.glob("*.yaml")}
    assert {"deepseek-v3", "deepseek-r1", "nanochat", "olmo-3", "llama-3-405b", "template"} <= names


def test_an_unknown_claim_is_answered_with_its_neighbours() -> None:
    with pytest.raises(
        ValueError, match=r"^no claim 'deepseek-r2' \(did you mean deepseek-r1 or deepseek-v3\?\)\. There"
    ):
        claim_path("deepseek-r2")
    with pytest.raises(ValueError, match=r"^no claim 'x'\. There are deepseek-r1, .*, or give a \.yaml file$"):
        claim_path("x")


def test_a_missing_file_is_the_file_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_claim(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", [b"lines: [", b"\xff\xfe\x00"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.yaml is not YAML: "):
        read_claim(path)


@pytest.mark.parametrize("content", ["", "[1]", "3", "{1: 2}"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.yaml: the file is \w+, expected a mapping of names"):
        read_claim(path)


BAD: list[tuple[Change, str]] = [
    (lambda v: v.pop("lines"), "the file lacks the key 'lines'"),
    (lambda v: v.update(line=[]), r"the file has the unknown key 'line' \(did you mean lines\?\); expected claim"),
    (lambda v: v.update(claim=3), r"the file: claim is 3, expected a text \(in quotes if it looks like a number\)"),
    (lambda v: v.update(lines={}), "lines is dict, expected a list"),
    (lambda v: v["lines"].append(4), "entry 4 of lines is int, expected a mapping"),
    (lambda v: v["sources"].update(b={"title": "B"}), "source 'b' lacks the key 'read'"),
    (lambda v: v["sources"]["a"].update(read="no"), "read is 'no', expected one of primary, transcription, unverified"),
    (line(1, price=3), "line 'hours' has the unknown key 'price'"),
    (line(1, published=10), "line 'hours': published is 10, expected a text"),
    (line(1, published="ten"), "line 'hours': published 'ten' is no figure"),
    (line(0, published="\u20ac2"), "line 'price': published '\u20ac2' is in another currency, expected US dollars"),
    (line(0, unit="EUR/device-hour"), r"line 'price': unit is 'EUR/device-hour', expected US dollars \(USD\)"),
    (lambda v: v["lines"][0].pop("date"), "line 'price' is a price and its date is missing, expected date: YYYY-MM-DD"),
    (line(0, date="May"), "line 'price' is a price and its date is 'May', expected date: YYYY-MM-DD"),
    (line(1, rounded_to="x"), "line 'hours': rounded_to is 'x', expected a step of at least 0"),
    (line(1, rounded_to=-1), "line 'hours': rounded_to is -1, expected a step of at least 0"),
    (line(1, rounded_to=float("nan")), "line 'hours': rounded_to is nan, expected a step of at least 0"),
    (line(1, source="b"), "line 'hours' has the source 'b', which is not under sources"),
    (line(1, name="price"), "two lines are called 'price', expected a name of its own for each"),
    (line(2, follows_from="hours"), "line 'cost': follows_from is 'hours', expected one of sum, difference"),
    (line(2, follows_from={"power": ["hours", 2]}), "line 'cost': follows_from is power, expected one of sum"),
    (line(2, follows_from={"sum": ["hours"]}), r"follows_from: sum is \['hours'\], expected a list of at least two"),
    (line(2, follows_from={"sum": ["hours", None]}), "has the part None, expected the name of a line, a number or an"),
    (line(2, follows_from={"sum": ["hours", float("inf")]}), "has the part inf, expected a finite number"),
    (
        line(2, follows_from={"sum": ["hour", 1]}),
        r"line 'cost' refers to 'hour', which is no line .* \(did you mean hours\?\)$",
    ),
    (line(1, follows_from={"sum": ["cost", 1]}), "a line follows from itself: hours -> cost -> hours"),
    (line(1, published={"sum": ["hours", 1]}), "a line follows from itself: hours -> hours"),
    (lambda v: v["totals"].update(usd="costs"), "totals: usd refers to 'costs', which is no line"),
    (lambda v: v["totals"].update(eur="cost"), "totals has the unknown key 'eur'"),
    (lambda v: v["excluded"][0].pop("basis"), "entry 1 of excluded lacks the key 'basis'"),
    (lambda v: v["implied"].pop("device"), "implied lacks the key 'device'"),
    (lambda v: v["implied"].update(device=3), "implied: device is 3, expected a text"),
    (lambda v: v["implied"].update(tokens="token"), "implied: tokens refers to 'token', which is no line"),
    (lambda v: v["implied"].pop("tokens"), "implied has only one of tokens and device_hours"),
    (lambda v: v["implied"].update(samples=3), "implied has only one of samples and sample_device_hours"),
    (lambda v: v["implied"].update(model="v3"), "implied has only one of model and seq_len"),
    (lambda v: v["implied"].update(model="v3", seq_len=True), "implied: seq_len is True, expected an integer of at"),
    (
        lambda v: v["implied"].update(model="v3", flops_per_token=3),
        "implied has model and flops_per_token, expected one",
    ),
    (
        lambda v: v["measured"][0].update(tflops_per_device=1),
        "entry 1 of measured has tokens_.*, expected exactly one of",
    ),
    (lambda v: v["measured"][0].pop("tokens_per_second_per_device"), "entry 1 of measured has no speed, expected"),
    (lambda v: v["measured"][0].update(own="yes"), "entry 1 of measured: own is 'yes', expected true or false"),
    (lambda v: v["measured"][0].update(source="b"), "measured: 'b' has the source 'b', which is not under sources"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_wrong_claim_is_refused_in_one_line(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=rf"mine\.yaml: .*{message}|mine\.yaml: {message}") as caught:
        read_claim(write(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_an_operation_that_contains_itself_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text()
    assert "follows_from:\n    product:\n    - hours\n    - price\n" in text
    path.write_text(
        text.replace("follows_from:\n    product:\n    - hours\n", "follows_from: &it\n    sum:\n    - *it\n")
    )
    with pytest.raises(ValueError, match="operations are nested deeper than 10, expected a line for some of them"):
        read_claim(path)
