"""Oracles: samples and tokens counted by hand from the settings; the medians and the ratio of the reported seconds."""

import importlib.util
import json
from pathlib import Path
from statistics import median

import pytest
from tokenizers import Tokenizer

from ds_lightning.bench.contest import CONFIG
from ds_lightning.bench.grpo import _Digits, _tokenizer, bench_grpo, grpo_table
from ds_lightning.bench.reward import share_of_letters
from ds_lightning.cli import main
from ds_lightning.data.tokenizer import END_OF_TEXT, load_tokenizer, special_id

SMALL = {"repeats": 2, "steps": 2, "prompts": 2, "num_generations": 3, "prompt_tokens": 4, "completion_tokens": 5}
SIDES = ["ds_lightning", "trl grouped_mm", "trl eager"]


def test_both_sides_train_on_as_many_samples_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    options = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    assert main(["bench", "grpo", "--json", *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    # 3 trainings of 3 steps, the first of each not measured; 2 prompts with 3 answers of 5 tokens
    assert figures["counts"] == {side: {"samples": 54, "sampled_tokens": 270} for side in SIDES}
    assert {name: len(times) for name, times in figures["seconds"].items()} == dict.fromkeys(SIDES, 2)
    rates = {name: 2 * 6 / median(times) for name, times in figures["seconds"].items()}
    assert figures["samples_per_second"] == pytest.approx(rates)
    ours = rates.pop("ds_lightning")
    assert figures["ratio"] == pytest.approx(ours / max(rates.values()))
    assert {name: figures[name] for name in SMALL} == SMALL
    assert grpo_table(figures).row_count == 4


def test_no_answer_can_end_and_every_digit_is_a_token(tmp_path: Path) -> None:
    _tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert special_id(tokenizer, END_OF_TEXT) == CONFIG.vocab_size
    texts = _Digits(3, 7)
    assert [len(tokenizer.encode(text).ids) for text in texts.prompts] == [7, 7, 7]
    assert texts.problem(2, seed=5).prompt == texts.prompts[2]
    assert Tokenizer.from_str(tokenizer.to_str()).decode(tokenizer.encode("abz 9").ids) == "abz 9"


def test_the_reward_is_the_share_of_letters() -> None:
    assert share_of_letters([], ["ab1 ", "", "AZ", "xyz"]) == [0.5, 0.0, 0.0, 1.0]


def test_a_missing_peer_and_wrong_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        bench_grpo(steps=0)
    with pytest.raises(ValueError, match="num_generations is 1, expected at least 2"):
        bench_grpo(num_generations=1)
    with pytest.raises(ValueError, match="prompt_tokens is 200 and completion_tokens 57, expected at most 256"):
        bench_grpo(prompt_tokens=200, completion_tokens=57)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "grpo"]) == 2
    assert capsys.readouterr().err == (
        "ds-lightning: trl is not installed, expected it as the peer: pip install 'ds-lightning[dev]'\n"
    )
