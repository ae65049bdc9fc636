"""Every configuration file that ships loads, is checked and names the algorithm it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.algorithms.sgpo_variants import VARIANTS
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.paths import conf_dir, prompts_dir
from nemo_selfpref.config.schema import RefMode

GROUPS = ("rollout", "model", "cluster")
"""Folders of files that go beside one that names a method."""
FILES = sorted(p for p in conf_dir().rglob("*.yaml") if p.parent.name not in GROUPS)
SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
TARGETS = ["algorithm.targets.source=file", "algorithm.targets.path=answers.jsonl"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_loads_and_passes_its_checks(file: Path) -> None:
    overrides = ["data.train_path=[rows.jsonl]"]
    if "sgpo" in file.stem:
        overrides += TARGETS  # where the target answers come from is the user's to say
    cfg = to_typed(load_config(file.stem, overrides, SCHEMAS, file.parent))
    check_config(cfg)
    algorithm = algorithms()[cfg.algorithm.name](cfg.algorithm)
    algorithm.check(cfg)
    assert isinstance(cfg.algorithm, algorithm.config_class)


def test_every_algorithm_has_a_config_of_its_name() -> None:
    for name in SCHEMAS:
        cfg = load_config(name, ["data.train_path=[rows.jsonl]"], SCHEMAS)
        assert cfg.algorithm.name == cfg.name == name


PUBLISHED = {
    "self_augmented_po": {
        "algorithm.loss": "dpo",
        "algorithm.beta": 0.1,
        "algorithm.ref": "ema",
        "algorithm.segment_length": 256,
        "model.optim.name": "rmsprop",
        "model.optim.lr": 5e-7,
        "model.optim.sched.name": "LinearAnnealing",
        "model.optim.sched.warmup_ratio": 0.1,
        "model.global_batch_size": 64,
        "trainer.max_epochs": 4,
        "data.max_length": 2048,
        "data.max_prompt_length": 1791,  # it drops prompts of 1792 tokens and more
        "rollout.temperature": 0.7,
        "rollout.top_k": 50,
        "rollout.top_p": 0.95,
    },
    "self_augmented_po_orpo": {
        "algorithm.loss": "orpo",
        "algorithm.lam": 0.05,
        "algorithm.ref": "none",
        "model.optim.name": "adamw",
        "model.optim.lr": 5e-6,
        "model.optim.sched.name": "InverseSquareRoot",
        "model.optim.sched.warmup_steps": 100,
        "trainer.max_epochs": 4,
    },
    "sgpo": {
        "algorithm.beta": 0.01,
        "algorithm.improver.max_epochs": 3,
        "algorithm.improver.optim.lr": 2e-5,
        "model.optim.lr": 5e-7,
        "model.optim.sched.name": "CosineAnnealing",
        "model.global_batch_size": 128,
        "trainer.max_epochs": 1,
        "data.max_length": 2048,
        "rollout.temperature": 0.7,
        "rollout.top_p": 0.9,
    },
    "osp": {
        "algorithm.num_samples": 7,
        "algorithm.loss": "spce",
        "algorithm.beta": 0.1,
        "algorithm.ref": "frozen",
        "algorithm.judge.prompt": "judge_helpful",
        "algorithm.judge.average": "probability",
        "rollout.temperature": 0.7,
        "rollout.top_p": 0.9,
    },
    "sr_dpo": {
        "algorithm.beta": 0.1,
        "algorithm.lam": 0.3,
        "model.optim.name": "rmsprop",
        "model.optim.lr": 5e-7,
        "model.optim.sched.warmup_steps": 150,
        "model.global_batch_size": 64,
        "trainer.gradient_clip_val": 10.0,
        "data.max_prompt_length": 512,
    },
    "spin": {
        "algorithm.iterations": 4,
        "algorithm.beta": 0.1,
        "algorithm.last_beta": 5.0,
        "algorithm.ref": "last",
        "model.optim.lr": 5e-7,
        "model.global_batch_size": 64,
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
    },
}
"""Settings of the papers, by configuration."""
PUBLISHED["sr_ipo"] = PUBLISHED["sr_dpo"] | {"algorithm.delta_beta": True}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_configuration_is_its_papers(name: str) -> None:
    overrides = ["data.train_path=[rows.jsonl]", *(TARGETS if name == "sgpo" else [])]
    cfg = load_config(name, overrides, SCHEMAS)
    found = {key: OmegaConf.select(cfg, key) for key in PUBLISHED[name]}
    plain = {key: value.name if isinstance(value, Enum) else value for key, value in found.items()}
    assert plain == PUBLISHED[name]


def test_the_sapo_papers_word_for_a_frozen_reference() -> None:
    given = ["data.train_path=[rows.jsonl]", "algorithm.ref=fix"]
    cfg = to_typed(load_config("self_augmented_po", given, SCHEMAS))
    assert vars(cfg.algorithm)["ref"] is RefMode.frozen


ALTERNATIVES = {"judge_summary"}
"""No default, but the documented choice for another task (docs/algorithms.md)."""


@pytest.mark.parametrize("name", sorted(p.stem for p in prompts_dir().glob("*.txt")))
def test_every_prompt_has_a_use(name: str) -> None:
    defaults = {text for schema in SCHEMAS.values() for text in _texts(schema())}
    assert name in defaults | {text for c in VARIANTS.values() for text in _texts(c)} | ALTERNATIVES


def _texts(settings: object) -> Iterator[str]:
    """Every text in a dataclass and in those within it."""
    for value in vars(settings).values():
        if isinstance(value, str):
            yield value
        elif is_dataclass(value):
            yield from _texts(value)
