"""Small tokenizers trained on the spot, and the place of the real data files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny import CORPUS, train_byte_level, train_chatml

from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.data.sentencepiece_tokenizer import train_sentencepiece
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return CORPUS


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_chatml(tmp_path_factory.mktemp("chatml"))


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
