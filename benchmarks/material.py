"""What benchmarks train on: preference pairs, a tokenizer made from their text, a small Llama."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from nemo_selfpref.files import write_text

Pair = dict[str, str]
FIELDS = ("prompt", "chosen", "rejected")
_SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
# No white space of its own: text then splits into tokens at a control token on every side.
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Median and shape of UltraFeedback's lengths in words, and what 999 of 1,000 do not exceed.
_WORDS = {"prompt": (57, 1.2, 1000), "chosen": (152, 0.9, 820), "rejected": (133, 0.9, 780)}


@dataclass(frozen=True)
class ModelSize:
    """A Llama small enough for two cores, of a real one's proportions but for the vocabulary."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 688
    vocabulary: int = 8192
    max_length: int = 1024


def read_pairs(path: Path) -> list[Pair]:
    """The file's pairs, without those that teach nothing: identical or blank answers."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read as JSON lines: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not all(isinstance(row.get(field), str) for field in FIELDS):
            raise BenchmarkError(f"{path}, row {number}: expected the texts {', '.join(FIELDS)}")
    pairs = [{field: row[field] for field in FIELDS} for row in rows]
    return [p for p in pairs if p["chosen"] != p["rejected"] and all(p[f].strip() for f in FIELDS)]


def synthetic_pairs(count: int, seed: int) -> list[Pair]:
    """Pairs of invented words, about as long as UltraFeedback's and with its kind of spread."""
    rng = random.Random(seed)
    syllables = [a + b for a, b in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(6000)]
    # Zipf's law: how often a word comes falls with its rank.
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(middle: int, spread: float, most: int) -> str:
        length = round(middle * rng.lognormvariate(0, spread))
        return " ".join(rng.choices(words, cum_weights=weights, k=min(max(length, 3), most)))

    return [{field: text(*_WORDS[field]) for field in FIELDS} for _ in range(count)]


def make_tokenizer(pairs: Sequence[Pair], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the pairs' own text, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    bpe.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((p[field] for p in pairs for field in FIELDS), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def fitting(
    pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Pair]:
    """The pairs that nobody has to cut, control tokens included."""

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore

    def fits(pair: Pair) -> bool:
        sizes = {field: length(pair[field]) for field in FIELDS}
        return sizes["prompt"] + max(sizes["chosen"], sizes["rejected"]) + 4 <= max_length

    return [pair for pair in pairs if fits(pair)]


def usable_pairs(
    path: Path | None, option: str, count: int, size: ModelSize, seed: int
) -> tuple[PreTrainedTokenizerFast, list[Pair]]:
    """The pairs of a file, or made-up ones, that nobody has to cut, and their tokenizer.

    Raises:
        BenchmarkError: fewer than `count`, which `option` asked for.
    """
    # Surplus, since some invented pairs are too long.
    pairs = read_pairs(path) if path else synthetic_pairs(2 * count, seed)
    tokenizer = make_tokenizer(pairs, size.vocabulary)
    usable = fitting(pairs, tokenizer, size.max_length)
    if len(usable) < count:
        raise BenchmarkError(
            f"{len(usable)} of {len(pairs)} pairs have at most {size.max_length} tokens; "
            f"{option} {count} needs more"
        )
    return tokenizer, usable


def save_model(folder: Path, size: ModelSize, tokenizer: Any, seed: int) -> None:
    """Random weights and the tokenizer as one Hugging Face folder."""
    torch.manual_seed(seed)
    disable_progress_bar()
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=2 * size.max_length,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    write_text(path, "".join(json.dumps(pair) + "\n" for pair in pairs))
