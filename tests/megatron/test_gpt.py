from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakePolicy
from torch import Tensor

from nemo_selfpref.config.model_schema import ArchitectureConfig, RopeScalingConfig
from nemo_selfpref.megatron.attention_layout import packed_attention
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.gpt import padded_vocab_size, rope_frequencies
from nemo_selfpref.megatron.policy import Policy

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def huggingface_frequencies(dim: int, theta: float, rope: dict[str, Any]) -> Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": theta, **rope},
    )
    return LlamaRotaryEmbedding(config).inv_freq


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, LLAMA3],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_frequencies_are_those_of_transformers(
    dim: int, theta: float, rope: dict[str, Any]
) -> None:
    arch = ArchitectureConfig(
        kv_channels=dim, rotary_base=theta, rope_scaling=RopeScalingConfig(**rope)
    )
    want = huggingface_frequencies(dim, theta, rope)
    torch.testing.assert_close(rope_frequencies(arch), want, rtol=1e-6, atol=0)


def test_rope_frequencies_by_hand() -> None:
    # 100^(-0/4) = 1 and 100^(-2/4) = 0.1.
    arch = ArchitectureConfig(kv_channels=4, rotary_base=100.0)
    assert rope_frequencies(arch).tolist() == pytest.approx([1.0, 0.1])
    arch.rope_scaling = RopeScalingConfig(rope_type="linear", factor=5.0)
    assert rope_frequencies(arch).tolist() == pytest.approx([0.2, 0.02])


def test_llama3_frequencies_by_hand() -> None:
    # Wavelengths 2 pi / f: 6.28, 28.1, 125.7 positions, of 64. Above 64 / 1 the frequency is
    # divided by the factor 8, below 64 / 4 it stays, between the two it blends:
    # s = (64 / 28.0993 - 1) / 3 = 0.425881, f = (1 - s) f / 8 + s f with f = 0.223607.
    arch = ArchitectureConfig(
        kv_channels=6, rotary_base=math.sqrt(20.0) ** 3, rope_scaling=RopeScalingConfig(**LLAMA3)
    )
    plain = [1.0, 0.2236068, 0.05]
    assert rope_frequencies(arch).tolist() == pytest.approx(
        [plain[0], 0.574119 * plain[1] / 8 + 0.425881 * plain[1], plain[2] / 8], rel=1e-5
    )


def test_padded_vocab_size() -> None:
    # Alone nothing is padded; split, each rank gets a multiple of 128 rows.
    assert padded_vocab_size(500, 1) == 500
    assert padded_vocab_size(500, 2) == 512
    assert padded_vocab_size(512, 2) == 512
    assert padded_vocab_size(513, 2) == 768
    assert padded_vocab_size(32000, 8) == 32768


def hidden_states(policy: Policy, sequences: list[list[int]]) -> Tensor:
    tokens = torch.tensor([t for s in sequences for t in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    layout = packed_attention(tuple(map(len, sequences)), CPU)
    with torch.no_grad(), device_scope():
        return policy.module.run(tokens, positions, layout)[:, 0]


def random_sequences(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(500, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("lengths", [(1,), (1, 40, 2, 39), (9, 9, 8), (17, 3, 1, 1)], ids=str)
def test_packed_hidden_states_equal_one_at_a_time(policy: Policy, lengths: tuple[int, ...]) -> None:
    sequences = random_sequences(lengths)
    alone = torch.cat([hidden_states(policy, [s]) for s in sequences])
    torch.testing.assert_close(hidden_states(policy, sequences), alone, rtol=1e-5, atol=1e-5)


def test_a_token_sees_only_its_own_past(policy: Policy) -> None:
    first, second = random_sequences((6, 7))
    before = hidden_states(policy, [first, second])
    changed = hidden_states(policy, [[*first[:3], 7, *first[4:]], second])
    same = [0, 1, 2, 6, 7, 8, 9, 10, 11, 12]
    torch.testing.assert_close(changed[same], before[same], rtol=1e-6, atol=1e-6)
    assert (changed[3:6] - before[3:6]).abs().amax(-1).min() > 1e-3


def test_output_weight(policy: Policy, make_policy: MakePolicy, tied_folder: Path) -> None:
    assert policy.module.output_weight().shape == (500, 64)
    assert policy.module.vocab_start == 0 and policy.module.valid_vocab == 500
    tied = make_policy(tied_folder).module
    assert tied.output_weight().data_ptr() == tied.embedding.word_embeddings.weight.data_ptr()


def test_split_weights_are_marked_and_norms_are_not(policy: Policy) -> None:
    axes = {
        name: getattr(p, "partition_dim", None)
        for name, p in policy.module.named_parameters()
        if getattr(p, "tensor_model_parallel", False)
    }
    layer = "decoder.layers.0."
    assert axes["embedding.word_embeddings.weight"] == 0
    assert axes["output_layer.weight"] == 0
    assert axes[layer + "self_attention.linear_qkv.weight"] == 0
    assert axes[layer + "self_attention.linear_proj.weight"] == 1
    assert axes[layer + "mlp.linear_fc1.weight"] == 0
    assert axes[layer + "mlp.linear_fc2.weight"] == 1
    assert len(axes) == 2 + 4 * 4
