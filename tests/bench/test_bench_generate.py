"""Oracles: the medians and the ratio of the reported seconds; the peer's output has the promised length."""

import importlib.util
import json
from statistics import median

import pytest

from ds_lightning.bench.generate import bench_generate
from ds_lightning.cli import main


def test_figures_follow_from_the_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    small = ["--repeats", "2", "--batch", "6", "--n", "3", "--prompt_tokens", "4", "--new_tokens", "2"]
    assert main(["bench", "generate", "--json", *small]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["seconds"]) == ["ds_lightning", "transformers grouped_mm", "transformers eager"]
    rates = {name: 12 / median(times) for name, times in figures["seconds"].items()}
    assert {len(times) for times in figures["seconds"].values()} == {2}
    assert figures["tokens_per_second"] == pytest.approx(rates)
    ours = rates.pop("ds_lightning")
    assert figures["ratio"] == pytest.approx(ours / max(rates.values()))
    assert 1_000_000 < figures["parameters"] < 1_300_000
    assert main(["bench", "generate", *small]) == 0
    table = capsys.readouterr().out
    assert "ratio to the best peer" in table
    assert "transformers eager" in table


def test_a_missing_peer_and_wrong_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="batch is 0, expected at least 1"):
        bench_generate(batch=0)
    with pytest.raises(ValueError, match=r"n is 3, expected a divisor of batch \(4\)"):
        bench_generate(batch=4, n=3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "generate"]) == 2
    assert capsys.readouterr().err == (
        "ds-lightning: transformers is not installed, expected it as the peer: pip install 'ds-lightning[dev]'\n"
    )
    assert main(["bench", "nonesuch"]) == 2
    assert (
        capsys.readouterr().err
        == "ds-lightning: bench: no measurement 'nonesuch', expected one of generate, grpo, train\n"
    )
