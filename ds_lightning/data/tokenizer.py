"""Byte-level BPE tokenizers: train one on a corpus, load one, and count the bytes that each token stands for."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ds_lightning.data.corpus import Document

END_OF_TEXT = "<|end_of_text|>"
PAD = "<|pad|>"
FIM_BEGIN = "<|fim_begin|>"
FIM_HOLE = "<|fim_hole|>"
FIM_END = "<|fim_end|>"
SPECIAL_TOKENS = (
    END_OF_TEXT,
    PAD,
    FIM_BEGIN,
    FIM_HOLE,
    FIM_END,
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
"""Tokens that structure a stream. Text never encodes to them, even where it spells them."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

SAMPLE_BYTES = 32 * 2**20
"""Text that a tokenizer is trained on at most: more of it hardly changes the merges."""

MAX_SAMPLE_CHARACTERS = 2**18
"""Characters of one document that a tokenizer is trained on at most, so that no giant outweighs the others."""

SPLIT = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]{1,64}",  # a word with the space, dot, underscore or bracket before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]{1,64}[\r\n]{0,8}[ \t]{0,64}",  # punctuation, the line end and spaces after it
        r"[ \t]{0,64}[\r\n]{1,8}[ \t]{0,64}",  # line ends and the indentation after them
        r"\s{1,64}(?!\S)",  # spaces, but for the last one, which goes with the word
        r"\s{1,64}",
    )
)
"""What BPE merges within. Every repetition is bounded: one line of gigabytes must not become one word, for which
training would take the square of its length."""


def train_tokenizer(documents: Iterable[Document], vocab_size: int, *, sample_bytes: int = SAMPLE_BYTES) -> Tokenizer:
    """Train a lossless byte-level BPE tokenizer.

    The text is a sample of whole documents, chosen by a hash of their name, so that the result depends neither on
    their order nor on chance.

    Args:
        documents: What to learn from.
        vocab_size: Ids wanted, special tokens included; a small corpus may give fewer.
        sample_bytes: Text to train on at most.

    Raises:
        ValueError: If ``vocab_size`` has no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE}: 256 bytes and {len(SPECIAL_TOKENS)} "
            "special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_sample(documents, sample_bytes), trainer=trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a ``tokenizer.json``; special tokens of :data:`SPECIAL_TOKENS` that it lacks are added after its own.

    Text does not encode to special tokens. Who wants that, to write a prompt with them for example, sets
    ``encode_special_tokens`` to False.

    Raises:
        ValueError: If the file is no tokenizer, or one that is not byte-level and so cannot round-trip any text.
        FileNotFoundError: If there is no such file.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        description = json.loads(text)
        model, decoder = description["model"]["type"], description["decoder"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a tokenizer ({error!r}), expected the tokenizer.json of a byte-level BPE"
        ) from error
    if model != "BPE" or "ByteLevel" not in json.dumps(decoder):
        raise ValueError(
            f"{path} is a {model} tokenizer with the decoder {json.dumps(decoder)[:80]}, expected a byte-level BPE"
        )
    tokenizer = Tokenizer.from_str(text)
    # Those it knows are added too: a tokenizer may hold them as ordinary added tokens, which text would encode to.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a ``tokenizer.json``, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> UInt16[np.ndarray, " vocab"]:
    """Return how many bytes of text each id decodes to; special tokens and unused ids count 0.

    A byte-level vocabulary spells each byte as one character, so the length of a token is its number of bytes.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(num_ids(tokenizer), dtype=np.uint16)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    for index, extra in added.items():
        lengths[index] = 0 if extra.special else len(extra.content.encode())
    return lengths


def num_ids(tokenizer: Tokenizer) -> int:
    """Return the number of rows an embedding needs for the tokenizer: its largest id plus 1."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of one of :data:`SPECIAL_TOKENS`."""
    index = tokenizer.token_to_id(token)
    assert index is not None, token
    return index


def _sample(documents: Iterable[Document], sample_bytes: int) -> Iterator[str]:
    """Yield the documents whose names have the smallest hashes, as many as fit, cut to a bounded length."""
    kept: list[tuple[int, int, str]] = []
    total = 0
    for index, (name, text) in enumerate(documents):
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8, person=b"sample").digest(), "big")
        text = text[:MAX_SAMPLE_CHARACTERS]
        heapq.heappush(kept, (-digest, -index, text))
        total += len(text)
        while total > sample_bytes and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2])
    for _, _, text in sorted(kept, reverse=True):
        yield text
