"""Oracle: the published bytes of DeepSeek-V3's cache, and rows kept as a Python list of tensors."""

import random

import pytest
import torch
from torch import Tensor

from ds_lightning.config import DeepSeekConfig
from ds_lightning.generation import LatentCache, cache_bytes
from ds_lightning.generation.cache import BLOCK
from tests.generation.small_model import CONFIG

WIDTH = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim


def test_a_token_of_deepseek_v3_takes_1152_bytes_a_layer() -> None:
    v3 = DeepSeekConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        intermediate_size=18432,
        num_attention_heads=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    assert cache_bytes(v3, torch.bfloat16) == 1152


def test_the_cache_holds_what_it_says() -> None:
    cache = LatentCache(CONFIG, 5, torch.bfloat16, torch.device("cpu"))
    cache.admit(torch.ones(3, BLOCK, WIDTH), 5)
    bytes_held = cache.latents.numel() * cache.latents.dtype.itemsize
    assert bytes_held == 5 * BLOCK * CONFIG.num_hidden_layers * cache_bytes(CONFIG, torch.bfloat16)


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_enter_grow_move_and_leave_are_those_of_a_list(seed: int) -> None:
    draw = random.Random(seed)
    cache, rows = LatentCache(CONFIG, 6, torch.float32, torch.device("cpu")), list[Tensor]()
    for _ in range(120):
        if len(rows) < 6 and draw.random() < 0.2:
            latents, count = torch.randn(3, draw.randint(1, 70), WIDTH), draw.randint(1, 6 - len(rows))
            cache.admit(latents, count)
            rows += [latents] * count
        if rows:
            seen, bias = cache.seen()
            assert seen.shape[2] % BLOCK == 0
            assert seen.isfinite().all()
            entry = torch.randn(3, len(rows), WIDTH)
            seen[:, torch.arange(len(rows)), cache.lengths] = entry
            cache.advance()
            rows = [torch.cat((row, entry[:, i, None]), 1) for i, row in enumerate(rows)]
            for row, hidden in zip(rows, bias, strict=True):
                assert (hidden[: row.shape[1]] == 0).all()
                assert (hidden[row.shape[1] :] == -torch.inf).all()
        if rows and draw.random() < 0.2:
            order = draw.sample(range(len(rows)), draw.randint(0, len(rows)))
            cache.keep(torch.tensor(order, dtype=torch.long))
            rows = [rows[i] for i in order]
        assert cache.lengths.tolist() == [row.shape[1] for row in rows]
        assert cache.longest == max(cache.lengths.tolist(), default=0)
        for i, row in enumerate(rows):
            assert torch.equal(cache.latents[:, i, : row.shape[1]], row)
