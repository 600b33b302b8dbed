"""``ds-lightning generate --chat``: a conversation in a terminal, by the chat template beside the weights."""

import importlib.util
import sys
from pathlib import Path

from ds_lightning.generate_cli import MAX_NEW_TOKENS, Terminal, load, stop_tokens, write
from ds_lightning.generation import Generator
from ds_lightning.generation.device import Device
from ds_lightning.rl.builtin_rewards import THINK
from ds_lightning.rl.prompting import Prompter
from ds_lightning.rl.tasks import Message

EXIT = "exit"


def chat(
    model: str,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: Device = "cpu",
) -> list[Message]:
    """Hold a conversation: a line of the input is a message, until the input ends or a line says ``exit``.

    Ctrl-C ends an answer, what there is of it being part of the conversation; a second one in a row ends the program.

    Args:
        model: Folder in Hugging Face layout, with a tokenizer.json and, if need be, a chat_template.jinja.
        prompt: The first message; none: it is read too.
        max_new_tokens: Tokens of an answer at most; none: 256, or half of the context if that is less.
        temperature: Divides the logits; 0: take the likeliest token.
        top_k: Draw from this many likeliest tokens; 0: from all.
        top_p: Draw from the likeliest tokens that together have this probability; 1: from all.
        seed: Of the random numbers.
        device: Where the model runs.

    Returns:
        The turns, without those at the beginning that no longer fitted into the context.

    Raises:
        ValueError: If the folder does not exist, an option is out of range, or the template refuses a conversation.
        KeyboardInterrupt: At the second Ctrl-C in a row.
    """
    conversation = Conversation(
        model,
        device=device,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    interrupted = False
    while True:
        try:
            text, prompt = _read() if prompt is None else prompt, None
        except EOFError:
            break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            _note(f"Ctrl-C once more ends the conversation, as do Ctrl-D and {EXIT}", before="\n")
            continue
        if text.strip() == EXIT:
            break
        if text.strip():
            interrupted = not conversation.answer(text)
    return conversation.messages


class Conversation:
    """Turns so far, and what answers the next.

    Args:
        folder: Of the model, as for :func:`chat`.
        device: Where the model runs.
        max_new_tokens: Tokens of an answer at most; none: 256, or half of the context if that is less.
        sampling: ``temperature``, ``top_k``, ``top_p`` and ``seed`` of :meth:`Generator.generate`.

    Raises:
        ValueError: As :func:`chat`.
    """

    def __init__(
        self, folder: str, *, device: Device = "cpu", max_new_tokens: int | None = None, **sampling: float
    ) -> None:
        network, tokenizer = load(folder, device)
        self.context = network.config.max_position_embeddings
        if max_new_tokens is not None and not 1 <= max_new_tokens < self.context:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, expected 1 to {self.context - 1} (max_position_embeddings "
                f"{self.context} of {folder})"
            )
        self.generator = Generator(network)
        self.prompter = Prompter(Path(folder) / "tokenizer.json")
        self.stop = stop_tokens(Path(folder), tokenizer)
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens or min(MAX_NEW_TOKENS, self.context // 2)
        self.messages: list[Message] = []
        self.answers = 0
        self._generate([], [], max_new_tokens=1)  # refuses wrong options before a word is typed

    def answer(self, text: str) -> bool:
        """Answer a message, showing the answer as it comes; return False if it was interrupted."""
        self.messages.append({"role": "user", "content": text})
        prompt = self._prompt()
        if not prompt:
            self.messages.pop()
            return True
        # The generation prompt may hold the tag that begins an answer, which is then part of it.
        begun = THINK[0] if self.prompter.text(self.messages).endswith(THINK[0]) else ""
        show, whole = Terminal(self.prompter.tokenizer, hidden=self.stop, special=True), True
        write(begun)
        try:
            room = self.context - len(prompt)
            self._generate([prompt], [self.answers], max_new_tokens=min(self.max_new_tokens, room), show=show)
        except KeyboardInterrupt:
            whole = False
        show.end() if show.tokens else write("\n")
        self.answers += 1
        self.messages.append({"role": "assistant", "content": begun + show.text})
        return whole

    def _prompt(self) -> list[int]:
        """Return the tokens of the conversation, its oldest turns forgotten for lack of room; [] without any."""
        forgotten = 0
        while True:
            ids = self.prompter.encode(self.messages)
            if len(ids) + self.max_new_tokens <= self.context or len(self.messages) == 1:
                break
            del self.messages[:2]  # a message and its answer
            forgotten += 2
        if forgotten:
            _note(f"the context of {self.context} tokens is full: the first {forgotten} turns are forgotten")
        if len(ids) >= self.context:
            _note(f"that is {len(ids)} tokens with the template, expected at most {self.context - 1}: say it in less")
            return []
        return ids

    def _generate(
        self, prompts: list[list[int]], keys: list[int], *, max_new_tokens: int, show: Terminal | None = None
    ) -> None:
        self.generator.generate(
            prompts,
            keys=keys,
            max_new_tokens=max_new_tokens,
            stop=self.stop,
            record_routing=False,
            on_tokens=show,
            **self.sampling,  # type: ignore[arg-type]  # whole numbers among them
        )


def _read() -> str:
    """Return the next line of the input; where a person types it, with a prompt and keys that edit."""
    if not sys.stdin.isatty():
        line = input()
    else:
        if importlib.util.find_spec("readline") is not None:
            import readline  # noqa: F401  # to be imported is its effect on input()
        try:
            line = input("> ")
        except EOFError:
            write("\n")
            raise
    return line.encode("utf-8", "replace").decode()  # bytes that are no text arrive as lone surrogates


def _note(text: str, before: str = "") -> None:
    """Tell the user what is not part of the conversation."""
    print(f"{before}({text})", file=sys.stderr, flush=True)
