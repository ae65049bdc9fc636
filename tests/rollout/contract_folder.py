"""What all engines under contract start from: one Hugging Face folder, a tied one, and the greedy
answers of the embedded engine."""

from __future__ import annotations

from pathlib import Path

from contract import STOP_IDS, greedy_json
from tiny import save_llama

from nemo_selfpref.rollout.embedded import EmbeddedEngine
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.training.session import embedded_engine

SHAPE = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 512}
"""vLLM's attention on a CPU needs heads of 32, its prefix cache has blocks of 128 tokens."""


def make_embedded(model: Path) -> EmbeddedEngine:
    policy = single_process_policy(model)[0]
    return embedded_engine(policy, frozenset(STOP_IDS), batch_size=64)


def make_contract_folder(folder: Path) -> Path:
    """FOLDER/model, FOLDER/tied, FOLDER/greedy.json."""
    model = save_llama(folder / "model", **SHAPE)
    save_llama(folder / "tied", seed=1, tie_word_embeddings=True, **SHAPE)
    (folder / "greedy.json").write_text(greedy_json(make_embedded(model)))
    return folder
