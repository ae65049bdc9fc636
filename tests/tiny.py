"""Small models and tokenizers made on the spot, for every test that needs a real one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.model_schema import LoRAConfig, ModelConfig
from nemo_selfpref.config.schema import AlgorithmConfig, DataConfig, Precision, RunConfig
from nemo_selfpref.megatron.policy import Policy

MakePolicy = Callable[[Path], Policy]

VOCAB = 500
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system: answer the question in one short sentence, please.",
    "im_end im_start end of text begin of text header id user assistant",
    "Numbers such as 100, 1000 and 10000 repeat their digits; so do ---- and ====.",
    "caf\u00e9 na\u00efve \u00fcber \u65e5\u672c\u8a9e two  spaces   three",
]
_SYLLABLES = ["ba", "be", "bi", "do", "fa", "ge", "hi", "ka", "lo", "mu", "na", "pe", "ri", "so"]


def make_corpus() -> list[str]:
    """A few sentences, and many made-up words so that a vocabulary of 500 pieces can be filled."""
    random_ = random.Random(3)
    words = ["".join(random_.choices(_SYLLABLES, k=random_.randint(1, 4))) for _ in range(400)]
    return _SENTENCES * 20 + [" ".join(random_.choices(words, k=12)) for _ in range(200)]


CORPUS = make_corpus()

CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level(folder: Path, special: list[str], template: str | None, **named: str) -> Path:
    """A byte-level BPE tokenizer in a Hugging Face folder; the special tokens get ids 0, 1, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)
    fast.save_pretrained(str(folder))
    return folder


def train_chatml(folder: Path) -> Path:
    """The byte-level tokenizer with ChatML turns: <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2."""
    return train_byte_level(
        folder,
        CHATML_TOKENS,
        CHATML_TEMPLATE,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""Grouped-query attention, and weights large enough that the attention pattern matters."""


def save_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of transformers, with a ChatML tokenizer, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # Norms of one would hide a mix-up of the norms.
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(str(folder))
    train_chatml(folder)
    return folder


def in_precision(policy: Policy, precision: Precision, folder: Path, **settings: Any) -> Policy:
    """The model of a Hugging Face folder in another precision and with other model settings,
    beside one that is there already."""
    config = replace(policy.config, **settings)
    made = Policy(policy.arch, config, precision, policy.platform, policy.layout)
    fill_policy(made, HuggingFaceSource(folder, policy.arch))
    return made


@torch.no_grad()
def scale(policy: Policy, factor: float = 1.5) -> None:
    """Change every weight, and count that as an optimizer step."""
    torch._foreach_mul_(list(policy.module.parameters()), factor)
    policy.weight_version += 1


def with_adapters(folder: Path, lora: LoRAConfig, seed: int = 1234, **model: Any) -> Policy:
    """The model of a Hugging Face or checkpoint folder as a run with adapters builds it."""
    from nemo_selfpref.training.session import build_policy, find_start

    cfg = RunConfig(
        name="adapters",
        seed=seed,
        model=ModelConfig(restore_from_path=str(folder), lora=lora, **model),
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="none"),
    )
    return build_policy(cfg, find_start(cfg))[0]
