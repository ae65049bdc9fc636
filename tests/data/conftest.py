"""Small tokenizers trained on the spot, and the place of the real data files."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from nemo_selfpref.config.schema import TokenizerConfig
from nemo_selfpref.data.sentencepiece_tokenizer import train_sentencepiece
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer

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
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def train_byte_level(folder: Path, special: list[str], template: str | None, **named: str) -> Path:
    """A byte-level BPE tokenizer in a Hugging Face folder; the special tokens get ids 0, 1, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_level(
        tmp_path_factory.mktemp("chatml"),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        CHATML_TEMPLATE,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_byte_level(
        tmp_path_factory.mktemp("llama3"),
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        LLAMA3_TEMPLATE,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(CORPUS, 500, tmp_path_factory.mktemp("spm") / "small")


@pytest.fixture(scope="session")
def chatml(chatml_folder: Path) -> ChatTokenizer:
    return load_tokenizer(TokenizerConfig(path=str(chatml_folder)))


@pytest.fixture(scope="session")
def llama3(llama3_folder: Path) -> ChatTokenizer:
    return load_tokenizer(TokenizerConfig(path=str(llama3_folder)))


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_file: Path) -> ChatTokenizer:
    return load_tokenizer(TokenizerConfig(path=str(sentencepiece_file)))


@pytest.fixture(scope="session", params=["chatml", "llama3", "sentencepiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def real_data() -> Path:
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("SELFPREF_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"the real data files are not at {folder}; set SELFPREF_DATA")
    return folder
