"""From a pretraining run's weights to a fine-tuned model that transformers can prompt, by the real command.

The oracles: the run left alone, bitwise, for one that was killed; the loss before training; transformers' logits.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.toy_run import differences
from tests.e2e.command import MODEL, Run, config, write_corpus

pytestmark = pytest.mark.slow


def _conversations(path: Path) -> None:
    draw = random.Random(0)
    words = ["river", "stone", "cloud", "light"]
    with path.open("w", encoding="ascii") as file:
        for _ in range(200):
            word, times = draw.choice(words), draw.randrange(1, 4)
            answer = f"<think>{times} {word}</think><answer>{' '.join([word] * times)}</answer>"
            file.write(json.dumps({"prompt": f"{word} {times}", "completion": answer}) + "\n")


def _fine_tuning(**overrides: Any) -> dict[str, Any]:
    data = {
        "class_path": "ds_lightning.data.SFTDataModule",
        "init_args": {
            "sources": ["answers.jsonl"],
            "folder": "answers",
            "tokenizer": "base/weights/tokenizer.json",
            "seq_len": 128,
            "batch_size": 4,
            "epochs": 8,
            "val_fraction": 0.1,
        },
    }
    settings = config(samples__prompts=["<|user|>river 2<|assistant|><think>"], data=data, **overrides)
    settings["model"]["init_args"] = {"config": MODEL, "weights": "base/weights", "lr": 1e-2}
    return settings


def test_fine_tuning_starts_from_weights_lowers_the_loss_and_resumes_bitwise(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    _conversations(tmp_path / "answers.jsonl")
    base = Run(tmp_path, config(), "base", warm=True).attempt()
    straight = Run(tmp_path, _fine_tuning(), "straight", warm=True).attempt()
    losses = straight.logged()["train/loss"]
    assert min(losses) <= 1
    report = json.loads((straight.out / "report.json").read_text())["stages"][0]
    # An untrained model pays ln 320 = 5.8 a token; answers that repeat the prompt's word are soon easier than text.
    assert report["val_loss"] < 0.6 * next(iter(losses.values()))
    assert report["name"] == "sft"
    assert report["progress"] >= 1
    assert list(report["bits_per_byte"]) == ["model"]
    assert any((straight.exported()[name] != tensor).any() for name, tensor in base.exported().items())

    killed = Run(tmp_path, _fine_tuning(), "killed", warm=True)
    killed.attempt("SIGKILL micro_batch 9", status=-9)
    (tmp_path / "base").rename(tmp_path / "moved")  # the checkpoint wins: the weights are not read again
    (tmp_path / "base/weights").mkdir(parents=True)
    tokenizer = (tmp_path / "moved/weights/tokenizer.json").read_bytes()
    (tmp_path / "base/weights/tokenizer.json").write_bytes(tokenizer)
    killed.attempt()
    assert killed.attempts[-1].started_from == 3
    assert differences(killed.state(), straight.state()) == []
    assert differences(killed.exported(), straight.exported()) == []
    assert killed.logged()["train/loss"] == losses
    _again_shows_the_report(straight)
    _transformers_prompts_it(tmp_path / "straight" / "weights")


def _again_shows_the_report(run: Run) -> None:
    before = run.checkpoints()
    assert "tokens" in run.attempt().attempts[-1].out
    assert run.checkpoints() == before


def _transformers_prompts_it(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = [{"role": "user", "content": "river 2"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = "2 river</think><answer>river river</answer><|end_of_text|>"
    tokens = torch.cat([ids["input_ids"], torch.tensor([tokenizer.encode(answer)])], 1)
    with torch.no_grad():
        scores = model(tokens).logits[0].log_softmax(-1)
    start_at = ids["input_ids"].shape[1]
    likelihood = scores[start_at - 1 : -1].gather(-1, tokens[0, start_at:, None]).mean()
    assert float(likelihood) > -3.0  # 5.8 before any training


def test_a_run_that_nothing_says_the_length_of_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    settings = config()
    settings["model"]["init_args"].pop("total_tokens")
    run = Run(tmp_path, settings, "endless", warm=True).attempt(status=2)
    message = "model.init_args.total_tokens: missing, expected a value in the config or on the command line"
    assert run.attempts[-1].err == f"ds-lightning: {message}\n"


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "data",
            "total_tokens",
            5,
            "data.init_args.total_tokens is 5, expected that of the model (None): leave it out",
        ),
        ("data", "epochs", None, "epochs is None and total_tokens None, expected one of them"),
        ("model", "weights", "nowhere", "nowhere/config.json: No such file or directory"),
        ("data", "sources", ["bad.jsonl"], "bad.jsonl:2 is not JSON"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path: Path, section: str, key: str, value: Any, message: str) -> None:
    from ds_lightning.data import Document, train_tokenizer

    (tmp_path / "base/weights").mkdir(parents=True)
    train_tokenizer([Document("a", "river stone")], 300).save(str(tmp_path / "base/weights/tokenizer.json"))
    _conversations(tmp_path / "answers.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    settings = _fine_tuning()
    settings[section]["init_args"][key] = value
    run = Run(tmp_path, settings, "wrong", warm=True).attempt(status=2)
    assert run.attempts[-1].err.count("\n") == 1
    assert message in run.attempts[-1].err
