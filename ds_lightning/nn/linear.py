"""The linear layer of every projection."""

import torch


class Linear(torch.nn.Linear):
    """Product with a weight [out in], no bias; weights are set by ``models.init``, not here."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Do nothing: one place initialises all weights."""
