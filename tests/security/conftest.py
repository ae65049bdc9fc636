"""A canary for every test, bombs to put in the place of files, and tokenizers of three kinds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from payloads import KINDS, Canary
from tiny import CORPUS, train_byte_level, train_chatml

from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.data.sentencepiece_tokenizer import train_sentencepiece
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer

INST_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + eos_token }}{% else %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Canary:
    folder = tmp_path_factory.mktemp("canary")
    monkeypatch.syspath_prepend(str(folder))
    return Canary.lay(folder)


@pytest.fixture(scope="session")
def chat_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    """ChatML and [INST] turns on a byte-level vocabulary, and sentencepiece."""
    folder = tmp_path_factory.mktemp("tokenizers")
    inst = ["<s>", "</s>", "[INST]", "[/INST]"]
    made = {
        "chatml": train_chatml(folder / "chatml"),
        "inst": train_byte_level(
            folder / "inst", inst, INST_TEMPLATE, bos_token="<s>", eos_token="</s>"
        ),
        "sentencepiece": train_sentencepiece(CORPUS, 500, folder / "small"),
    }
    return {name: load_tokenizer(TokenizerConfig(path=str(p))) for name, p in made.items()}


@pytest.fixture(params=["chatml", "inst", "sentencepiece"])
def chat_tokenizer(
    request: pytest.FixtureRequest, chat_tokenizers: dict[str, ChatTokenizer]
) -> ChatTokenizer:
    return chat_tokenizers[request.param]


@pytest.fixture(params=sorted(KINDS))
def bomb(request: pytest.FixtureRequest, canary: Canary) -> Iterator[bytes]:
    """Bytes to put in a file's place; nothing may have run them in the end."""
    yield KINDS[request.param](canary)
    canary.check_silent()
