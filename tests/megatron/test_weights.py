from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saving import save_state
from tiny import MakePolicy, in_precision, scale
from torch import Tensor

from nemo_selfpref.checkpoint.sharded import ShardReader, load_state
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import collate
from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.types import WeightSet

POLICY, FROZEN, EMA, LAGGED = (WeightSet(n) for n in ("policy", "frozen", "ema", "lagged"))
SEQUENCES = [((5, 6, 7), (8, 9, 2)), ((5, 6), (8, 11, 12, 2)), ((30,), (40, 41, 2))]
PROJECTION = "decoder.layers.2.self_attention.linear_proj.weight"
GATED = "decoder.layers.1.mlp.linear_fc1.weight"


@torch.no_grad()
def write(policy: Policy, numbers: list[float], key: str = PROJECTION) -> None:
    """Put numbers at the head of a parameter, as an optimizer step of its own would."""
    policy.module.get_parameter(key).view(-1)[: len(numbers)] = torch.tensor(numbers)
    policy.weight_version += 1


def head(tensor: Tensor, count: int = 2) -> list[float]:
    return tensor.detach().reshape(-1)[:count].tolist()


def tensors_of(weights: WeightSets, name: WeightSet) -> dict[str, Tensor]:
    """The tensors of a copy by parameter name."""
    named = weights.policy.module.named_parameters()
    state = weights.sharded_state_dict(name)
    return {key: state[key].data for key, _ in named}


def snapshot(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.module.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal bit for bit, in type too."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


EMA_START = [1.0, -2.0]
THETAS = [[2.0, 0.0], [4.0, 4.0], [0.0, 1.0], [8.0, -4.0]]
"""The policy after each of four optimizer steps."""


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        # (1 + 2) / 2, (1.5 + 4) / 2, (2.75 + 0) / 2, (1.375 + 8) / 2
        (1, [[1.5, -1.0], [2.75, 1.5], [1.375, 1.25], [4.6875, -1.375]]),
        # (1 + 4) / 2 after the second step, (2.5 + 8) / 2 after the fourth
        (2, [[1.0, -2.0], [2.5, 1.0], [2.5, 1.0], [5.25, -1.5]]),
    ],
)
@pytest.mark.parametrize("key", [PROJECTION, GATED])
def test_the_moving_average(
    policy: Policy, key: str, every: int, expected: list[list[float]]
) -> None:
    weights = WeightSets(policy)
    write(policy, EMA_START, key)
    weights.take(EMA, POLICY)
    seen = []
    for done, theta in enumerate(THETAS, start=1):
        write(policy, theta, key)
        if done % every == 0:
            weights.average(alpha=0.5)
        seen.append(head(tensors_of(weights, EMA)[key]))
        assert head(policy.module.get_parameter(key)) == theta
    assert seen == expected


def test_alpha_is_the_share_of_the_old_average(policy: Policy) -> None:
    weights = WeightSets(policy)
    write(policy, [1.0, -2.0])
    weights.take(EMA, POLICY)
    write(policy, [2.0, 0.0])
    weights.average(alpha=0.75)
    # 0.75 * 1 + 0.25 * 2 and 0.75 * -2 + 0.25 * 0
    assert head(tensors_of(weights, EMA)[PROJECTION]) == [1.25, -1.5]


def test_every_weight_is_averaged(policy: Policy) -> None:
    before = snapshot(policy)
    weights = WeightSets(policy)
    weights.take(EMA, POLICY)
    scale(policy, 3.0)
    weights.average(alpha=0.5)
    for name, tensor in tensors_of(weights, EMA).items():
        torch.testing.assert_close(tensor, 2.0 * before[name])  # (1 + 3) / 2


def test_a_bf16_policy_is_averaged_from_its_float32_weights(
    policy: Policy, llama_folder: Path
) -> None:
    made = in_precision(policy, Precision.bf16, llama_folder)
    PolicyOptimizer(made, OptimConfig(lr=1e-3), 1.0)
    weights = WeightSets(made)
    write(made, [1.0, -2.0])
    weights.take(EMA, POLICY)
    main: Any = made.module.get_parameter(PROJECTION).main_param  # type: ignore[attr-defined]
    # bf16 has 8 bits: 1 + 2^-9 and -2 + 2^-9 would be 1 and -2 there.
    main.view(-1)[:2] = torch.tensor([1 + 2**-9, -2 + 2**-9])
    weights.average(alpha=0.5)
    assert head(tensors_of(weights, EMA)[PROJECTION]) == [1 + 2**-10, -2 + 2**-10]


def test_steps_too_small_for_bf16_reach_the_average(policy: Policy, llama_folder: Path) -> None:
    made = in_precision(policy, Precision.bf16, llama_folder)
    optimizer = PolicyOptimizer(made, OptimConfig(lr=1e-7), 1.0)
    weights = WeightSets(made)
    weights.take(EMA, POLICY)
    before = snapshot(made)
    train_a_step(optimizer)
    weights.average(alpha=0.5)
    ema = tensors_of(weights, EMA)[PROJECTION]
    assert torch.equal(before[PROJECTION], made.module.get_parameter(PROJECTION))
    assert 0 < float((ema - before[PROJECTION].float()).abs().max()) < 1e-7


