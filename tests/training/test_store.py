from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.training.store import (
    RunFolder,
    done_facts,
    is_done,
    mark_done,
    read_completions,
    read_label_scores,
    read_pairs,
    write_completions,
    write_label_scores,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import Completion, FinishReason, LabelScores, PreferencePair, WeightSet

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}


def config(*overrides: str, name: str = "dpo") -> DictConfig:
    return load_config(name, ["data.train_path=[rows.jsonl]", *overrides], SCHEMAS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run made with the plain settings."""
    RunFolder(tmp_path / "run").open(config(), resume=True)
    return tmp_path / "run"


def test_the_settings_are_saved_whole(folder: Path) -> None:
    saved = OmegaConf.load(folder / "config.yaml")
    assert saved.algorithm.beta == 0.1 and saved.model.optim.lr == 5e-7
    assert saved.trainer.precision == "fp32"


def test_the_same_settings_continue(folder: Path) -> None:
    before = (folder / "config.yaml").read_bytes()
    RunFolder(folder).open(config(), resume=True)
    assert (folder / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        ("algorithm.beta=0.2", "algorithm.beta: 0.1", "algorithm.beta: 0.2"),
        ("model.optim.lr=1e-6", "model.optim.lr: 5e-07", "model.optim.lr: 1e-06"),
        ("trainer.precision=bf16", "trainer.precision: fp32", "trainer.precision: bf16"),
        ("model.global_batch_size=32", "global_batch_size: 64", "global_batch_size: 32"),
        ("data.train_path=[b.jsonl]", "data.train_path: ['rows.jsonl']", "train_path: ['b.jsonl']"),
        ("seed=1", "seed: 1234", "seed: 1"),
        ("data.drop=[bad_row]", "data.drop: []", "data.drop: ['bad_row']"),
    ],
)
def test_other_settings_are_refused_with_their_difference(
    folder: Path, override: str, old: str, new: str
) -> None:
    with pytest.raises(ConfigError, match="was made with other settings") as caught:
        RunFolder(folder).open(config(override), resume=True)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert [line[0] for line in lines] == ["-", "+"]
    assert lines[0].endswith(old) and lines[1].endswith(new)


def test_another_algorithm_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"-algorithm\.beta: 0\.1"):
        RunFolder(folder).open(config(name="orpo"), resume=True)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=2",
        "trainer.num_nodes=2",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=1",
        "exp_manager.checkpoint_callback_params.save_top_k=5",
        "export.verify=false",
        "model.tensor_model_parallel_size=2",
        "model.pipeline_model_parallel_size=2",
        "model.virtual_pipeline_model_parallel_size=2",
        "model.context_parallel_size=2",
        "model.expert_model_parallel_size=2",
        "model.sequence_parallel=true",
        "model.micro_batch_size=1",
        "model.micro_batch_tokens=4096",
        "model.share_prompts=true",
        "model.recompute_granularity=full",
        "model.recompute_num_layers=2",
        "model.copies_on_cpu=true",
        "model.attention_backend=sdpa",
        "model.logprob_backend=torch",
        "model.logprob_chunk_size=64",
        "model.reference_cache_dir=elsewhere",
        "model.reference_cache_max_gb=2.5",
        "rollout.batch_size=1",
    ],
)
def test_how_a_run_computes_may_change(folder: Path, override: str) -> None:
    RunFolder(folder).open(config(override), resume=True)
    assert "batch_size: 4" in (folder / "config.yaml").read_text()  # the first settings stay


def without(folder: Path, name: str) -> None:
    """As if the run had been made before there was this setting."""
    saved = OmegaConf.load(folder / "config.yaml")
    group, key = name.rsplit(".", 1)
    del OmegaConf.select(saved, group)[key]
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    (folder / "inputs.json").unlink()


@pytest.mark.parametrize("name", ["model.fp8_recipe", "model.optim.alpha", "algorithm.beta"])
def test_a_setting_newer_than_the_run_may_be_at_its_default(folder: Path, name: str) -> None:
    without(folder, name)
    RunFolder(folder).open(config(), resume=True)
    others = {"model.fp8_recipe": "delayed", "model.optim.alpha": 0.9, "algorithm.beta": 0.5}
    with pytest.raises(ConfigError, match=rf"\+{name}: {others[name]}"):
        RunFolder(folder).open(config(f"{name}={others[name]}"), resume=True)


def test_an_existing_run_is_not_touched_without_leave(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"exists already.*resume_if_exists=true"):
        RunFolder(folder).open(config(), resume=False)


def test_stages_are_numbered_in_order() -> None:
    run = RunFolder(Path("r"))
    names = [str(run.stage(name)) for name in ("draft", "targets", "policy")]
    assert names == ["r/stages/01-draft", "r/stages/02-targets", "r/stages/03-policy"]


def test_a_stage_is_done_once_its_facts_are_written(tmp_path: Path) -> None:
    stage = tmp_path / "01-draft"
    assert not is_done(stage)
    mark_done(stage, {"answers": 3})
    assert is_done(stage) and done_facts(stage) == {"answers": 3}


COMPLETIONS = [
    Completion("a", (5, 2), (-0.1234567890123, -2.5), FinishReason.STOP, WeightSet.POLICY, 7),
    Completion("b", (9,), (-1.0,), FinishReason.LENGTH, WeightSet.FROZEN, 0),
]


def test_completions_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "completions.parquet"
    write_completions(path, COMPLETIONS)
    assert read_completions(path) == COMPLETIONS
    assert [p.name for p in path.parent.iterdir()] == ["completions.parquet"]


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "completions.parquet"
    write_completions(path, COMPLETIONS)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"completions\.parquet cannot be read"):
        read_completions(path)


def test_pairs_with_their_provenance(tmp_path: Path) -> None:
    import json

    import pyarrow.parquet as pq

    pair = PreferencePair("a", (1, 2), (3,), (4, 5), provenance={"source": "f:1", "score": 2})
    write_pairs(tmp_path / "pairs.parquet", [pair])
    (row,) = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert row.pop("provenance") == json.dumps({"score": 2, "source": "f:1"})
    assert row == {
        "id": "a",
        "prompt_ids": [1, 2],
        "chosen_ids": [3],
        "rejected_ids": [4, 5],
        "strength": 1.0,
        "augmented_prompt_ids": None,
    }


def test_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    provenance = {"source": "f:1", "probabilities": [0.25, 0.5]}
    pairs = [
        PreferencePair("a", (1, 2), (3,), (4, 5), 0.75, provenance, augmented_prompt_ids=(9, 1, 2)),
        PreferencePair("b", (6,), (7,), (8,)),
    ]
    write_pairs(tmp_path / "pairs.parquet", pairs)
    assert read_pairs(tmp_path / "pairs.parquet") == pairs


def test_messages_stay_with_the_data(tmp_path: Path) -> None:
    pair = PreferencePair("a", (1,), (2,), (3,), messages=({"role": "user", "content": "Hi"},))
    write_pairs(tmp_path / "pairs.parquet", [pair])
    assert read_pairs(tmp_path / "pairs.parquet") == [replace(pair, messages=())]


def test_label_scores_come_back_as_they_were(tmp_path: Path) -> None:
    scores = [LabelScores((-0.1234567890123, -2.5), -0.125), LabelScores((-1.0, -3.0), -0.5)]
    write_label_scores(tmp_path / "labels.parquet", scores)
    assert read_label_scores(tmp_path / "labels.parquet") == scores


def test_tensors_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "reference.safetensors"
    for value in (1.5, 2.5):
        write_tensors(path, {"reference.chosen": torch.tensor([value])})
    assert load_file(path)["reference.chosen"].tolist() == [2.5]
    assert [p.name for p in path.parent.iterdir()] == ["reference.safetensors"]
