"""Oracle: ``apply_chat_template`` of transformers on the exported folder, and the text written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ds_lightning.config import DeepSeekConfig
from ds_lightning.data import ChatTemplate, Document, chat_tokenizer, train_tokenizer
from ds_lightning.data.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE, answer_tokens, template_beside
from ds_lightning.data.shards import eos_and_pad
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf

USER = {"role": "user", "content": "12 + 30 = ? <caf\u00e9>"}
ANSWER = {"role": "assistant", "content": "<think>easy</think><answer>42</answer>"}
PLAIN = {"role": "assistant", "content": "forty \u00e9\u00e9 two"}
SYSTEM = {"role": "system", "content": "Think first."}
CONVERSATIONS = [[USER, ANSWER], [SYSTEM, USER, PLAIN, USER, ANSWER], [USER, PLAIN, USER, PLAIN]]

CHATML = """{%- for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | tojson + eos_token }}
    {% if loop.last %}{% continue %}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "12 + 30 = 42 easy forty two caf\u00e9 Think first. <think> <|user|> " * 9
    return train_tokenizer([Document("a", text)], 320)


def exported(tokenizer: Tokenizer, folder: Path, template: str) -> Any:
    """Return what ``AutoTokenizer`` makes of an export with a template beside its tokenizer."""
    from transformers import AutoTokenizer

    config = DeepSeekConfig(
        vocab_size=320, hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1,
        kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    source = folder / "source"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    eos, pad = eos_and_pad(tokenizer)
    arguments: dict[str, Any] = {"tokenizer_file": source / "tokenizer.json", "eos_token_id": eos, "pad_token_id": pad}
    save_hf(DeepSeek(config), folder / "hf", **arguments)
    save_hf(DeepSeek(config), folder / "hf", **arguments, overwrite=True)
    return AutoTokenizer.from_pretrained(folder / "hf")


def test_the_default_template_writes_prompt_thought_and_answer() -> None:
    template = ChatTemplate()
    assert template.render([USER], add_generation_prompt=True) == "<|user|>12 + 30 = ? <caf\u00e9><|assistant|><think>"
    text, spans = template.render_answers([SYSTEM, USER, ANSWER, USER, PLAIN])
    assert text == (
        "Think first.<|user|>12 + 30 = ? <caf\u00e9><|assistant|><think>easy</think><answer>42</answer><|end_of_text|>"
        "<|user|>12 + 30 = ? <caf\u00e9><|assistant|><think></think>forty \u00e9\u00e9 two<|end_of_text|>"
    )
    assert [text[start:stop] for start, stop in spans] == [
        "easy</think><answer>42</answer><|end_of_text|>",
        "</think>forty \u00e9\u00e9 two<|end_of_text|>",
    ]


def test_a_generated_answer_renders_as_it_was_generated() -> None:
    generated = ANSWER["content"].removeprefix("<think>")
    continued = {"role": "assistant", "content": generated}
    assert ChatTemplate().render([USER, continued]) == ChatTemplate().render([USER, ANSWER])


def test_answers_before_the_first_that_counts_are_prompt() -> None:
    text, spans = ChatTemplate().render_answers([USER, PLAIN, USER, ANSWER], first=3)
    assert [text[start:stop] for start, stop in spans] == ["easy</think><answer>42</answer><|end_of_text|>"]


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE.read_text(), CHATML], ids=["default", "chatml"])
def test_transformers_renders_and_encodes_the_same(tokenizer: Tokenizer, tmp_path: Path, template: str) -> None:
    theirs = exported(tokenizer, tmp_path, template)
    ours = ChatTemplate(tmp_path / "hf" / CHAT_TEMPLATE)
    for messages in CONVERSATIONS:
        for turns, prompt in ((messages, False), (messages[:-1], True)):
            text = ours.render(turns, add_generation_prompt=prompt)
            assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt) == text
            ids = theirs.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=True)["input_ids"]
            assert chat_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids == ids


def test_the_tokens_of_answers_are_those_that_transformers_masks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs = exported(tokenizer, tmp_path, DEFAULT_TEMPLATE.read_text())
    for messages in CONVERSATIONS:
        text, spans = ChatTemplate().render_answers(messages)
        encoding = chat_tokenizer(tokenizer).encode(text, add_special_tokens=False)
        ids, inside = answer_tokens(encoding, spans)
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == expected["input_ids"]
        assert inside.astype(int).tolist() == expected["assistant_masks"]
        assert 0 < inside.sum() < len(ids)


def test_text_still_does_not_encode_to_special_tokens_outside_of_conversations(tokenizer: Tokenizer) -> None:
    special = tokenizer.token_to_id("<think>")
    assert special in chat_tokenizer(tokenizer).encode("<think>").ids
    assert special not in tokenizer.encode("<think>").ids


def test_the_template_beside_a_tokenizer_is_found(tmp_path: Path) -> None:
    assert template_beside(tmp_path / "tokenizer.json") == DEFAULT_TEMPLATE
    (tmp_path / CHAT_TEMPLATE).write_text("x")
    assert template_beside(tmp_path / "tokenizer.json") == tmp_path / CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages[0].content }}", "renders the same with and without add_generation_prompt, expected a generation"),
        ("a\n{% for %}", r"chat_template\.jinja:2 is not a Jinja template: "),
        ("{% generation %}{{ messages }}", r"chat_template\.jinja:1 is not a Jinja template: "),
        (
            "{{ raise_exception('roles must alternate') }}",
            r"cannot render \[\{\"role\".*: roles must alternate",
        ),
        ("{{ messages[0].content + 1 }}", "cannot render .*: can only concatenate str"),
        ("{{ messages[0].name.first }}", "cannot render .*: .* has no attribute 'name'"),
        ("{{ 1 / 0 }}", "cannot render .*: division by zero"),
        ("{{ strftime_now('%Y') }}", "cannot render .*: 'strftime_now' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "cannot render .*: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "cannot render .*: access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "cannot render .*: Range too big"),
    ],
)
def test_a_template_that_will_not_do_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / CHAT_TEMPLATE
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        ChatTemplate(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / CHAT_TEMPLATE).write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 at byte 2, expected a Jinja template"):
        ChatTemplate(tmp_path / CHAT_TEMPLATE)


def test_an_answer_that_does_not_continue_its_prompt_is_refused(tmp_path: Path) -> None:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    text = turns + "{% if add_generation_prompt %}<model>{% endif %}"
    path = tmp_path / CHAT_TEMPLATE
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"renders turn 1 of .* otherwise than its generation prompt '.*<model>' begins"
    ):
        ChatTemplate(path).render_answers([USER, ANSWER])
