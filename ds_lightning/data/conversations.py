"""Conversations for fine-tuning, as JSON lines hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ds_lightning.data.chat import ROLES, Message
from ds_lightning.data.corpus import expand
from ds_lightning.data.shards import file_sha256


class Conversation(NamedTuple):
    """Turns that end with an answer."""

    name: str
    """Does not depend on where the file lies: the split hashes it."""
    where: str
    """File and line, for messages."""
    messages: list[Message]
    first_answer: int
    """Turn from which on answers are trained; those before it are part of the prompt."""


def read_conversations(sources: Sequence[str]) -> Iterator[Conversation]:
    """Yield the conversations of JSON-lines files, in an order that depends on the sources alone.

    A line is an object in one of Hugging Face's formats; other keys are left aside:

    * ``prompt`` and ``completion``, both texts (one turn each) or both lists of messages: only answers in the
      completion are trained;
    * ``messages``, a list of messages: every answer is trained.

    A message has a ``role`` (system, user or assistant) and a text as ``content``.

    Args:
        sources: Files, directories or globs.

    Raises:
        ValueError: If a line is no conversation, or no line is found; the message names file and line.
        FileNotFoundError: If a source does not exist.
    """
    found = False
    for source in sources:
        for path, name in expand(source):
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    where = f"{path}:{number}"
                    if line.strip():
                        found = True
                        messages, first_answer = _turns(_record(line, where), where)
                        yield Conversation(f"{name}:{number}", where, messages, first_answer)
    if not found:
        raise ValueError(f"the sources {list(sources)} hold no line, expected at least one conversation: check sources")


def sources_sha256(sources: Sequence[str]) -> str:
    """Return a hash of the files behind some sources and what is in them.

    Raises:
        FileNotFoundError: If a source does not exist.
    """
    facts = [[name, file_sha256(path)] for source in sources for path, name in expand(source)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()  # refuses lone surrogates, which JSON can spell
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 at byte {error.start}, expected UTF-8 text") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds a lone surrogate, expected text that UTF-8 can hold") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON ({error.msg} at character {error.pos}), expected an object a line"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, expected an object with a conversation")
    return record


def _turns(record: dict[str, Any], where: str) -> tuple[list[Message], int]:
    """Return the messages of a record, and the turn from which on answers are trained."""
    if "messages" in record:
        messages, first_answer = _checked(record["messages"], "messages", where), 0
    elif "prompt" in record and "completion" in record:
        prompt, completion = (
            [{"role": role, "content": record[key]}] if isinstance(record[key], str) else record[key]
            for key, role in (("prompt", "user"), ("completion", "assistant"))
        )
        before = _checked(prompt, "prompt", where)
        messages, first_answer = [*before, *_checked(completion, "completion", where)], len(before)
        if len(messages) == first_answer:
            raise ValueError(f"{where}: 'completion' is empty, expected an answer")
        if messages[first_answer]["role"] != "assistant":
            role = messages[first_answer]["role"]
            raise ValueError(f"{where}: completion begins with the role {role!r}, expected 'assistant'")
    else:
        raise ValueError(f"{where} has the keys {sorted(record)}, expected 'messages', or 'prompt' and 'completion'")
    roles = [message["role"] for message in messages]
    if not messages or roles[-1] != "assistant":
        raise ValueError(f"{where} ends with the role {roles[-1] if roles else None!r}, expected an 'assistant' turn")
    if roles[0] == "assistant":
        raise ValueError(f"{where} begins with the role 'assistant', expected a prompt before the answer")
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn >= first_answer and not message["content"].strip():
            raise ValueError(f"{where}: the answer in turn {turn} is empty, expected text to learn")
    return messages, first_answer


def _checked(messages: Any, key: str, where: str) -> list[Message]:
    if not isinstance(messages, list):
        kinds = "a list of messages" if key == "messages" else "a text or a list of messages"
        raise ValueError(f"{where}: {key!r} is a {type(messages).__name__}, expected {kinds}")
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: {key}[{turn}] is {message!r:.80}, expected a role and a text as content")
        if message.get("role") not in ROLES:
            raise ValueError(
                f"{where}: {key}[{turn}] has the role {message.get('role')!r}, expected one of {', '.join(ROLES)}"
            )
    return messages