def train_a_step(optimizer: PolicyOptimizer) -> float:
    batch = collate(SEQUENCES, [0, 1, 2], paired=False)
    metrics = optimizer.policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(3)))
    optimizer.step()
    return metrics["loss"]


@pytest.mark.parametrize("precision", list(Precision))
def test_the_average_is_float32_the_others_as_precise_as_the_policy(
    policy: Policy, precision: Precision, llama_folder: Path
) -> None:
    made = in_precision(policy, precision, llama_folder)
    weights = WeightSets(made)
    for name in (EMA, LAGGED, FROZEN):
        weights.take(name, POLICY)
    own = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    assert {t.dtype for t in tensors_of(weights, EMA).values()} == {torch.float32}
    assert {t.dtype for t in tensors_of(weights, LAGGED).values()} == {own}
    assert_same(tensors_of(weights, FROZEN), snapshot(made))


def test_a_copy_stays_when_the_policy_moves(policy: Policy) -> None:
    before = snapshot(policy)
    weights = WeightSets(policy)
    weights.take(LAGGED, POLICY)
    scale(policy, 1.5)
    assert_same(tensors_of(weights, LAGGED), before)
    weights.take(LAGGED, POLICY)
    assert_same(tensors_of(weights, LAGGED), snapshot(policy))


def test_the_average_taken_as_reference(policy: Policy, llama_folder: Path) -> None:
    made = in_precision(policy, Precision.bf16, llama_folder)
    weights = WeightSets(made)
    weights.take(EMA, POLICY)
    scale(made, 1.5)
    weights.average(alpha=0.5)
    weights.take(LAGGED, EMA)
    ema = tensors_of(weights, EMA)
    assert_same(tensors_of(weights, LAGGED), {name: t.bfloat16() for name, t in ema.items()})
    weights.average(alpha=0.5)
    assert not torch.equal(tensors_of(weights, EMA)[GATED], tensors_of(weights, LAGGED)[GATED])


@pytest.mark.parametrize("name", [EMA, LAGGED])
@pytest.mark.parametrize("precision", list(Precision))
def test_using_puts_a_copy_in_and_the_policy_back(
    policy: Policy, precision: Precision, name: WeightSet, llama_folder: Path
) -> None:
    made = in_precision(policy, precision, llama_folder)
    first = snapshot(made)
    weights = WeightSets(made)
    weights.take(name, POLICY)
    scale(made, 1.37)
    moved = snapshot(made)
    with weights.using(name):
        assert_same(snapshot(made), first)
    assert_same(snapshot(made), moved)
    with pytest.raises(KeyError, match="stop"), weights.using(name):
        raise KeyError("stop")
    assert_same(snapshot(made), moved)
    assert_same({n: t.to(first[n].dtype) for n, t in tensors_of(weights, name).items()}, first)


def test_a_float32_average_is_rounded_for_a_bf16_network(
    policy: Policy, llama_folder: Path
) -> None:
    made = in_precision(policy, Precision.bf16, llama_folder)
    weights = WeightSets(made)
    weights.take(EMA, POLICY)
    scale(made, 1.01)
    weights.average(alpha=0.5)
    ema = {name: t.clone() for name, t in tensors_of(weights, EMA).items()}
    with weights.using(EMA):
        assert_same(snapshot(made), {name: t.bfloat16() for name, t in ema.items()})
    assert_same(tensors_of(weights, EMA), ema)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in ema.values())


def test_using_the_policy_changes_nothing(policy: Policy) -> None:
    before = snapshot(policy)
    policy.weight_version = 5
    with WeightSets(policy).using(POLICY) as version:
        assert_same(snapshot(policy), before)
    assert version == 5


@pytest.mark.parametrize("folder", ["llama_folder", "tied_folder"])
def test_scores_under_a_copy_are_those_of_a_policy_that_holds_it(
    request: pytest.FixtureRequest, make_policy: MakePolicy, folder: str
) -> None:
    path = request.getfixturevalue(folder)
    policy = make_policy(path)
    first = policy.score(SEQUENCES).sums
    weights = WeightSets(policy)
    weights.take(EMA, POLICY)
    weights.take(FROZEN, POLICY)
    scale(policy, 1.5)
    weights.average(alpha=0.5)
    averaged = make_policy(path)
    scale(averaged, 1.25)  # (1 + 1.5) / 2, exact in float32
    with weights.using(FROZEN):
        assert torch.equal(policy.score(SEQUENCES).sums, first)
    with weights.using(EMA):
        scored = policy.score(SEQUENCES).sums
    torch.testing.assert_close(scored, averaged.score(SEQUENCES).sums, rtol=0, atol=1e-4)
    assert float((scored - first).abs().max()) > 0.1


