from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.train import check_before_work

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
VLLM, R = "rollout=vllm", "rollout"
SERVED = (
    *(VLLM, "rollout.vllm.urls=[http://127.0.0.1:1]", "rollout.vllm.token_file=token"),
    "rollout.vllm.weights_dir=weights",
)


def check(*overrides: str) -> None:
    check_config(to_typed(load_config("osp", ["data.train_path=[x]", *overrides], SCHEMAS)))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (VLLM,),
        SERVED,
        (VLLM, "rollout.max_staleness=3", "rollout.stale_samples=count"),
        (VLLM, "rollout.placement=shared", "rollout.vllm.engines_per_set=2"),
        (VLLM, "rollout.vllm.transport=gloo"),
    ],
)
def test_what_goes_together(overrides: tuple[str, ...]) -> None:
    check(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.max_staleness=1",), "rollout.max_staleness does nothing with the embedded"),
        (("rollout.placement=shared",), "rollout.placement does nothing with the embedded"),
        (("rollout.stale_samples=count",), "rollout.stale_samples does nothing"),
        (("rollout.timeout_s=5",), "rollout.timeout_s does nothing"),
        (("rollout.vllm.max_num_seqs=8",), "rollout.vllm does nothing with the embedded"),
        ((VLLM, "rollout.max_staleness=-1"), "rollout.max_staleness=-1: expected 0 (on-policy)"),
        ((VLLM, "rollout.timeout_s=0"), "rollout.timeout_s=0.0: expected a positive"),
        ((VLLM, "rollout.check_samples=-1"), "rollout.check_samples=-1: expected 0 (off)"),
        ((VLLM, "rollout.logprob_alarm=0"), "rollout.logprob_alarm=0.0: expected a positive"),
        ((VLLM, "rollout.vllm.engines_per_set=0"), "rollout.vllm.engines_per_set=0"),
        ((VLLM, "rollout.vllm.max_restarts=-1"), "rollout.vllm.max_restarts=-1: expected 0"),
        ((VLLM, "rollout.vllm.gpu_memory_utilization=1.5"), "expected at most 1"),
        ((VLLM, "rollout.vllm.min_engines=2"), "the run could never begin"),
        (
            (VLLM, "rollout.vllm.transport=nccl", "rollout.max_staleness=1"),
            "Use transport=folder, or max_staleness=0",
        ),
        (
            (VLLM, "rollout.vllm.urls=[http://a]", "rollout.vllm.weights_dir=w"),
            "rollout.vllm.urls needs rollout.vllm.token_file",
        ),
        (
            (VLLM, "rollout.vllm.urls=[http://a]", "rollout.vllm.token_file=t"),
            "needs rollout.vllm.weights_dir, the folder selfpref serve named",
        ),
        ((*SERVED, "rollout.vllm.port=80"), "rollout.vllm.port is of a server to be started"),
    ],
)
def test_what_does_not(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(*overrides)


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("dpo", (VLLM,), "rollout=vllm does nothing with dpo as it is configured"),
        (
            "osp",
            (VLLM, "algorithm.sampling=offline", "algorithm.loss=dpo"),
            "rollout=vllm does nothing with osp",
        ),
        ("osp", (VLLM, "rollout.vllm.python=/none/python"), "/none/python: no such interpreter"),
        ("osp", SERVED, "the token file token cannot be read"),
    ],
)
def test_before_any_work(
    method: str,
    overrides: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("")
    cfg = load_config(method, ["data.train_path=[x]", *overrides], SCHEMAS)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_before_work(cfg)


def test_the_group_is_composed_before_the_file() -> None:
    """A configuration's own rollout settings stay when the engine is another."""
    cfg = load_config("osp", ["data.train_path=[x]", VLLM, "rollout.top_k=7"], SCHEMAS)
    plain = OmegaConf.to_container(cfg.rollout, enum_to_str=True)
    assert isinstance(plain, dict) and (plain["engine"], plain["top_k"]) == ("vllm", 7)
    with pytest.raises(ConfigError, match="rollout=none: expected one of embedded, vllm"):
        load_config("osp", ["data.train_path=[x]", "rollout=none"], SCHEMAS)
