"""Oracles: the paper's equations on truncated rows, without wrapping round, and which token can change which state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_lightning.config import DeepSeekConfig
from ds_lightning.losses.next_token import IGNORE, mtp_labels, next_token_loss
from ds_lightning.models.deepseek import MTP, DeepSeek
from ds_lightning.nn.norm import RMSNorm
from ds_lightning.ops.rope import rope_tables

DEPTH, SEQ = 3, 9
CONFIG = DeepSeekConfig(
    vocab_size=29,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=24,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=6,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=10,
    first_k_dense_replace=1,
    num_nextn_predict_layers=DEPTH,
    initializer_range=0.3,
)


def build(config: DeepSeekConfig = CONFIG) -> DeepSeek:
    torch.manual_seed(0)
    model = DeepSeek(config).double()
    for module in model.modules():
        if isinstance(module, RMSNorm):  # gains of one would hide which norm is used where
            module.weight.data.uniform_(0.5, 2.0)
    return model


def states_of(model: DeepSeek, ids: Tensor) -> list[Tensor]:
    return model.mtp_hidden(ids, model(ids))


def tokens() -> Tensor:
    return torch.randint(29, (2, SEQ), generator=torch.Generator().manual_seed(1))


def test_each_depth_is_the_papers_equations() -> None:
    model, ids = build(), tokens()
    states = states_of(model, ids)
    assert len(states) == DEPTH
    cos, sin = rope_tables(4, SEQ, 10000.0, None)
    previous = model(ids)
    for depth, (module, state) in enumerate(zip(model.mtp, states, strict=True), start=1):
        assert isinstance(module, MTP)
        length = SEQ - depth
        previous = previous[:, :length]
        ahead = model.embed_tokens.weight[ids[:, depth:]]
        by_embedding, by_hidden = module.eh_proj.weight.split(16, dim=1)  # released weights have the embedding first
        x = module.enorm(ahead) @ by_embedding.T + module.hnorm(previous) @ by_hidden.T
        x, _ = module.block(x, cos[:length], sin[:length])
        previous = module.norm(x)
        torch.testing.assert_close(state[:, :length], previous, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("changed", range(DEPTH, SEQ))
def test_position_t_of_depth_k_depends_on_tokens_up_to_t_plus_k_and_nothing_later(changed: int) -> None:
    model, ids = build(), tokens()
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1) % 29
    for depth, (before, after) in enumerate(zip(states_of(model, ids), states_of(model, other), strict=True), start=1):
        difference = (after - before).abs().amax(-1)[:, : SEQ - depth]
        first = changed - depth
        # rows may be summed in another order where routing changed
        assert (difference[:, :first] < 1e-12).all()
        assert (difference[:, first:] > 1e-6).all()


def test_the_label_of_every_counted_position_is_the_first_token_that_its_state_has_not_seen() -> None:
    row = torch.arange(SEQ + 1).expand(2, SEQ + 1)
    labels = row[:, 1:]
    for depth in range(1, DEPTH + 1):
        shifted = mtp_labels(labels, depth)
        for position in range(SEQ):
            expected = position + depth + 1 if position + depth < SEQ else IGNORE
            assert shifted[:, position].tolist() == [expected] * 2


def test_last_positions_that_wrap_round_reach_no_loss() -> None:
    model, ids = build(), tokens()
    labels = ids.roll(-1, 1)
    for depth, state in enumerate(states_of(model, ids), start=1):
        (gradient,) = torch.autograd.grad(
            next_token_loss(state, model.lm_head.weight, mtp_labels(labels, depth)), state, retain_graph=True
        )
        assert (gradient[:, SEQ - depth :] == 0).all()
        assert (gradient[:, : SEQ - depth].abs().amax(-1) > 0).all()


def test_documents_stay_apart_at_every_depth() -> None:
    model, ids = build(), tokens()
    segments = torch.tensor([[0] * 5 + [1] * 4]).expand(2, SEQ)
    together = model.mtp_hidden(ids, model(ids, segment_ids=segments), segment_ids=segments)
    unmasked = states_of(model, ids)
    for start, end in ((0, 5), (5, 9)):
        alone = states_of(model, ids[:, start:end])
        for depth in range(1, DEPTH + 1):
            inner = end - start - depth  # later positions look into the next document, or wrap round
            part = together[depth - 1][:, start : start + inner]
            # rotary tables are rounded to fp32
            torch.testing.assert_close(part, alone[depth - 1][:, :inner], rtol=1e-5, atol=1e-5)
    assert (unmasked[0] - together[0]).abs().amax(-1)[:, 5:].min() > 1e-3


def test_embedding_and_head_are_shared_and_learn_from_the_modules() -> None:
    model, ids = build(), tokens()
    assert not [name for name, _ in model.mtp.named_parameters() if "embed" in name or "head" in name]
    hidden = model(ids).detach()
    state = model.mtp_hidden(ids, hidden)[-1]
    next_token_loss(state, model.lm_head.weight, mtp_labels(ids, DEPTH)).backward()
    for weight in (model.embed_tokens.weight, model.lm_head.weight):
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.layers.parameters())


def test_the_loss_of_a_depth_reaches_the_main_model() -> None:
    model, ids = build(), tokens()
    states_of(model, ids)[-1].sum().backward()
    for name, parameter in model.layers[0].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_model_without_modules_predicts_one_token_ahead_alone() -> None:
    model = build(replace(CONFIG, num_nextn_predict_layers=0))
    assert states_of(model, tokens()) == []


def test_the_modules_change_nothing_in_the_main_model() -> None:
    model = build()
    plain = build(replace(CONFIG, num_nextn_predict_layers=0))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    assert torch.equal(model(tokens()), plain(tokens()))
