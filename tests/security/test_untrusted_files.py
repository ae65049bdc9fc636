"""Files of others are read as data: a pickle in the place of any is never opened."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from payloads import Canary

from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.config.schema import DataConfig
from nemo_selfpref.data.dataset import load_demonstrations, load_preferences, load_prompts
from nemo_selfpref.data.templates import load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_selfpref.errors import DataError, SelfPrefError
from nemo_selfpref.files import read_json
from nemo_selfpref.rollout.answer_cache import AnswerCache
from nemo_selfpref.rollout.serving.auth import read_token
from nemo_selfpref.rollout.teacher import FileTeacher
from nemo_selfpref.training.reference_segments import Segments
from nemo_selfpref.training.same_settings import read_settings
from nemo_selfpref.training.stage_files import done_facts
from nemo_selfpref.training.store import read_completions, read_label_scores, read_pairs


def test_the_bombs_work(canary: Canary) -> None:
    pickle.loads(canary.pickle())  # noqa: S301
    assert canary.sang
    canary.made.rmdir()
    canary.file.write_bytes(canary.torch_file())
    torch.load(canary.file, weights_only=False)
    assert canary.sang


# -- single files ---------------------------------------------------------------------------------


def _data(read: Callable[..., Any]) -> Callable[[Path, ChatTokenizer], Any]:
    return lambda path, tokenizer: read(DataConfig(train_path=[str(path)]), tokenizer)


READERS: dict[str, Callable[[Path, ChatTokenizer], Any]] = {
    "rows.jsonl": _data(load_demonstrations),
    "rows.json": _data(load_demonstrations),
    "rows.parquet": _data(load_demonstrations),
    "pairs.jsonl": _data(load_preferences),
    "prompts.txt": lambda path, _: load_prompts(path),
    "prompts.jsonl": lambda path, _: load_prompts(path),
    "template.txt": lambda path, _: load_template(str(path), frozenset({"q"})),
    "small.model": lambda path, _: load_tokenizer(TokenizerConfig(path=str(path))),
    "answers.jsonl": lambda path, _: FileTeacher(path),
    "cache.jsonl": lambda path, _: AnswerCache(str(path)),
    "any.json": lambda path, _: read_json(path),
    "config.yaml": lambda path, _: read_settings(path),
    "done.json": lambda path, _: done_facts(path.parent),
    "completions.parquet": lambda path, _: read_completions(path),
    "labels.parquet": lambda path, _: read_label_scores(path),
    "made.parquet": lambda path, _: read_pairs(path),
    "token": lambda path, _: read_token(path),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_place_of_a_file(
    name: str, bomb: bytes, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / name
    path.write_bytes(bomb)
    path.chmod(0o600)
    with pytest.raises(SelfPrefError):
        READERS[name](path, tokenizer)


def test_a_pickle_in_a_cache_of_references(bomb: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    segments = Segments(tmp_path, said.append)
    segments.open("context")
    segments.add(b"k" * 32, (1.0, 2))
    segments.flush()
    (written,) = (path for path in tmp_path.rglob("*") if path.is_file())
    written.write_bytes(bomb)
    again = Segments(tmp_path, said.append)
    again.open("context")
    assert again.get(b"k" * 32) is None
    assert any("damaged segment" in line for line in said)


def test_a_column_of_pickles_stays_bytes(
    bomb: bytes, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": [bomb], "completion": [bomb]}), path)
    with pytest.raises(DataError):
        load_demonstrations(DataConfig(train_path=[str(path)]), tokenizer)


def test_a_pickled_type_of_a_column(bomb: bytes, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """Arrow once unpickled the type of a column as soon as its file was opened."""
    said = {
        "ARROW:extension:name": b"arrow.py_extension_type",
        "ARROW:extension:metadata": bomb,
    }
    fields = [pa.field(name, pa.string(), metadata=said) for name in ("prompt", "completion")]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["Why?"], ["So."]], schema=pa.schema(fields)), path)
    assert pq.read_schema(path).field("prompt").metadata or "extension" in str(pq.read_schema(path))
    try:
        rows, _ = load_demonstrations(DataConfig(train_path=[str(path)]), tokenizer)
        assert len(rows) == 1  # read as the text that it is stored as
    except DataError:
        pass