@pytest.mark.parametrize("precision", list(Precision))
def test_training_does_not_notice(policy: Policy, precision: Precision, llama_folder: Path) -> None:
    straight = PolicyOptimizer(
        in_precision(policy, precision, llama_folder), OptimConfig(lr=1e-3), 1.0
    )
    other = PolicyOptimizer(
        in_precision(policy, precision, llama_folder), OptimConfig(lr=1e-3), 1.0
    )
    weights = WeightSets(other.policy)
    weights.take(EMA, POLICY)
    losses = []
    for _ in range(2):
        losses.append((train_a_step(straight), train_a_step(other)))
        weights.average(alpha=0.5)
        with weights.using(EMA):
            other.policy.score(SEQUENCES)
    assert_same(snapshot(other.policy), snapshot(straight.policy))
    assert all(a == b for a, b in losses) and losses[0] != losses[1]


def test_versions(policy: Policy) -> None:
    weights = WeightSets(policy)
    policy.weight_version = 3
    weights.take(EMA, POLICY)
    weights.take(FROZEN, POLICY)
    scale(policy, 1.1)
    scale(policy, 1.1)
    assert [weights.version(n) for n in (POLICY, FROZEN, EMA)] == [5, 3, 3]
    weights.average(alpha=0.5)
    scale(policy, 1.1)
    weights.take(LAGGED, EMA)
    assert [weights.version(n) for n in (POLICY, FROZEN, EMA, LAGGED)] == [6, 3, 5, 5]
    with weights.using(LAGGED) as version:
        assert version == 5


def test_what_is_held(policy: Policy) -> None:
    weights = WeightSets(policy)
    assert POLICY in weights and EMA not in weights and weights.held() == []
    weights.take(LAGGED, POLICY)
    weights.take(EMA, POLICY)
    assert weights.held() == [EMA, LAGGED]
    weights.drop(EMA)
    weights.drop(FROZEN)  # nothing to drop
    assert weights.held() == [LAGGED] and EMA not in weights


def test_a_copy_that_is_not_there_is_refused(policy: Policy) -> None:
    weights = WeightSets(policy)
    weights.take(LAGGED, POLICY)
    before = snapshot(policy)
    message = "no ema weights are held here; there are policy, lagged"
    with pytest.raises(RolloutError, match=message), weights.using(EMA):
        raise AssertionError("the block must not run")
    assert_same(snapshot(policy), before)


@pytest.mark.parametrize("folder", ["llama_folder", "tied_folder"])
@pytest.mark.parametrize("precision", list(Precision))
def test_an_average_is_saved_and_read_bit_for_bit(
    request: pytest.FixtureRequest,
    make_policy: MakePolicy,
    precision: Precision,
    folder: str,
    tmp_path: Path,
) -> None:
    path = request.getfixturevalue(folder)
    policy = in_precision(make_policy(path), precision, path)
    weights = WeightSets(policy)
    weights.take(EMA, POLICY)
    scale(policy, 1.01)
    weights.average(alpha=0.3)
    saved = {name: t.clone() for name, t in tensors_of(weights, EMA).items()}
    save_state(tmp_path, weights.sharded_state_dict(EMA))
    assert_same(tensors_of(weights, EMA), saved)  # saving consumes the state dict, not the copy

    other = in_precision(make_policy(path), precision, path)
    before = snapshot(other)
    read = WeightSets(other)
    read.fill(EMA, lambda state: load_state(ShardReader(tmp_path), state), version=9)
    assert_same(tensors_of(read, EMA), saved)
    assert_same(snapshot(other), before)
    assert read.version(EMA) == 9 and other.weight_version == 0
    assert {t.dtype for t in saved.values()} == {torch.float32}


@pytest.mark.parametrize("folder", ["llama_folder", "tied_folder"])
def test_a_copy_is_stored_as_the_policy_is(
    request: pytest.FixtureRequest, make_policy: MakePolicy, folder: str, tmp_path: Path
) -> None:
    policy = make_policy(request.getfixturevalue(folder))
    weights = WeightSets(policy)
    weights.take(LAGGED, POLICY)
    save_state(tmp_path / "policy", policy.sharded_state_dict())
    save_state(tmp_path / "copy", weights.sharded_state_dict(LAGGED))
    ours, theirs = ShardReader(tmp_path / "copy"), ShardReader(tmp_path / "policy")
    assert ours.names() == theirs.names()
    assert ("output_layer.weight" in ours.names()) is (folder == "llama_folder")
    for key in ours.names():
        shape = theirs.global_shape(key)
        assert ours.global_shape(key) == shape
        zero = (0,) * len(shape)
        assert torch.equal(ours.read(key, zero, shape), theirs.read(key, zero, shape)), key


def test_a_copy_held_before_is_overwritten(policy: Policy, tmp_path: Path) -> None:
    weights = WeightSets(policy)
    weights.take(FROZEN, POLICY)
    first = snapshot(policy)
    save_state(tmp_path, weights.sharded_state_dict(FROZEN))
    scale(policy, 1.5)
    weights.take(FROZEN, POLICY)
    weights.fill(FROZEN, lambda state: load_state(ShardReader(tmp_path), state), version=0)
    assert_same(tensors_of(weights, FROZEN), first)
    assert weights.version(FROZEN) == 0
