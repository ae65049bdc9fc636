"""Adapters change nothing at first, are all that trains, and are all that a copy holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saving import save_state
from tiny import MakePolicy, in_precision, with_adapters
from torch import Tensor
from torch.nn.functional import linear

from nemo_selfpref.checkpoint.sharded import ShardReader, load_state
from nemo_selfpref.checkpoint.verify import policy_logits
from nemo_selfpref.config.model_schema import LoRAConfig, OptimConfig, OptimizerName, Recompute
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import collate
from nemo_selfpref.megatron.lora import is_adapter
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.types import WeightSet

LORA = LoRAConfig(rank=4, alpha=8.0)
TARGETS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}
SEQUENCES = [((5, 6, 7), (8, 9, 2)), ((5, 6), (8, 11, 12, 2)), ((30,), (40, 41, 2))]
PROMPTS = [(5, 6, 7), (30, 31), (9,) * 20]
# Of four layers: (in + out) x rank, for qkv, proj, gate and up, down.
ADAPTER_SIZE = 4 * 4 * ((64 + 128) + (64 + 64) + (64 + 192) + (96 + 64))


@pytest.fixture
def adapted(llama_folder: Path) -> Policy:
    return with_adapters(llama_folder, LORA)


def logits(policy: Policy) -> Tensor:
    found = policy_logits(policy, PROMPTS)
    assert found is not None
    return found


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of one batch, for every weight that has one."""
    batch = collate(SEQUENCES, [0, 1, 2], paired=False)
    policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(3)))
    named = policy.module.named_parameters()
    return {name: p.main_grad.clone() for name, p in named if hasattr(p, "main_grad")}


def train(policy: Policy, steps: int = 2, **optim: object) -> PolicyOptimizer:
    optimizer = PolicyOptimizer(policy, OptimConfig(**{"lr": 1e-2, **optim}), 1.0)  # type: ignore[arg-type]
    for _ in range(steps):
        gradients(policy)
        optimizer.step()
    return optimizer


def snapshot(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.module.named_parameters()}


@pytest.mark.parametrize("folder", ["llama_folder", "tied_folder"])
@pytest.mark.parametrize("precision", list(Precision))
def test_the_first_policy_is_the_base_exactly(
    request: pytest.FixtureRequest, make_policy: MakePolicy, folder: str, precision: Precision
) -> None:
    path = request.getfixturevalue(folder)
    base = in_precision(make_policy(path), precision, path)
    first = with_adapters(path, LORA)
    if precision is Precision.bf16:
        kept = first.module.state_dict()
        first = Policy(first.arch, first.config, precision, first.platform, first.layout)
        first.module.load_state_dict(kept)
    assert torch.equal(logits(first), logits(base))
    assert torch.equal(first.score(SEQUENCES).sums, base.score(SEQUENCES).sums)


@pytest.mark.parametrize("target", TARGETS)
def test_one_layer_against_literal_torch(adapted: Policy, target: str) -> None:
    layer = adapted.module.get_submodule(f"decoder.layers.1.{TARGETS[target]}")
    torch.nn.init.normal_(layer.lora_b)  # type: ignore[arg-type]
    x = torch.randn(7, 1, layer.weight.shape[1], requires_grad=True)  # type: ignore[union-attr]
    upstream = torch.randn(7, 1, layer.weight.shape[0])  # type: ignore[union-attr]
    output, bias = layer(x)
    assert bias is None
    got = torch.autograd.grad((output * upstream).sum(), [x, layer.lora_a, layer.lora_b])

    w, a, b = (p.detach().clone() for p in (layer.weight, layer.lora_a, layer.lora_b))
    a.requires_grad, b.requires_grad = True, True
    assert a.shape == (4, w.shape[1]) and b.shape == (w.shape[0], 4)
    literal = linear(x, w) + 8.0 / 4 * linear(linear(x, a), b)
    torch.testing.assert_close(output, literal, rtol=1e-5, atol=1e-5)
    want = torch.autograd.grad((literal * upstream).sum(), [x, a, b])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(OptimizerName))
