"""Tokens a second of ``Generator`` and of transformers' ``generate``."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from ds_lightning.config import DeepSeekConfig
from ds_lightning.generation import Generator
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf

CONFIG = DeepSeekConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=4,
    intermediate_size=384,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    max_position_embeddings=256,
    initializer_range=0.1,
)
"""A model of 1.1 million parameters: small enough that overhead counts as much as products."""

BACKENDS = ("grouped_mm", "eager")
"""transformers' implementations of experts that are worth measuring; ``batched_mm`` is slower than both."""


def bench_generate(
    repeats: int = 5, batch: int = 128, n: int = 1, prompt_tokens: int = 32, new_tokens: int = 48
) -> dict[str, Any]:
    """Measure both sides in turns, in fp32: plain sampling at temperature 1, no stop token, prefill included.

    Args:
        repeats: Measured rounds, after one that is not.
        batch: Sequences that are advanced together.
        n: Sequences that continue one prompt, a divisor of ``batch``; the peer gets the prompt as often.
        prompt_tokens: Tokens of every prompt.
        new_tokens: Tokens written to each.

    Returns:
        Settings; seconds of every round, and tokens a second by their median; the ratio to the best peer.

    Raises:
        ValueError: If transformers is not installed, or an argument is below 1.
    """
    arguments = {"repeats": repeats, "batch": batch, "n": n, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if batch % n:
        raise ValueError(f"n is {n}, expected a divisor of batch ({batch})")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("transformers is not installed, expected it as the peer: pip install 'ds-lightning[dev]'")
    torch.manual_seed(0)
    model = DeepSeek(CONFIG)
    ids = torch.randint(0, CONFIG.vocab_size, (batch // n, prompt_tokens))
    peers = _peers(model, ids.repeat_interleave(n, 0), new_tokens)
    contestants = {"ds_lightning": _ours(model, ids, n, new_tokens), **peers}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - began)
    rates = {name: batch * new_tokens / median(times) for name, times in seconds.items()}
    return {
        **arguments,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": seconds,
        "tokens_per_second": rates,
        "ratio": rates["ds_lightning"] / max(rate for name, rate in rates.items() if name != "ds_lightning"),
    }


def bench_table(figures: dict[str, Any]) -> Table:
    """Return the figures for a terminal."""
    size = f"{figures['parameters']:,} parameters, batch {figures['batch']} with {figures['n']} a prompt"
    length = f"{figures['prompt_tokens']} + {figures['new_tokens']} tokens"
    run = f"fp32, {figures['threads']} threads, median of {figures['repeats']}"
    title = f"{size}, {length}, {run}"
    table = Table(title=title, title_justify="left")
    table.add_column("generate")
    table.add_column("tokens a second", justify="right")
    for name, rate in figures["tokens_per_second"].items():
        table.add_row(name, f"{rate:,.0f}")
    table.add_row("ratio to the best peer", f"{figures['ratio']:.2f}")
    return table


def _ours(model: DeepSeek, ids: torch.Tensor, n: int, new_tokens: int) -> Callable[[], None]:
    generator, prompts = Generator(model), ids.tolist()

    def run() -> None:
        samples = generator.generate(prompts, n, max_new_tokens=new_tokens, max_batch=n * len(prompts))
        assert all(len(sample.tokens) == new_tokens for sample in samples)

    return run


def _peers(model: DeepSeek, ids: torch.Tensor, new_tokens: int) -> dict[str, Callable[[], None]]:
    """Return transformers' ``generate`` with each backend, on the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    mask = torch.ones_like(ids)

    def peer(theirs: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                out = theirs.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=new_tokens,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    pad_token_id=0,
                )
            assert out.shape == (len(ids), ids.shape[1] + new_tokens)

        return run

    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model")
        load = transformers.AutoModelForCausalLM.from_pretrained
        return {
            f"transformers {backend}": peer(load(Path(folder) / "model", experts_implementation=backend).eval())
            for backend in BACKENDS
        }
