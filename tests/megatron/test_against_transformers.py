"""Losses and gradients of the whole model against transformers and plain autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import MakePolicy
from torch.nn.functional import logsigmoid

from nemo_selfpref.checkpoint.hf_weights import to_huggingface
from nemo_selfpref.data.packing import PackingRule, micro_batches
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import DPOObjective, Pass
from nemo_selfpref.types import PreferencePair

BETA = 0.1


def make_pairs() -> list[PreferencePair]:
    g = torch.Generator().manual_seed(3)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 480, (count,), generator=g).tolist())

    return [
        PreferencePair(str(i), tokens(4 + i), tokens(6 - i % 3), tokens(3 + i)) for i in range(5)
    ]


def response_logp(
    model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]
) -> torch.Tensor:
    ids = torch.tensor([prompt + answer])
    logps = model(ids).logits[0].float().log_softmax(-1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logps[places, ids[0, len(prompt) :]].sum()


@pytest.mark.parametrize("folder", ["llama_folder", "tied_folder"])
def test_dpo_loss_and_gradients(
    request: pytest.FixtureRequest, make_policy: MakePolicy, folder: str
) -> None:
    from transformers import AutoModelForCausalLM

    path: Path = request.getfixturevalue(folder)
    pairs = make_pairs()
    shift = torch.linspace(-3, 3, 10).split(5)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    chosen = torch.stack([response_logp(model, p.prompt_ids, p.chosen_ids) for p in pairs])
    rejected = torch.stack([response_logp(model, p.prompt_ids, p.rejected_ids) for p in pairs])
    reference = PassLogps(chosen.detach() + shift[0], rejected.detach() + shift[1])
    h = (chosen - reference.chosen) - (rejected - reference.rejected)
    loss = -logsigmoid(BETA * h).mean()
    loss.backward()

    policy = make_policy(path)
    batches = micro_batches(
        pairs, list(range(5)), replica=0, num_replicas=1, rule=PackingRule(2), paired=True
    )
    inputs = StepInputs(torch.ones(5), {Pass.REFERENCE: reference})
    metrics = policy.train_batch(batches, DPOObjective(BETA), inputs)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    want = {name: p.grad for name, p in model.named_parameters()}
    seen = set()
    for key, parameter in policy.module.named_parameters():
        key = key.replace("input_layernorm", "self_attention.linear_qkv.layer_norm")
        key = key.replace("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm")
        key = key.replace("layer_norm.weight", "layer_norm_weight")
        for name, gradient in to_huggingface(key, parameter.main_grad, policy.arch):
            torch.testing.assert_close(gradient, want[name], rtol=1e-3, atol=1e-5)
            seen.add(name)
    assert seen == want.keys()
