"""The benchmark of rollouts at toy size: every part runs on real engines and says what it found."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROLLOUT_PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
CONCURRENT, NEW_TOKENS = 4, 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(
        not ROLLOUT_PYTHON.exists(), reason="no environment with vLLM here: make rollout-env"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run of all parts wrote."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "benchmarks/rollout.py", "--toy"]
    command += ["--work", str(folder / "work"), "--json", str(folder / "rollout.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads((folder / "rollout.json").read_text())
    parts = [part for part in found.values() if isinstance(part, dict) and "ratios" in part]
    assert len(parts) == 5
    for ratio in (ratio for part in parts for ratio in part["ratios"]):
        assert math.isfinite(ratio["median"]) and ratio["median"] > 0, ratio
        assert ratio["name"] in done.stdout
    assert not list((folder / "work").iterdir()), "models and logs are gone"
    return found


def rounds(part: dict[str, Any], *keys: str) -> dict[str, list[dict[str, Any]]]:
    for key in keys:
        part = part[key]
    assert all(len(values) == 2 for values in part["rounds"].values())  # one of them not counted
    return part["rounds"]


def test_the_server_does_what_raw_vllm_does(found: dict[str, Any]) -> None:
    part = found["server"]
    variants = rounds(part, "tiny")
    assert set(variants) == {"raw", "one call", "a call each", "raw, plain"}
    for values in variants.values():
        assert {v["tokens"] for v in values} == {CONCURRENT * NEW_TOKENS}
    assert part["tiny"]["same_answers"] > 0  # the same prompts, seeds and weights
    assert found["versions"]["vllm"].startswith("vllm")


def test_new_weights_are_split_into_parts_that_make_the_whole(found: dict[str, Any]) -> None:
    published = rounds(found["sync"], "tiny")["HTTP"]
    for value in published:
        parts = [value[f"{name}_s"] for name in ("gather", "write", "send")]
        at_engine = [value[f"{name}_s"] for name in ("verify", "load", "probe")]
        assert 0 < sum(parts) <= value["seconds"] and 0 < sum(at_engine) <= value["send_s"]


def test_steps_ahead_train_on_what_was_generated(found: dict[str, Any]) -> None:
    variants = rounds(found["ahead"], "SAPO")
    assert all(pairs > 0 for value in variants["generating"] for pairs in value["pairs"])
    assert set(variants) == {"ahead", "generating", "training"}


def test_the_judge_is_asked_in_both_orders(found: dict[str, Any]) -> None:
    for values in rounds(found["judge"]).values():
        # Seven answers against the blank one, three pairs, both orders.
        assert {v["verdicts"] for v in values} == {2 * (7 + 3)}


def test_the_embedded_engine_answers_as_transformers_does(found: dict[str, Any]) -> None:
    assert found["embedded"]["tiny"]["same_answers"] == 1.0
