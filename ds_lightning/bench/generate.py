"""Tokens a second of ``Generator`` and of transformers' ``generate``."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ds_lightning.bench.contest import BACKENDS, CONFIG, OURS, check_settings, contest_table, figures, in_turns, now
from ds_lightning.generation import Generator
from ds_lightning.generation.device import Device
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf


def bench_generate(
    repeats: int = 5,
    batch: int = 128,
    n: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 48,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Measure both sides in turns, in fp32: plain sampling at temperature 1, no stop token, prefill included.

    Args:
        repeats: Measured rounds, after one that is not.
        batch: Sequences that are advanced together.
        n: Sequences that continue one prompt, a divisor of ``batch``; the peer gets the prompt as often.
        prompt_tokens: Tokens of every prompt.
        new_tokens: Tokens written to each.
        device: Where both sides run.

    Returns:
        Settings; seconds of every round, and tokens a second by their median; the ratio to the best peer.

    Raises:
        ValueError: If transformers is not installed, or an argument is out of range.
    """
    arguments = {"repeats": repeats, "batch": batch, "n": n, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    check_settings("transformers", device, **arguments)
    if batch % n:
        raise ValueError(f"n is {n}, expected a divisor of batch ({batch})")
    torch.manual_seed(0)
    model = DeepSeek(CONFIG).to(device)
    ids = torch.randint(0, CONFIG.vocab_size, (batch // n, prompt_tokens)).to(device)
    peers = _peers(model, ids.repeat_interleave(n, 0), new_tokens)
    seconds = in_turns({OURS: _ours(model, ids, n, new_tokens), **peers}, repeats)
    return {**arguments, **figures(model, device, seconds, batch * new_tokens, "tokens")}


def generate_table(measured: dict[str, Any]) -> Table:
    """Return the figures for a terminal."""
    size = f"batch {measured['batch']} with {measured['n']} a prompt"
    length = f"{measured['prompt_tokens']} + {measured['new_tokens']} tokens"
    return contest_table(measured, "generate", f"{size}, {length}", "tokens")


def _ours(model: DeepSeek, ids: torch.Tensor, n: int, new_tokens: int) -> Callable[[], float]:
    generator, prompts = Generator(model), ids.tolist()

    def run() -> float:
        began = now()
        samples = generator.generate(
            prompts, n, max_new_tokens=new_tokens, max_batch=n * len(prompts), record_routing=False
        )
        took = now() - began
        assert [len(sample.tokens) for sample in samples] == [new_tokens] * (n * len(prompts))
        return took

    return run


def _peers(model: DeepSeek, ids: torch.Tensor, new_tokens: int) -> dict[str, Callable[[], float]]:
    """Return transformers' ``generate`` with each backend, on the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    mask = torch.ones_like(ids)

    def peer(theirs: Any) -> Callable[[], float]:
        assert theirs.dtype == torch.float32
        assert theirs.generation_config.eos_token_id is None, "a row that ends early would count as a whole one"

        def run() -> float:
            began = now()
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
            took = now() - began
            assert out.shape == (len(ids), ids.shape[1] + new_tokens)
            return took

        return run

    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder) / "model")
        load = transformers.AutoModelForCausalLM.from_pretrained
        return {
            f"transformers {backend}": peer(
                load(Path(folder) / "model", experts_implementation=backend).to(ids.device).eval()
            )
            for backend in BACKENDS
        }
