"""What is streamed out of the shards is, bit for bit, what an export holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MakePolicy, in_precision, save_llama, scale, with_adapters
from torch import Tensor

from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.training_state import fill_policy, save_weights
from nemo_selfpref.checkpoint.weight_stream import read_to_end, stream_weights
from nemo_selfpref.config.model_schema import LoRAConfig
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.lora import is_adapter
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.types import WeightSet

COPIES = (WeightSet.FROZEN, WeightSet.LAGGED, WeightSet.EMA)
Tensors = dict[str, Tensor]


def exported(policy: Policy, tokenizer: ChatTokenizer, folder: Path) -> Tensors:
    """The tensors of the policy's export."""
    save_weights(folder / "checkpoint", policy, tokenizer)
    export_checkpoint(folder / "checkpoint", folder / "hf")
    return load_file(folder / "hf" / "model.safetensors")


def streamed(policy: Policy, dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: t.clone() for name, t in stream_weights(policy, dtype)}


def copied(weights: WeightSets, name: WeightSet, dtype: torch.dtype = torch.float32) -> Tensors:
    state = weights.sharded_state_dict(name)
    return {n: t.clone() for n, t in stream_weights(weights.policy, dtype, state)}


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.fixture(params=["untied", "tied", "odd", "bf16", "adapters"])
def any_policy(
    request: pytest.FixtureRequest,
    make_policy: MakePolicy,
    llama_folder: Path,
    tied_folder: Path,
    tmp_path: Path,
) -> Iterator[Policy]:
    kind = request.param
    if kind == "tied":
        yield make_policy(tied_folder)
    elif kind == "odd":
        yield make_policy(save_llama(tmp_path / "odd", vocab_size=501))
    elif kind == "bf16":
        yield in_precision(make_policy(llama_folder), Precision.bf16, llama_folder)
    elif kind == "adapters":
        policy = with_adapters(llama_folder, LoRAConfig(rank=4, alpha=8.0))
        move_adapters(policy)
        yield policy
    else:
        yield make_policy(llama_folder)


@torch.no_grad()
def move_adapters(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.module.named_parameters():
        if is_adapter(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def own_type(policy: Policy) -> torch.dtype:
    return next(policy.module.parameters()).dtype


def test_the_stream_is_the_export(
    any_policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    before = exported(any_policy, tokenizer, tmp_path)
    assert_same(streamed(any_policy, own_type(any_policy)), before)
    assert ("lm_head.weight" in before) is not any_policy.arch.share_embeddings_and_output_weights


def test_a_copy_is_what_the_network_would_hold(
    any_policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """Of an EMA too, which is float32 beside a bf16 policy; adapters are merged into the base."""
    weights, dtype = WeightSets(any_policy), own_type(any_policy)
    for name in COPIES:
        weights.take(name, WeightSet.POLICY)
    start = streamed(any_policy, dtype)
    scale(any_policy, 1.7)
    weights.average(alpha=0.3)
    weights.take(WeightSet.LAGGED, WeightSet.EMA)
    after = streamed(any_policy, dtype)
    seen = []
    for name in COPIES:
        found = copied(weights, name, dtype)
        with weights.using(name):
            assert_same(found, exported(any_policy, tokenizer, tmp_path / name.value))
        seen.append(found)
    assert_same(streamed(any_policy, dtype), after)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(seen[0][name], seen[2][name])
    assert not torch.equal(after[name], seen[2][name])
    if own_type(any_policy) is torch.float32 and not any_policy.config.lora.rank:
        assert_same(seen[0], start)


def test_another_type(policy: Policy) -> None:
    full = streamed(policy)
    assert_same(streamed(policy, torch.bfloat16), {n: t.bfloat16() for n, t in full.items()})


def test_copies_on_the_cpu(policy: Policy, llama_folder: Path) -> None:
    away = in_precision(policy, Precision.fp32, llama_folder, copies_on_cpu=True)
    weights = WeightSets(away)
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    scale(away)
    assert_same(copied(weights, WeightSet.EMA), streamed(policy))


def test_nothing_is_copied_that_need_not_be(policy: Policy) -> None:
    """A weight that is one and the same on both sides comes as itself."""
    pointers = {p.data_ptr() for p in policy.module.parameters()}
    shared = {n for n, t in stream_weights(policy, torch.float32) if t.data_ptr() in pointers}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= shared
    assert "model.layers.0.mlp.gate_proj.weight" in shared


def test_a_second_stream_sees_new_values(policy: Policy) -> None:
    first = streamed(policy)
    scale(policy, 2.0)
    assert_same(streamed(policy), {name: t * 2 for name, t in first.items()})


def test_what_an_error_leaves_is_read(policy: Policy) -> None:
    stream = stream_weights(policy, torch.float32)
    with pytest.raises(ZeroDivisionError), read_to_end(stream):
        next(stream)
        raise ZeroDivisionError
    assert next(stream, None) is None


def test_a_part_that_is_missing_is_seen(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = policy.sharded_state_dict

    def without_norm() -> dict:
        state = whole()
        del state["decoder.final_layernorm.weight"]
        return state

    monkeypatch.setattr(policy, "sharded_state_dict", without_norm)
    with pytest.raises(CheckpointError, match=r"hold 0 values of decoder\.final_layernorm"):
        next(stream_weights(policy, torch.float32))


def test_random_weights_can_be_streamed(policy: Policy) -> None:
    fill_policy(policy, RandomSource(policy.arch, 5))
    norm = streamed(policy)["model.norm.weight"]
    assert torch.equal(norm, torch.ones(64))
