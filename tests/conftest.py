"""One tiny Llama a session, and policies built from it: building one takes a few hundredths of a
second, so every test gets its own and may train it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import MakePolicy, save_llama

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.megatron.policy import Policy

# Tensors this small are slower on more threads, far slower where other processes want the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, four heads on two key-value heads, vocabulary 500, untied, ChatML tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with input and output embeddings tied."""
    return save_llama(tmp_path_factory.mktemp("tied"), seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tokenizer(llama_folder: Path) -> ChatTokenizer:
    from nemo_selfpref.config.model_schema import TokenizerConfig
    from nemo_selfpref.data.tokenizer import load_tokenizer

    return load_tokenizer(TokenizerConfig(), str(llama_folder))


@pytest.fixture
def make_policy() -> MakePolicy:
    """Builds the policy of a Hugging Face or checkpoint folder in this process."""
    from nemo_selfpref.training.convert import single_process_policy

    return lambda folder: single_process_policy(folder)[0]


@pytest.fixture
def policy(make_policy: MakePolicy, llama_folder: Path) -> Policy:
    """A fresh policy with the weights of llama_folder."""
    return make_policy(llama_folder)
