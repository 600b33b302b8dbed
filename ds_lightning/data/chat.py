"""Chat templates: from the turns of a conversation to the text, and the tokens, that a model is trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
from jaxtyping import Bool, Int64
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Encoding, Tokenizer

from ds_lightning.data.tokenizer import END_OF_TEXT, PAD

CHAT_TEMPLATE = "chat_template.jinja"
DEFAULT_TEMPLATE = Path(__file__).with_name(CHAT_TEMPLATE)
"""Prompt, then ``<think>`` thought ``</think>`` answer, end of text; after DeepSeek-R1's template."""

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]
"""A turn: ``role`` and ``content``; templates may read other keys."""

Span = tuple[int, int]
"""First character of a part of a text, and the one after its last."""

_RENDERING = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template can raise; the sandbox raises a ``TemplateError``."""


class ChatTemplate:
    """A ``chat_template.jinja``, rendered as transformers does: in a sandbox, since it may come with foreign weights.

    It sees ``messages``, ``add_generation_prompt``, ``eos_token`` and ``pad_token``. There is no ``strftime_now``: the
    text of a conversation must not depend on the day.

    Args:
        path: The template.

    Raises:
        ValueError: If it cannot be parsed or rendered, or has no generation prompt.
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: str | Path = DEFAULT_TEMPLATE) -> None:
        self.path = Path(path)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(self.path.read_text(encoding="utf-8"))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self.path}:{error.lineno} is not a Jinja template: {error.message}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 at byte {error.start}, expected a Jinja template") from None
        probe = [{"role": "user", "content": "x"}]
        if self.render(probe, add_generation_prompt=True) == self.render(probe):
            raise ValueError(
                f"{self.path} renders the same with and without add_generation_prompt, expected a generation prompt: "
                "without it a model does not know that its turn begins"
            )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, ready for the model's answer where a generation prompt is added.

        Raises:
            ValueError: If the template refuses the messages or fails on them.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                eos_token=END_OF_TEXT,
                pad_token=PAD,
            )
        except _RENDERING as error:
            raise ValueError(f"{self.path} cannot render {_shown(messages)}: {error}") from None

    def render_answers(self, messages: Sequence[Message], first: int = 0) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and where in it the model speaks.

        An answer is what the template adds to the conversation before it with a generation prompt, the end token
        included: exactly what the model has to generate there, whatever the template marks.

        Args:
            messages: The turns.
            first: Turn from which on answers count; those before it are part of the prompt.

        Raises:
            ValueError: If the template renders a turn before an answer otherwise than the prompt of that answer.
        """
        text, spans = self.render(messages), []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or turn < first:
                continue
            prompt = self.render(messages[:turn], add_generation_prompt=True)
            answered = text if turn + 1 == len(messages) else self.render(messages[: turn + 1])
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise ValueError(
                    f"{self.path} renders turn {turn} of {_shown(messages)} otherwise than its generation prompt "
                    f"{prompt[-40:]!r} begins it, expected every answer to continue the prompt: a model would be "
                    "trained on another text than it is asked with"
                )
            spans.append((len(prompt), len(answered)))
        return text, spans


def template_beside(tokenizer_file: str | Path) -> Path:
    """Return the ``chat_template.jinja`` in the folder of a tokenizer, or the default where there is none."""
    path = Path(tokenizer_file).with_name(CHAT_TEMPLATE)
    return path if path.is_file() else DEFAULT_TEMPLATE


def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that encodes what spells a special token to that token, as rendered conversations need it."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy


def answer_tokens(
    encoding: Encoding, spans: Sequence[Span]
) -> tuple[Int64[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Return the tokens of a text, and which of them spell something inside the spans.

    A token across the border of a span counts as inside, as in transformers.
    """
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    inside = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        inside |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
    return np.array(encoding.ids, dtype=np.int64), inside


class _Generation(jinja2.ext.Extension):
    """The tags ``generation`` and ``endgeneration``, around what is left as it is.

    transformers reads the model's part of a conversation off them; here the generation prompt tells it.
    """

    tags = {"generation"}  # noqa: RUF012  # as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, "indent": indent, **options})


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _shown(messages: Sequence[Message]) -> str:
    text = json.dumps(list(messages), ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."