def test_only_the_adapters_train(adapted: Policy, name: OptimizerName) -> None:
    before = snapshot(adapted)
    optimizer = train(adapted, steps=2, name=name)
    found = gradients(adapted)
    trained = {n for n in before if is_adapter(n)}
    assert len(trained) == 4 * 4 * 2
    assert found.keys() == trained
    assert all(float(g.abs().max()) > 0 for g in found.values())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == ADAPTER_SIZE
    assert sum(b.numel for b in adapted.ddp[0].buffers) == ADAPTER_SIZE
    after = snapshot(adapted)
    assert {n for n in before if not torch.equal(before[n], after[n])} == trained


def test_only_the_targets_have_adapters(llama_folder: Path) -> None:
    policy = with_adapters(llama_folder, LoRAConfig(rank=2, target_modules=["linear_fc2"]))
    trained = [n for n, p in policy.module.named_parameters() if p.requires_grad]
    assert trained == [
        f"decoder.layers.{i}.mlp.linear_fc2.lora_{m}" for i in range(4) for m in "ab"
    ]
    assert gradients(policy).keys() == set(trained)


@pytest.mark.parametrize("targets", [list(TARGETS), ["linear_fc2"]], ids=len)
def test_gradients_with_layers_computed_again(llama_folder: Path, targets: list[str]) -> None:
    lora = LoRAConfig(rank=4, alpha=8.0, target_modules=targets)
    plain = with_adapters(llama_folder, lora)
    again = with_adapters(llama_folder, lora, recompute_granularity=Recompute.full)
    want, got = gradients(plain), gradients(again)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
    assert any(float(g.abs().max()) > 0 for g in got.values())


def test_the_split_adapters_are_marked(adapted: Policy) -> None:
    axes = {
        name.removeprefix("decoder.layers.0."): p.partition_dim  # type: ignore[attr-defined]
        for name, p in adapted.module.named_parameters()
        if name.startswith("decoder.layers.0.") and getattr(p, "tensor_model_parallel", False)
    }
    assert axes == {
        "self_attention.linear_qkv.weight": 0,
        "self_attention.linear_qkv.lora_b": 0,
        "self_attention.linear_proj.weight": 1,
        "self_attention.linear_proj.lora_a": 1,
        "mlp.linear_fc1.weight": 0,
        "mlp.linear_fc1.lora_b": 0,
        "mlp.linear_fc2.weight": 1,
        "mlp.linear_fc2.lora_a": 1,
    }


def test_a_frozen_copy_holds_only_adapters(adapted: Policy, policy: Policy, tmp_path: Path) -> None:
    weights = WeightSets(adapted)
    weights.take(WeightSet.FROZEN, WeightSet.POLICY)
    tensors = [v.data for v in weights.sharded_state_dict(WeightSet.FROZEN).values()]
    assert sum(t.numel() for t in tensors if t is not None) == ADAPTER_SIZE
    train(adapted)
    assert not torch.equal(logits(adapted), logits(policy))
    after = snapshot(adapted)
    with weights.using(WeightSet.FROZEN) as version:
        assert version == 0 and torch.equal(logits(adapted), logits(policy))
    assert all(torch.equal(p, after[name]) for name, p in adapted.module.named_parameters())

    save_state(tmp_path, weights.sharded_state_dict(WeightSet.FROZEN))
    reader = ShardReader(tmp_path)
    assert all(is_adapter(name) for name in reader.names()) and len(reader.names()) == 4 * 4 * 2
    other = WeightSets(adapted)
    other.fill(WeightSet.FROZEN, lambda state: load_state(reader, state), version=5)
    with other.using(WeightSet.FROZEN) as version:
        assert version == 5 and torch.equal(logits(adapted), logits(policy))


def test_an_average_of_adapters(adapted: Policy) -> None:
    weights = WeightSets(adapted)
    first = snapshot(adapted)
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    train(adapted)
    weights.average(alpha=0.25)
    state = weights.sharded_state_dict(WeightSet.EMA)
    for name, p in adapted.module.named_parameters():
        if is_adapter(name):
            torch.testing.assert_close(state[name].data, 0.25 * first[name] + 0.75 * p.detach())
