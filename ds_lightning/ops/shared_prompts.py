"""How prompts and completions lie in one flat batch, in which a prompt is computed once for all of its answers."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SharedPrompts(NamedTuple):
    """Layout of a batch of one row: first all prompts, padded on the right, then all completions, padded too."""

    prompt: Int[Tensor, " rows"]
    """Prompt of each completion."""
    lengths: Int[Tensor, " prompts"]
    """Tokens of each prompt."""
    prompt_seq: int
    """Positions of a prompt with its padding."""
    seq: int
    """Positions of a completion with its padding."""

    def positions(self) -> Int[Tensor, " tokens"]:
        """Return the position of each token in the sequence that its prompt and itself are part of."""
        of_prompts = torch.arange(self.prompt_seq, device=self.lengths.device).repeat(len(self.lengths))
        ahead = torch.arange(self.seq, device=self.lengths.device)
        return torch.cat((of_prompts, (self.lengths[self.prompt, None] + ahead).flatten()))

    def split(
        self, x: Float[Tensor, "1 tokens *channels"]
    ) -> tuple[Float[Tensor, "prompts prompt_seq *channels"], Float[Tensor, "rows seq *channels"]]:
        """Return views of the prompts and of the completions."""
        tokens = len(self.lengths) * self.prompt_seq
        prompts, completions = x[0].split((tokens, x.shape[1] - tokens))
        return prompts.unflatten(0, (-1, self.prompt_seq)), completions.unflatten(0, (-1, self.seq))

    def predicting(self, hidden: Float[Tensor, "1 tokens hidden"]) -> Float[Tensor, "rows seq hidden"]:
        """Return the states that predict the completions: that of the prompt's last token, then their own but one."""
        prompts, completions = self.split(hidden)
        last = prompts[torch.arange(len(self.lengths), device=hidden.device), self.lengths - 1]
        return torch.cat((last[self.prompt].unsqueeze(1), completions[:, :-1]), 1)
