"""Nothing is instantiated because a configuration, a row or a spec names it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from configs import load
from hydra.utils import instantiate
from omegaconf import OmegaConf
from payloads import GADGETS, Canary, gadget
from pydantic import ValidationError

from nemo_selfpref.config.safety import INSTANTIABLE
from nemo_selfpref.config.schema import DataConfig
from nemo_selfpref.data.dataset import load_demonstrations
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError, DataError
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec

PLACES = ("surprise", "model", "model.optim", "data.columns", "algorithm", "rollout.vllm", "")


def test_the_list_of_what_may_be_instantiated_is_empty() -> None:
    assert frozenset() == INSTANTIABLE


@pytest.mark.parametrize("name", GADGETS)
def test_the_gadgets_work(canary: Canary, name: str) -> None:
    """Hydra itself would run each of them: the tests below can fail."""
    with contextlib.suppress(Exception):  # numpy and torch complain about what they unpickled
        instantiate(OmegaConf.create(gadget(canary, name)))
    deadline = time.monotonic() + 20
    while not canary.sang and time.monotonic() < deadline:
        time.sleep(0.01)
    assert canary.sang


def places(name: str) -> tuple[str, ...]:
    """Where a gadget is tried: one of them everywhere, the others where any key may stand."""
    return PLACES if name == "os.system" else ("data.columns",)


def as_override(place: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        found = [as_override(f"{place}.{key}" if place else key, v) for key, v in value.items()]
        return [override for part in found for override in part]
    return [f"+{place}={json.dumps(value)}"]


@pytest.mark.parametrize("name", GADGETS)
def test_a_gadget_by_overrides(canary: Canary, name: str) -> None:
    for place in places(name):
        given = as_override(place, gadget(canary, name))
        assert given[0].endswith(f'_target_="{name}"')
        with pytest.raises(ConfigError):
            load(*given)
    canary.check_silent()


@pytest.mark.parametrize("name", GADGETS)
def test_a_gadget_in_a_file(canary: Canary, name: str, tmp_path: Path) -> None:
    for place in places(name):
        content: dict[str, Any] = gadget(canary, name)
        for part in reversed(place.split(".") if place else []):
            content = {part: content}
        text = yaml.safe_dump({"defaults": ["dpo", "_self_"], **content})
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load(folder=tmp_path, name="mine")
    canary.check_silent()


def test_a_name_in_the_only_table_that_takes_any_key() -> None:
    with pytest.raises(ConfigError, match=r"^data\.columns\._target_='os\.system': a config"):
        load("+data.columns._target_=os.system")
    assert load("+data.columns.target=prompt").data.columns == {"target": "prompt"}


@pytest.mark.parametrize("name", GADGETS)
def test_a_gadget_in_a_row(
    canary: Canary, name: str, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    made, path = gadget(canary, name), tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": made, "completion": "x"},
        {"prompt": "x", "completion": made},
        {"prompt": "x", "completion": "y", **made},
        {"prompt": "x", "completion": "y", "more": made},
        {"messages": [made]},
    ]
    for row in rows:
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError):
            load_demonstrations(DataConfig(train_path=[str(path)]), tokenizer)
    # As text it is text.
    path.write_text(json.dumps({"prompt": json.dumps(made), "completion": "x"}) + "\n")
    kept, _ = load_demonstrations(DataConfig(train_path=[str(path)]), tokenizer)
    assert len(kept) == 1
    canary.check_silent()


@pytest.mark.parametrize("name", GADGETS)
def test_a_gadget_in_the_spec_of_an_engine(canary: Canary, name: str) -> None:
    good = {
        "model": "m",
        "weights_dir": "w",
        "weight_sets": ["policy"],
        "stop_ids": [2],
        "tokenizer_sha256": "0" * 64,
        "dtype": "float32",
        "max_length": 8,
        "device": "cpu",
        "ready_file": "r",
        "token_file": "t",
    }
    EngineSpec.model_validate(good)
    for bad in ({**good, **gadget(canary, name)}, {**good, "model": gadget(canary, name)}):
        with pytest.raises(ValidationError):
            EngineSpec.model_validate(bad)
    canary.check_silent()
