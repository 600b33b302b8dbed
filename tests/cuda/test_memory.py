"""The memory of a GPU. The oracles: torch's own count for a plan's, and the limit that a test sets."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from ds_lightning.cli import main
from ds_lightning.config import DeepSeekConfig
from ds_lightning.cost.memory import Layout, memory_per_device
from ds_lightning.models import DeepSeek
from ds_lightning.models.hf import save_hf
from ds_lightning.training import PretrainModule
from tests.cuda.runs import run
from tests.training.toy_rollouts import MODEL, write_tokenizer

SHAPE = DeepSeekConfig(
    vocab_size=16384,
    hidden_size=768,
    num_hidden_layers=6,
    intermediate_size=2048,
    num_attention_heads=8,
    q_lora_rank=256,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=1024,
)
ROWS, SEQ, STEPS = 8, 1024, 3


class Random(LightningDataModule):
    """Rows of random tokens, one micro-batch a step."""

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        draw = torch.Generator().manual_seed(0)
        count = torch.tensor(ROWS * SEQ)
        rows = [torch.randint(0, SHAPE.vocab_size, (ROWS, SEQ + 1), generator=draw) for _ in range(STEPS)]
        batches = [
            {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "step_tokens": count, "step_labels": count} for ids in rows
        ]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [False, True], ids=["all kept", "recompute"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_planned_memory_is_what_training_takes(tmp_path: Path, precision: str, *, recompute: bool) -> None:
    plan = memory_per_device(
        SHAPE,
        Layout(num_devices=1, recompute=recompute),
        micro_rows=ROWS,
        seq_len=SEQ,
        mixed=precision == "bf16-mixed",
        optimizer="adamw",
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="gpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(PretrainModule(SHAPE, total_tokens=STEPS * ROWS * SEQ, recompute=recompute), datamodule=Random())
    actual = torch.cuda.max_memory_allocated() - before
    print(f"{precision}, recompute {recompute}: planned {plan.total / 1e9:.2f} GB, taken {actual / 1e9:.2f} GB")
    assert actual / plan.total == pytest.approx(1.0, abs=0.15)


def test_too_little_memory_ends_generation_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(DeepSeek(MODEL), folder / "model", tokenizer_file=Path(write_tokenizer(folder)))
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1_000_000 / whole)
    try:
        assert main(["generate", "--model", str(folder / "model"), "--prompt", "a", "--device", "cuda"]) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ds-lightning: CUDA out of memory")
    assert line.endswith("; fewer or shorter texts at a time need less")


def test_too_little_memory_ends_a_run_in_one_line_with_a_remedy(folder: Path) -> None:
    little = {"class_path": "tests.cuda.little_memory.LittleMemory", "init_args": {"limit": 1_000_000}}
    failed = run(folder, "little", "gpu1", trainer__callbacks=[little]).attempt(status=1)
    error = failed.attempts[-1].err
    assert "Traceback" not in error
    [line] = [line for line in error.splitlines() if line.startswith("ds-lightning: ")]
    assert "out of memory" in line
    assert "a smaller micro-batch (a larger trainer.accumulate_grad_batches) needs less" in line
