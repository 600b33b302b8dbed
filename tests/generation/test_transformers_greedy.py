"""Oracle: transformers' own ``generate``, greedy, on the folder that ``save_hf`` writes.

Two implementations may part where two tokens lie within rounding of each other; these draws have no such place.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lightning.config import RopeScaling
from ds_lightning.generation import Generator
from ds_lightning.models.hf import save_hf
from tests.generation.small_model import prompts, small_model

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=24, mscale=0.7)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "rope_scaling": YARN, "n_group": 4, "topk_group": 2}])
def test_greedy_tokens_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model, asked = small_model(**changes), prompts(8)
    save_hf(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", experts_implementation="eager"
    ).eval()
    samples = Generator(model).generate(asked, max_new_tokens=24, temperature=0.0, max_batch=3)
    for prompt, sample in zip(asked, samples, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert sample.tokens.tolist() == out[0, len(prompt) :].tolist()
