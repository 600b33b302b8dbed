"""Oracle: conversations written by hand beside their lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_lightning.data.conversations import read_conversations, sources_sha256


def turn(role: str, content: Any = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


def written(folder: Path, *records: Any, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_all_formats_become_turns_with_the_answers_that_are_trained(tmp_path: Path) -> None:
    user, assistant, system = turn("user", "q"), turn("assistant", "a"), turn("system", "s")
    path = written(
        tmp_path,
        {"prompt": "q", "completion": "a", "source": "x"},
        {"prompt": [system, user, assistant, user], "completion": [assistant, user, assistant]},
        {"messages": [system, user, assistant, user, assistant]},
    )
    read = list(read_conversations([str(path)]))
    assert [(c.messages, c.first_answer) for c in read] == [
        ([user, assistant], 1),
        ([system, user, assistant, user, assistant, user, assistant], 4),
        ([system, user, assistant, user, assistant], 0),
    ]
    assert [(c.name, c.where) for c in read] == [(f"a.jsonl:{n}", f"{path}:{n}") for n in (1, 2, 3)]


def test_sources_are_files_folders_and_globs_and_blank_lines_are_none(tmp_path: Path) -> None:
    record = {"prompt": "q", "completion": "a"}
    (tmp_path / "sub").mkdir()
    written(tmp_path / "sub", record, name="b.jsonl").open("a").write("\n\n")
    one = written(tmp_path, record, record)
    for source, names in (
        (str(one), ["a.jsonl:1", "a.jsonl:2"]),
        (str(tmp_path), ["a.jsonl:1", "a.jsonl:2", "sub/b.jsonl:1"]),
        (str(tmp_path / "*" / "*.jsonl"), ["sub/b.jsonl:1"]),
    ):
        assert [conversation.name for conversation in read_conversations([source])] == names


def test_the_hash_of_sources_follows_names_and_contents(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": "q", "completion": "a"})
    before = sources_sha256([str(path)])
    assert before == sources_sha256([str(tmp_path)])
    path.write_text(path.read_text().replace("a", "b"))
    assert sources_sha256([str(path)]) != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"prompt": "q"',
            r"a\.jsonl:2 is not JSON \(Expecting ',' delimiter at character \d+\), expected an object a",
        ),
        (b"[1]", r"a\.jsonl:2 is a list, expected an object with a conversation"),
        (b'{"prompt": "q\xff"}', r"a\.jsonl:2 is not UTF-8 at byte 13, expected UTF-8 text"),
        (b'{"prompt": "q", "completion": "\\ud800"}', r"a\.jsonl:2 holds a lone surrogate, expected text that UTF-8"),
        ({"prompt": "q", "answer": "a"}, r"a\.jsonl:2 has the keys \['answer', 'prompt'\], expected 'messages', or 'p"),
        ({"prompt": "q", "completion": " \n"}, r"a\.jsonl:2: the answer in turn 1 is empty, expected text to learn"),
        ({"prompt": "q", "completion": 3}, r"a\.jsonl:2: 'completion' is a int, expected a text or a list of messages"),
        ({"messages": "q"}, r"a\.jsonl:2: 'messages' is a str, expected a list of messages"),
        ({"messages": ["q"]}, r"a\.jsonl:2: messages\[0\] is 'q', expected a role and a text as content"),
        (
            {"messages": [turn("user", None)]},
            r"messages\[0\] is \{'role': 'user', 'content': None\}, expected a role and",
        ),
        ({"messages": [turn("human")]}, r"messages\[0\] has the role 'human', expected one of system, user, assistant"),
        ({"messages": []}, r"a\.jsonl:2 ends with the role None, expected an 'assistant' turn"),
        ({"messages": [turn("user")]}, r"a\.jsonl:2 ends with the role 'user', expected an 'assistant' turn"),
        (
            {"prompt": [turn("user"), turn("assistant")], "completion": []},
            r"a\.jsonl:2: 'completion' is empty, expected an",
        ),
        ({"messages": [turn("assistant")]}, r"a\.jsonl:2 begins with the role 'assistant', expected a prompt before"),
        (
            {"prompt": "q", "completion": [turn("user"), turn("assistant")]},
            "completion begins with the role 'user', ex",
        ),
        ({"messages": [turn("user"), turn("assistant", ""), turn("user"), turn("assistant")]}, "in turn 1 is empty"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(b'{"prompt": "q", "completion": "a"}\n' + bad + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        list(read_conversations([str(path)]))
    assert "\n" not in str(caught.value)


def test_sources_without_a_line_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="hold no line, expected at least one conversation: check sources"):
        list(read_conversations([str(tmp_path)]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl does not exist"):
        list(read_conversations([str(tmp_path / "nowhere.jsonl")]))
