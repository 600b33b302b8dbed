"""Oracles: the generator by itself on the same folder; the tokenizer's decoding of all tokens at once."""

import io
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ds_lightning import generate_cli
from ds_lightning.cli import main
from ds_lightning.data.corpus import Document
from ds_lightning.data.tokenizer import END_OF_TEXT, special_id, train_tokenizer
from ds_lightning.generation import Generator
from ds_lightning.models.hf import load_hf, save_hf
from tests.generation.small_model import small_model

VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer, which writes any byte."""
    path = tmp_path_factory.mktemp("export")
    train_tokenizer([Document("a", "a river, a stone, a river " * 20)], VOCAB).save(str(path / "tokenizer.json"))
    model = small_model(vocab_size=VOCAB)
    save_hf(model, path / "model", tokenizer_file=path / "tokenizer.json", eos_token_id=0)
    return path / "model"


def expected(folder: Path, n: int, tokens: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    samples = Generator(load_hf(folder)).generate(
        [tokenizer.encode("a river").ids], n, max_new_tokens=tokens, stop=0, seed=3, temperature=0.9, top_k=200
    )
    return [sample.tokens.tolist() for sample in samples]


def command(folder: Path, *more: str) -> list[str]:
    options = ["--model", str(folder), "--prompt", "a river", "--seed", "3", "--temperature", "0.9", "--top_k", "200"]
    return ["generate", *options, *more]


def test_text_comes_token_by_token_and_is_whole_at_the_end(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces, write = list[str](), generate_cli.Terminal._write

    def note(terminal: generate_cli.Terminal, text: str) -> None:
        pieces.append(text)
        write(terminal, text)

    monkeypatch.setattr(generate_cli.Terminal, "_write", note)
    assert main(command(folder, "--max_new_tokens", "40")) == 0
    (tokens,) = expected(folder, 1, 40)
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens)
    assert capsys.readouterr().out == "".join(pieces) == text + "\n"
    assert len([piece for piece in pieces if piece.strip()]) > 5


def test_a_character_of_several_tokens_is_written_when_it_is_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    show = generate_cli.Terminal(tokenizer)
    ids = tokenizer.encode("x\u20acy").ids
    assert len(ids) == 5, "the euro sign is meant to be three tokens"
    seen = []
    for token in ids:
        show([0], [token])
        seen.append(capsys.readouterr().out)
    assert seen == ["x", "", "", "\u20ac", "y"]
    show([0], ids[1:3])
    show.end()
    assert capsys.readouterr().out == "\ufffd\n"


def test_several_samples_follow_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--max_new_tokens", "5", "--n", "3")) == 0
    out = capsys.readouterr().out
    for number in (1, 2, 3):
        assert f"--- {number} of 3, length\n" in out


def test_json_has_text_tokens_log_probabilities_and_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(folder, "--max_new_tokens", "6", "--n", "2", "--json")) == 0
    samples = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [sample["tokens"] for sample in samples] == expected(folder, 2, 6)
    assert [sample["text"] for sample in samples] == [tokenizer.decode(sample["tokens"]) for sample in samples]
    assert all(len(sample["logprobs"]) == len(sample["tokens"]) for sample in samples)
    assert {sample["finish_reason"] for sample in samples} <= {"length", "stop"}


def test_the_default_length_is_what_the_context_has_room_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(folder, "--json"), "--top_k", "1"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a river").ids
    assert sample["finish_reason"] == "stop" or len(prompt) + len(sample["tokens"]) == 96


def test_the_end_of_text_is_that_of_the_folder_or_of_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert generate_cli.stop_tokens(folder, tokenizer) == [0]
    assert generate_cli.stop_tokens(tmp_path, tokenizer) == [special_id(tokenizer, END_OF_TEXT)]
    (tmp_path / "config.json").write_text('{"eos_token_id": [4, 5]}')
    assert generate_cli.stop_tokens(tmp_path, tokenizer) == [4, 5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6}')
    assert generate_cli.stop_tokens(tmp_path, tokenizer) == [6]


def test_an_interrupt_ends_the_line_and_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(terminal: generate_cli.Terminal, samples: list[int], tokens: list[int]) -> None:
        terminal.tokens += terminal.tokenizer.encode("x").ids
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_cli.Terminal, "__call__", interrupt)
    assert main(command(folder)) == 1
    captured = capsys.readouterr()
    assert captured.out == "x\n"
    assert captured.err == "ds-lightning: interrupted\n"


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b]0;title\x07", "\u241b]0;title\u2407"),
        ("\x1b[2J", "\u241b[2J"),
        ("right\rwrong\x08", "right\u240dwrong\u2408"),
        ("\x9b1m\x7f\x00", "\ufffd1m\u2421\u2400"),
        ("\u202etxet\u2066", "\ufffdtxet\ufffd"),
        ("a\tb\n\u20ac", "a\tb\n\u20ac"),
    ],
)
def test_what_a_terminal_would_obey_is_a_symbol_there_and_itself_in_a_file(
    hostile: str, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_cli.write(hostile)
    assert capsys.readouterr().out == hostile
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    generate_cli.write(hostile)
    assert capsys.readouterr().out == shown
    assert not any(unicodedata.category(one) in ("Cc", "Cf") for one in shown if one not in "\n\t")


def test_what_the_encoding_lacks_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    generate_cli.write("5 \u20ac")
    assert raw.getvalue() == b"5 \\u20ac"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere", "--prompt", "x"], "model is 'nowhere', expected a folder in Hugging Face layout"),
        (["--model", ".", "--prompt", "x"], "tokenizer.json: No such file or directory"),
        (["--prompt", "x"], "model: missing"),
        (["--model", "MODEL"], "generate: neither prompt nor chat, expected --prompt TEXT or --chat"),
        (["--model", "MODEL", "--chat", "--json"], "generate: --json with --chat, expected one of them"),
        (["--model", "MODEL", "--chat", "--n", "2"], "generate: n is 2 with --chat, expected 1"),
        (["--model", "MODEL", "--prompt", ""], "prompt has 0 tokens, expected 1 to 95 (max_position_embeddings 96 of "),
        (["--model", "MODEL", "--prompt", "z" * 96], "prompt has 96 tokens, expected 1 to 95"),
        (["--model", "MODEL", "--prompt", "z" * 90, "--max_new_tokens", "9"], "is more than max_position_embeddings"),
        (["--model", "MODEL", "--prompt", "z", "--temperature", "-1"], "temperature is -1.0, expected 0 or more"),
        (["--model", "MODEL", "--prompt", "z", "--topk", "1"], "did you mean top_k?"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    options: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *(str(folder) if option == "MODEL" else option for option in options)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
