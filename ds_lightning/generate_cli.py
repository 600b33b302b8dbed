"""``ds-lightning generate``: text from a folder in Hugging Face layout, shown as it comes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from ds_lightning.data.tokenizer import END_OF_TEXT, load_tokenizer, special_id
from ds_lightning.generation import Generator, Sample
from ds_lightning.generation.device import Device, check_device
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import load_hf
from ds_lightning.models.hf_config import read_json_object

MAX_NEW_TOKENS = 256


def generate(
    model: str,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    n: int = 1,
    device: Device = "cpu",
    *,
    stream: bool = True,
) -> list[dict[str, Any]]:
    """Continue a prompt.

    Args:
        model: Folder in Hugging Face layout, with a tokenizer.json.
        prompt: Text to continue.
        max_new_tokens: Tokens to write at most; none: 256, or as many as the context has room for.
        temperature: Divides the logits; 0: take the likeliest token.
        top_k: Draw from this many likeliest tokens; 0: from all.
        top_p: Draw from the likeliest tokens that together have this probability; 1: from all.
        seed: Of the random numbers.
        n: Continuations; a single one is shown as it comes.
        device: Where the model runs.
        stream: Write the text to the terminal.

    Returns:
        Text, tokens, log-probabilities and finish reason of each.

    Raises:
        ValueError: If folder or device does not exist, or the prompt is empty or leaves no room in the context.
    """
    network, tokenizer = load(model, device)
    context = network.config.max_position_embeddings
    ids = _encoded(prompt, tokenizer, context, model)
    show = Terminal(tokenizer) if stream and n == 1 else None
    try:
        samples = Generator(network).generate(
            [ids],
            n,
            max_new_tokens=min(MAX_NEW_TOKENS, context - len(ids)) if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop_tokens(Path(model), tokenizer),
            seed=seed,
            record_routing=False,
            on_tokens=show,
        )
    finally:
        if show is not None:
            show.end()
    figures = [_figures(tokenizer, sample) for sample in samples]
    if stream and n > 1:
        for number, sample in enumerate(figures, start=1):
            write(f"--- {number} of {n}, {sample['finish_reason']}\n{sample['text']}\n")
    return figures


def _encoded(prompt: str, tokenizer: Tokenizer, context: int, model: str) -> list[int]:
    """Return the tokens of a prompt that leaves room for one more."""
    ids: list[int] = tokenizer.encode(prompt).ids
    if not 1 <= len(ids) < context:
        raise ValueError(
            f"prompt has {len(ids)} tokens, expected 1 to {context - 1} (max_position_embeddings {context} of {model})"
        )
    return ids


def load(folder: str, device: Device = "cpu") -> tuple[DeepSeek, Tokenizer]:
    """Read model and tokenizer.

    Raises:
        ValueError: If there is no such folder or device, or as :func:`load_hf` and :func:`load_tokenizer`.
        FileNotFoundError: If the folder lacks a file.
    """
    check_device(device)
    if not Path(folder).is_dir():
        raise ValueError(f"model is {folder!r}, expected a folder in Hugging Face layout")
    tokenizer = load_tokenizer(Path(folder) / "tokenizer.json")
    return load_hf(folder).to(device), tokenizer


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text: those that the folder names, else the tokenizer's end of text."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            named = read_json_object(folder / name).get("eos_token_id")
            if named is not None:
                return [named] if isinstance(named, int) else list(named)
    return [special_id(tokenizer, END_OF_TEXT)]


def _figures(tokenizer: Tokenizer, sample: Sample) -> dict[str, Any]:
    tokens = sample.tokens.tolist()
    return {
        "text": tokenizer.decode(tokens),
        "tokens": tokens,
        "logprobs": sample.logprobs.tolist(),
        "finish_reason": sample.finish_reason,
    }


class Terminal:
    """Writes one sample's text as far as its bytes make whole characters.

    Args:
        tokenizer: Decodes the tokens.
        hidden: Tokens that are not written, the one that ends an answer for example.
        special: Write the tags that structure a text too.
    """

    def __init__(self, tokenizer: Tokenizer, *, hidden: Sequence[int] = (), special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.hidden = frozenset(hidden)
        self.special = special
        self.stream = DecodeStream(skip_special_tokens=not special)
        self.tokens: list[int] = []
        self.written = ""

    def __call__(self, samples: list[int], tokens: list[int]) -> None:
        """Take the tokens of a step."""
        for token in tokens:
            if token not in self.hidden:
                self.tokens.append(token)
                self._write(self.stream.step(self.tokenizer, token) or "")

    @property
    def text(self) -> str:
        """All that came, written or not yet."""
        decoded: str = self.tokenizer.decode(self.tokens, skip_special_tokens=not self.special)
        return decoded

    def end(self) -> None:
        """Write what is left, half a character perhaps, and a line end; nothing, if nothing came."""
        if self.tokens:
            self._write(self.text[len(self.written) :] + "\n")

    def _write(self, text: str) -> None:
        self.written += text
        write(text)


def write(text: str) -> None:
    """Write a model's text: to a terminal without what could control it, as far as its encoding goes."""
    encoding = sys.stdout.encoding or "utf-8"
    text = harmless(text) if sys.stdout.isatty() else text
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def harmless(text: str) -> str:
    """Return a text in which characters that a terminal obeys are symbols.

    A model may write sequences that move the cursor, set the title, fill the clipboard, or turn the direction of
    writing, and so hide what it says. Line ends and tabs stay.
    """
    return text.translate(_SYMBOLS)


_SYMBOLS = {
    **{
        code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"
    },  # the picture of each, U+241B for escape
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
