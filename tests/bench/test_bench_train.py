"""Oracles: the medians and the ratio of the reported seconds; the loss of a model that knows nothing; the clock."""

import json
import math
from pathlib import Path
from statistics import median

import pytest
import torch

from ds_lightning.bench.contest import CONFIG
from ds_lightning.bench.train import bench_train
from ds_lightning.cli import main

SIDES = ["ds_lightning", "transformers grouped_mm", "transformers eager", "transformers grouped_mm, weights in bf16"]


def test_figures_follow_from_the_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    shape = tmp_path / "shape.yaml"
    shape.write_text(
        "vocab_size: 64\nhidden_size: 32\nnum_hidden_layers: 3\nintermediate_size: 48\nnum_attention_heads: 2\n"
        "kv_lora_rank: 16\nqk_nope_head_dim: 8\nqk_rope_head_dim: 8\nv_head_dim: 8\nfirst_k_dense_replace: 1\n"
        "n_routed_experts: 8\nnum_experts_per_tok: 2\nn_shared_experts: 1\nmoe_intermediate_size: 16\n"
        "max_position_embeddings: 64\n",
        encoding="ascii",
    )
    small = ["--model", str(shape), "--layers", "2", "--repeats", "2", "--steps", "2", "--rows", "4", "--seq_len", "16"]
    assert main(["bench", "train", "--json", *small, "--precision", "bf16"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert list(figures["seconds"]) == SIDES
    rates = {name: 2 * 4 * 16 / median(times) for name, times in figures["seconds"].items()}
    assert figures["tokens_per_second"] == pytest.approx(rates)
    ours = rates.pop("ds_lightning")
    assert figures["ratio"] == pytest.approx(ours / max(rates.values()))
    assert figures["layers"] == 2
    # Five steps on random tokens teach nothing: both sides are at the entropy of the vocabulary.
    assert figures["loss"] == {name: pytest.approx(math.log(64), rel=0.02) for name in SIDES}


def test_the_table_names_the_precision(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["bench", "train", "--repeats", "1", "--steps", "1", "--rows", "1", "--seq_len", "8"]) == 0
    table = capsys.readouterr().out
    for words in ("1,117,696 parameters", "4 layers, 1 rows of 8 tokens", "fp32", "transformers eager"):
        assert words in " ".join(table.split())


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        bench_train(steps=0)
    with pytest.raises(ValueError, match="layers is 9, expected 1 to the model's 4"):
        bench_train(layers=9)
    context = CONFIG.max_position_embeddings
    with pytest.raises(ValueError, match=f"seq_len is {context + 1}, expected at most {context}, the model.s context"):
        bench_train(seq_len=context + 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("train", "generate", "grpo"):
        assert main(["bench", name, "--device", "cuda"]) == 2
        said = "ds-lightning: device is 'cuda', but torch finds no CUDA device here, expected cpu\n"
        assert capsys.readouterr().err == said
