"""Every model family computes what transformers computes, goes out as it came in, and a mistake in
its conversion is seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import LLAMA3_ROPE, MODELS, family_policy, save_family
from torch import Tensor

from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.families import FAMILIES, family_of
from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource, RandomSource
from nemo_selfpref.checkpoint.training_state import load_weights, save_weights
from nemo_selfpref.checkpoint.verify import compare, hf_logits, policy_logits, verify_export
from nemo_selfpref.checkpoint.weight_stream import stream_weights
from nemo_selfpref.config.model_schema import ArchitectureConfig, LoRAConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError, ConfigError

PROMPTS = [(5, 6, 7), (30, 31), (9,) * 20, tuple(range(40, 90)), tuple(range(3, 203))]
Tensors = dict[str, Tensor]
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a family's tiny model, made when first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def export_of(folder: Path, out: Path, tokenizer: ChatTokenizer) -> Path:
    save_weights(out / "checkpoint", family_policy(folder), tokenizer)
    export_checkpoint(out / "checkpoint", out / "hf")
    return out / "hf"


def test_there_is_a_tiny_model_of_every_family() -> None:
    assert {tiny.model_type for tiny in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_comes_in_and_goes_out_exactly(
    name: str, folders: Folders, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """Logits of the folder that came, and of the one that went; every tensor, bit for bit, in the
    export, in the stream to rollout engines and in what a run reads back."""
    folder = folders(name)
    policy = family_policy(folder)
    ours = policy_logits(policy, PROMPTS)
    assert ours is not None
    compare(ours, hf_logits(folder, PROMPTS)).check(1e-4, folder)
    out = export_of(folder, tmp_path, tokenizer)
    verify_export(policy, tokenizer, out)
    compare(ours, hf_logits(out, PROMPTS)).check(1e-4, out)
    before = load_file(folder / "model.safetensors")
    streamed = dict(stream_weights(policy, torch.float32))
    for after in (load_file(out / "model.safetensors"), streamed):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_architecture(out) == read_architecture(folder) == policy.arch
    again = family_policy(out)
    load_weights(tmp_path / "checkpoint", again)
    for ours_, theirs in zip(policy.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(ours_, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_what_an_export_says(
    name: str, folders: Folders, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """Both spellings of what transformers 4 and 5 call differently, and what generation needs."""
    out = export_of(folders(name), tmp_path, tokenizer)
    config = json.loads((out / "config.json").read_text())
    family = FAMILIES[MODELS[name].model_type]
    assert config["architectures"] == [family.class_name]
    assert config["model_type"] == family.model_type
    rope = config["rope_parameters"]
    assert rope["rope_theta"] == config["rope_theta"]
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    assert (config["rope_scaling"] or {"rope_type": "default"}) == scaling
    assert config["dtype"] == config["torch_dtype"] == "float32"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == sorted(tokenizer.stop_ids)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (out / "chat_template.jinja").read_text()
    assert "<|im_start|>" in settings["chat_template"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.iterdir())


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_adapters_beside_the_parts_of_a_family(
    name: str, folders: Folders, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    """Fresh ones change nothing; moved ones are merged into an export that computes the same."""
    folder = folders(name)
    policy = family_policy(folder, lora=LoRAConfig(rank=4))
    fresh = policy_logits(policy, PROMPTS)
    assert fresh is not None
    compare(fresh, hf_logits(folder, PROMPTS)).check(1e-4, folder)
    trained = {n for n, p in policy.module.named_parameters() if p.requires_grad}
    assert trained and all(n.endswith(("lora_a", "lora_b")) for n in trained)
    with torch.no_grad():
        for key, parameter in policy.module.named_parameters():
            if key.endswith("lora_b"):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    verify_export(policy, tokenizer, tmp_path / "hf")
    moved = policy_logits(policy, PROMPTS)
    assert moved is not None and compare(moved, fresh).max_difference > 0.01
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    streamed = dict(stream_weights(policy, torch.float32))
    assert all(torch.equal(exported[key], streamed[key]) for key in exported)


def layers(tensors: Tensors, ending: str) -> list[str]:
    found = [name for name in tensors if name.endswith(ending)]
    assert found, ending
    return found


def swap(tensors: Tensors, one: str, other: str) -> None:
    for name in layers(tensors, one):
        twin = name.removesuffix(one) + other
        tensors[name], tensors[twin] = tensors[twin], tensors[name]


def drop_bias(tensors: Tensors, config: dict[str, Any]) -> None:
    for name in layers(tensors, "q_proj.bias"):
        tensors[name] = torch.zeros_like(tensors[name])


def own_head(tensors: Tensors, config: dict[str, Any]) -> None:
    """As if there were no tying: the head is a matrix of its own."""
    config["tie_word_embeddings"] = False
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def wrong_base(tensors: Tensors, config: dict[str, Any]) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = config["rope_theta"] / 50


def wrong_eps(tensors: Tensors, config: dict[str, Any]) -> None:
    config["rms_norm_eps"] = 1e-2


def no_scaling(tensors: Tensors, config: dict[str, Any]) -> None:
    config["rope_scaling"] = None
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}


def unlike_weights(tensors: Tensors, config: dict[str, Any]) -> None:
    config["norm_topk_prob"] = not config["norm_topk_prob"]


def transposed_expert(tensors: Tensors, config: dict[str, Any]) -> None:
    """One whose matrix has as many rows as columns when read the wrong way round."""
    for name in layers(tensors, "experts.1.down_proj.weight"):
        tensors[name] = tensors[name].T.reshape(tensors[name].shape).contiguous()


Mutant = Callable[[Tensors, dict[str, Any]], None]
MUTANTS: dict[str, tuple[str, Mutant]] = {
    "q and k swapped": (
        "llama2",
        lambda tensors, _: swap(tensors, "q_proj.weight", "k_proj.weight"),
    ),
    "q and k norms swapped": (
        "qwen3",
        lambda tensors, _: swap(tensors, "q_norm.weight", "k_norm.weight"),
    ),
    "layer norms swapped": (
        "mistral",
        lambda tensors, _: swap(
            tensors, "input_layernorm.weight", "post_attention_layernorm.weight"
        ),
    ),
    "bias missing": ("qwen2", drop_bias),
    "biases of q and k swapped": (
        "qwen2_mha",
        lambda tensors, _: swap(tensors, "q_proj.bias", "k_proj.bias"),
    ),
    "rope base": ("llama3", wrong_base),
    "rope scaling lost": ("llama3_1", no_scaling),
    "tied head ignored": ("qwen2_tied", own_head),
    "gate and up swapped": (
        "qwen3",
        lambda tensors, _: swap(tensors, "gate_proj.weight", "up_proj.weight"),
    ),
    "gate and up of experts swapped": (
        "mixtral",
        lambda tensors, _: swap(tensors, ".w1.weight", ".w3.weight"),
    ),
    "eps": ("qwen2", wrong_eps),
    "expert transposed": ("qwen3_moe", transposed_expert),
    "weights of experts": ("qwen3_moe", unlike_weights),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_in_a_conversion_is_seen(
    mutant: str, tokenizer: ChatTokenizer, tmp_path: Path, folders: Folders
) -> None:
    name, damage = MUTANTS[mutant]
    if name == "qwen2_mha":  # biases of equal length
        folder = save_family(tmp_path / "model", "qwen2", num_key_value_heads=4)
    else:
        folder = folders(name)
    policy = family_policy(folder)
    out = export_of(folder, tmp_path, tokenizer)
    verify_export(policy, tokenizer, out)
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    damage(tensors, config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="Do not use this folder"):
        verify_export(policy, tokenizer, out)


QWEN3_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}


def read(folder: Path, model_type: str, **changes: Any) -> ArchitectureConfig:
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "max_position_embeddings": 256,
        **(QWEN3_MOE if model_type == "qwen3_moe" else {}),
        **({"sliding_window": None} if model_type == "mistral" else {}),
    }
    left = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(left))
    return read_architecture(folder)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window=128 with max_position_embeddings=256"),
        (
            "mistral",
            {"sliding_window": ..., "max_position_embeddings": 8192},
            "sliding_window=4096",
        ),
        ("llama", {"sliding_window": 128}, "sliding_window=128"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128}, "sliding_window=128"),
        ("qwen3", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; expected true or"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has sliding",
        ),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types has linear_attention"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True; only False is supported"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True; only False is supported"),
        ("qwen2", {"qk_norm": True}, "qk_norm=True; only False is supported"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("qwen2", {"rope_scaling": {"mrope_section": [4, 2]}}, r"mrope_section=\[4, 2\] of the"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2; only 1 is supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]; only \[\] is supported"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts=8, num_local_experts=4; expected one"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
        ("qwen2_moe", {}, "model_type is 'qwen2_moe'; supported: llama"),
    ],
)
def test_what_would_be_another_network_is_refused_by_name(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    read(tmp_path, model_type if model_type in FAMILIES else "llama")
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read(tmp_path, model_type, **changes)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("mistral", {"sliding_window": 256}),
        ("mistral", {"sliding_window": ...}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4096}),
        ("qwen2", {"layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_a_window_that_no_text_is_longer_than_is_none(
    tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    assert read(tmp_path, model_type, **changes) == read(tmp_path, model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_leaves_out_is_what_transformers_takes(
    tmp_path: Path, model_type: str
) -> None:
    from transformers import AutoConfig

    out = dict.fromkeys(("num_key_value_heads", "max_position_embeddings", *QWEN3_MOE), ...)
    window = {"sliding_window": None} if model_type == "mistral" else {}
    many = {"num_attention_heads": 32, "hidden_size": 512}
    arch = read(tmp_path, model_type, **{**out, **window, **many})
    theirs: Any = AutoConfig.from_pretrained(tmp_path)
    assert arch.num_query_groups == theirs.num_key_value_heads
    assert arch.max_position_embeddings == theirs.max_position_embeddings
    assert arch.layernorm_epsilon == theirs.rms_norm_eps
    assert arch.rotary_base == theirs.rope_parameters["rope_theta"]
    assert arch.share_embeddings_and_output_weights == theirs.tie_word_embeddings
    assert arch.kv_channels == (getattr(theirs, "head_dim", None) or 16)
    if arch.num_moe_experts:
        assert arch.num_moe_experts == theirs.num_experts
        assert arch.moe_router_topk == theirs.num_experts_per_tok
        assert arch.moe_router_pre_softmax != getattr(theirs, "norm_topk_prob", True)


def test_a_family_is_known_by_its_parts() -> None:
    assert family_of(ArchitectureConfig()).model_type == "llama"
    assert family_of(ArchitectureConfig(family="mistral")).model_type == "mistral"
    assert family_of(ArchitectureConfig(num_moe_experts=4)).model_type == "mixtral"
    assert family_of(ArchitectureConfig(add_qkv_bias=True)).model_type == "qwen2"
    assert family_of(ArchitectureConfig(qk_layernorm=True)).model_type == "qwen3"


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (ArchitectureConfig(add_qkv_bias=True, qk_layernorm=True), "qk_layernorm=True.* none of"),
        (ArchitectureConfig(num_moe_experts=4, moe_router_pre_softmax=True), "none of the Hugging"),
        (ArchitectureConfig(qk_layernorm=True, family="mistral"), "families mistral, so"),
        (ArchitectureConfig(family="gemma"), "family=gemma: expected one of llama, mistral"),
    ],
)
def test_a_model_that_could_not_be_exported_is_not_begun(
    arch: ArchitectureConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RandomSource(arch, 0)


def test_random_biases_are_zero_and_norms_one() -> None:
    arch = ArchitectureConfig(2, 64, 96, 4, 2, 16, 500, add_qkv_bias=True)
    prefix = "decoder.layers.1.self_attention."
    bias = RandomSource(arch, 1).read(prefix + "linear_qkv.bias", (64,), (64,))
    assert bias.eq(0).all() and bias.shape == (64,)
    arch = ArchitectureConfig(2, 64, 96, 4, 2, 16, 500, qk_layernorm=True)
    assert RandomSource(arch, 1).read(prefix + "q_layernorm.weight", (0,), (16,)).eq(1).all()


def test_a_layer_with_more_than_its_config_says_is_refused(
    folders: Folders, tmp_path: Path
) -> None:
    """Biases in the weights of what calls itself a Llama."""
    folder = tmp_path / "hf"
    shutil.copytree(folders("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"k_proj\.bias.* \(12 such tensors\)"):
        HuggingFaceSource(folder, read_architecture(folder))


def test_a_tied_model_with_another_head_is_refused(folders: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(folders("llama3_2"), folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    HuggingFaceSource(folder, read_architecture(folder))
    save_file({**tensors, "lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"tie_word_embeddings=true, but lm_head\.weight differs"
    ):
        HuggingFaceSource(folder, read_architecture(folder))


def test_query_and_key_of_each_others_size_are_refused(folders: Folders, tmp_path: Path) -> None:
    """Together they have as many rows as they should."""
    folder = tmp_path / "hf"
    shutil.copytree(folders("qwen2"), folder)
    tensors = load_file(folder / "model.safetensors")
    swap(tensors, "q_proj.weight", "k_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    source = HuggingFaceSource(folder, read_architecture(folder))
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape \(32, 64\), .*\(64, 64\)"):
        source.read(key, (0, 0), (128, 64))


def test_scaled_positions_differ_from_plain_ones(folders: Folders) -> None:
    """The tiny model's texts are long enough for Llama 3.1's scaling to matter."""
    assert LLAMA3_ROPE["original_max_position_embeddings"] < len(PROMPTS[-1])
    scaled, plain = (hf_logits(folders(name), PROMPTS[-1:]) for name in ("llama3_1", "llama3"))
    assert float((scaled - plain).abs().max()) > 0.01
