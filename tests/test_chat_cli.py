"""A conversation in a terminal.

The oracles: transformers' own rendering of the same messages, and the generator on those tokens; what a person sees
of the real command on a terminal.
"""

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ds_lightning import chat_cli
from ds_lightning.chat_cli import chat
from ds_lightning.cli import main
from ds_lightning.data.chat import DEFAULT_TEMPLATE
from ds_lightning.data.corpus import Document
from ds_lightning.data.tokenizer import END_OF_TEXT, load_tokenizer, special_id, train_tokenizer
from ds_lightning.generate_cli import Terminal
from ds_lightning.generation import Generator
from ds_lightning.models.hf import load_hf, save_hf
from tests.generation.small_model import small_model

ROOT = Path(__file__).parents[1]
VOCAB = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer and the default template."""
    path = tmp_path_factory.mktemp("export")
    tokenizer = train_tokenizer([Document("a", "a river, a stone, a river " * 20)], VOCAB)
    tokenizer.save(str(path / "tokenizer.json"))
    shutil.copy(DEFAULT_TEMPLATE, path / "chat_template.jinja")
    end = special_id(tokenizer, END_OF_TEXT)
    save_hf(small_model(vocab_size=VOCAB), path / "model", tokenizer_file=path / "tokenizer.json", eos_token_id=end)
    return path / "model"


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let the input have these lines, and then end."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def scripted(monkeypatch: pytest.MonkeyPatch, *happens: str | type[BaseException]) -> None:
    """Let reading give these lines or raise these errors."""
    left: Iterator[str | type[BaseException]] = iter(happens)

    def read() -> str:
        one = next(left)
        if isinstance(one, str):
            return one
        raise one

    monkeypatch.setattr(chat_cli, "_read", read)


def test_every_turn_is_rendered_as_transformers_does_and_continued_by_the_generator(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    asked, generate = list[list[int]](), Generator.generate

    def note(generator: Generator, prompts: list[list[int]], *arguments: object, **options: object) -> object:
        asked.extend(prompts)
        return generate(generator, prompts, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "generate", note)
    say(monkeypatch, "a river", "", "  ", "and a stone?", "exit", "never read")
    turns = chat(str(folder), max_new_tokens=12, temperature=0.0)
    monkeypatch.undo()
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert [turns[0]["content"], turns[2]["content"]] == ["a river", "and a stone?"]
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder / "tokenizer.json")
    end, model = special_id(tokenizer, END_OF_TEXT), load_hf(folder)
    shown = ""
    for place, prompt in zip((1, 3), asked, strict=True):
        rendered = theirs.apply_chat_template(turns[:place], add_generation_prompt=True, return_dict=True)
        assert prompt == rendered["input_ids"]
        (sample,) = Generator(model).generate([prompt], max_new_tokens=12, temperature=0.0, stop=end)
        tokens = [token for token in sample.tokens.tolist() if token != end]
        assert turns[place]["content"] == "<think>" + tokenizer.decode(tokens, skip_special_tokens=False)
        shown += turns[place]["content"] + "\n"
    assert capsys.readouterr().out == shown


def test_answers_differ_by_seed_and_turn_and_repeat_by_seed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(seed: int) -> list[str]:
        say(monkeypatch, "a river")
        return [turn["content"] for turn in chat(str(folder), max_new_tokens=12, seed=seed)]

    assert answers(1) == answers(1) != answers(2)


def test_the_end_of_the_input_and_a_first_message_on_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch)
    options = ["--model", str(folder), "--chat", "--max_new_tokens", "3", "--temperature", "0"]
    assert main(["generate", *options]) == 0
    assert capsys.readouterr() == ("", "")
    say(monkeypatch)
    assert main(["generate", *options, "--prompt", "a river"]) == 0
    first = capsys.readouterr().out
    say(monkeypatch, "a river")
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("<think>")


def test_an_interrupt_ends_the_answer_which_is_kept_and_a_second_the_program(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, left = Terminal.__call__, iter([False, False, True])

    def interrupted(terminal: Terminal, samples: list[int], tokens: list[int]) -> None:
        step(terminal, samples, tokens)
        if next(left, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "__call__", interrupted)
    say(monkeypatch, "a river", "go on")
    turns = chat(str(folder), max_new_tokens=12, temperature=0.0)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    model, end = load_hf(folder), special_id(tokenizer, END_OF_TEXT)
    conversation = chat_cli.Conversation(str(folder))
    prompt = conversation.prompter.encode(turns[:1])
    (sample,) = Generator(model).generate([prompt], max_new_tokens=12, temperature=0.0, stop=end)
    assert len(sample.tokens) > 3
    assert turns[1]["content"] == "<think>" + tokenizer.decode(sample.tokens.tolist()[:3], skip_special_tokens=False)
    assert len(turns) == 4, "the conversation goes on"

    left = iter([True])
    scripted(monkeypatch, "a river", KeyboardInterrupt)
    assert main(["generate", "--model", str(folder), "--chat"]) == 1
    assert capsys.readouterr().err == "ds-lightning: interrupted\n"


def test_an_interrupt_of_the_prompt_says_how_to_leave_and_two_in_a_row_leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, KeyboardInterrupt, "a river", KeyboardInterrupt, "exit")
    assert len(chat(str(folder), max_new_tokens=3)) == 2
    hint = "\n(Ctrl-C once more ends the conversation, as do Ctrl-D and exit)\n"
    assert capsys.readouterr().err == 2 * hint
    scripted(monkeypatch, KeyboardInterrupt, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        chat(str(folder))


def test_the_oldest_turns_are_forgotten_and_what_never_fits_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "first " * 5, "second", "third " * 5, "z" * 95, "last")
    turns = chat(str(folder), max_new_tokens=20, temperature=0.0)
    err = capsys.readouterr().err
    assert "(the context of 96 tokens is full: the first 2 turns are forgotten)\n" in err
    assert "(that is 98 tokens with the template, expected at most 95: say it in less)\n" in err
    said = [turn["content"] for turn in turns if turn["role"] == "user"]
    assert said[-1] == "last"
    assert "first " * 5 not in said
    assert "z" * 95 not in said
    prompt = chat_cli.Conversation(str(folder)).prompter.encode(turns[:-1])
    assert len(prompt) + 20 <= 96


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens is 0, expected 1 to 95 \(max_position_embeddings 96 of "),
        ({"max_new_tokens": 96}, r"max_new_tokens is 96, expected 1 to 95"),
        ({"temperature": -1.0}, r"temperature is -1.0, expected 0 or more"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected more than 0 and at most 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(
    options: dict[str, float], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        chat(str(folder), **options)  # type: ignore[arg-type]


def test_a_template_without_a_generation_prompt_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["generate", "--model", str(tmp_path / "model"), "--chat"]) == 2
    err = capsys.readouterr().err
    assert "renders the same with and without add_generation_prompt, expected a generation prompt" in err
    assert err.count("\n") == 1


def _as_at_a_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets what it starts in the background ignore Ctrl-C
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal


class Screen:
    """The real command on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self.near, far = pty.openpty()
        command = [sys.executable, "-m", "ds_lightning", "generate", "--model", str(folder), "--chat", "--seed", "1"]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=far,
            stdout=far,
            stderr=far,
            start_new_session=True,
            preexec_fn=_as_at_a_terminal,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        )
        os.close(far)
        self.seen = ""

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern appears; return what came before it and forget both."""
        until = time.monotonic() + 120
        while not (found := re.search(pattern, self.seen)):
            assert select.select([self.near], [], [], max(0.0, until - time.monotonic()))[0], self.seen
            self.seen += os.read(self.near, 4096).decode("utf-8", "replace")
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before

    def type(self, keys: str) -> None:
        """Type once keys are waited for, whatever the answer looks like: only then are lines not read whole.

        And as late as a person: Python misses a signal that comes between its prompt and its wait.
        """
        until = time.monotonic() + 120
        while termios.tcgetattr(self.near)[3] & termios.ICANON:
            assert time.monotonic() < until, self.seen
            time.sleep(0.01)
        time.sleep(0.3)
        os.write(self.near, keys.encode())


def test_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    model = load_hf(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely, control characters too
    weights = tmp_path / "hostile"
    end = special_id(load_tokenizer(folder / "tokenizer.json"), END_OF_TEXT)
    save_hf(model, weights, tokenizer_file=folder / "tokenizer.json", eos_token_id=end)
    screen = Screen(weights)
    screen.wait_for("> ")
    shown = ""
    for _ in range(5):
        screen.type("a river\n")
        screen.wait_for("<think>")
        shown += screen.wait_for("\r\n> ")
    # The line end of a terminal is \r\n; nothing else that it obeys may come, however the model likes it.
    assert not re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown.replace("\r\n", ""))
    assert re.search(r"[\u2400-\u2421]", shown)
    screen.type("\x03")
    screen.wait_for("Ctrl-C once more ends the conversation")
    screen.type("\x03")
    screen.wait_for("ds-lightning: interrupted")
    assert screen.process.wait(60) == 1
    os.close(screen.near)
