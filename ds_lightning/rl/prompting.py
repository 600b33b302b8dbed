"""Between problems and tokens: what a model is asked, and the text of what it wrote."""

from collections.abc import Sequence
from pathlib import Path

from ds_lightning.data.chat import ChatTemplate, chat_tokenizer, template_beside
from ds_lightning.data.tokenizer import END_OF_TEXT, PAD, load_tokenizer, special_id
from ds_lightning.generation import Generator, Sample
from ds_lightning.rl.tasks import Prompt


class Prompter:
    """Encodes prompts with the tokenizer and chat template of a model, and decodes its samples.

    Args:
        tokenizer: Path of a ``tokenizer.json``; a ``chat_template.jinja`` beside it is used for prompts of messages.

    Raises:
        ValueError: If the tokenizer or the template is damaged.
        FileNotFoundError: If there is no tokenizer.

    Attributes:
        eos_id: Token that ends a completion.
        pad_id: Token for padding.
        tokenizer: Encodes what spells a special token to that token.
    """

    def __init__(self, tokenizer: str | Path) -> None:
        self.path = Path(tokenizer)
        loaded = load_tokenizer(self.path)
        self.eos_id, self.pad_id = special_id(loaded, END_OF_TEXT), special_id(loaded, PAD)
        self.template = ChatTemplate(template_beside(self.path))
        self.tokenizer = chat_tokenizer(loaded)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt: text as it is, messages by the template with its generation prompt."""
        ids: list[int] = self.tokenizer.encode(self.text(prompt), add_special_tokens=False).ids
        return ids

    def text(self, prompt: Prompt) -> str:
        """Return the text of a prompt."""
        return prompt if isinstance(prompt, str) else self.template.render(prompt, add_generation_prompt=True)

    def decode(self, sample: Sample) -> str:
        """Return what a sample says, tags included, without the token that ends it."""
        tokens = sample.tokens.tolist()
        if tokens and tokens[-1] == self.eos_id:
            tokens.pop()
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def complete(self, generator: Generator, prompts: Sequence[Prompt], n: int, **options: object) -> list[Sample]:
        """Return ``n`` samples of each prompt; options as of :meth:`Generator.generate`."""
        encoded = [self.encode(prompt) for prompt in prompts]
        return generator.generate(encoded, n, stop=self.eos_id, **options)  # type: ignore[arg-type]
