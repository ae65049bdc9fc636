"""What `selfpref serve` makes of a configuration, and what it refuses before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_selfpref.cli import main
from nemo_selfpref.config.schema import Placement, RolloutEngineName
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.convert import import_hf
from nemo_selfpref.training.serve import plan, serve_config


def overrides(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"model.restore_from_path={model}",
        f"exp_manager.exp_dir={folder}",
        f"rollout.vllm.token_file={folder / 'token'}",
        "trainer.accelerator=cpu",
        *more,
    ]


def test_a_trainings_own_settings_are_served(llama_folder: Path, tmp_path: Path) -> None:
    more = ("data.max_length=99999", "rollout.vllm.max_num_seqs=9", "rollout.placement=shared")
    cfg = serve_config("sgpo", overrides(llama_folder, tmp_path, *more), None)
    assert cfg.rollout.engine is RolloutEngineName.vllm
    assert cfg.rollout.placement is Placement.shared
    spec = plan(cfg, "ema, policy", tmp_path / "weights")
    (engine,) = spec.engines
    assert engine.spec.weight_sets == ["ema", "policy"] and engine.spec.max_num_seqs == 9
    assert engine.spec.model == str(llama_folder) and engine.spec.max_length == 256
    assert engine.spec.stop_ids == [0, 2]
    assert spec.weights_dir == engine.spec.weights_dir == str(tmp_path / "weights")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert Path(spec.folder).parent == tmp_path / "serve"


def test_the_engine_may_be_named_too(llama_folder: Path, tmp_path: Path) -> None:
    cfg = serve_config("dpo", overrides(llama_folder, tmp_path, "rollout=vllm"), None)
    assert cfg.rollout.engine is RolloutEngineName.vllm


@pytest.mark.parametrize("weights", ["", "policy,policy", "policy,ema2", ","])
def test_an_unknown_set_is_refused(llama_folder: Path, tmp_path: Path, weights: str) -> None:
    cfg = serve_config("dpo", overrides(llama_folder, tmp_path), None)
    with pytest.raises(ConfigError, match="expected names out of policy, frozen, ema, lagged"):
        plan(cfg, weights, tmp_path / "weights")


def test_a_checkpoint_must_be_exported_first(llama_folder: Path, tmp_path: Path) -> None:
    import_hf(llama_folder, tmp_path / "ckpt")
    cfg = serve_config("dpo", overrides(tmp_path / "ckpt", tmp_path), None)
    with pytest.raises(ConfigError, match="export it first: selfpref export --checkpoint"):
        plan(cfg, "policy", tmp_path / "weights")


def test_nothing_to_start_from_is_refused(tmp_path: Path) -> None:
    cfg = serve_config("dpo", overrides(tmp_path, tmp_path)[1:], None)
    with pytest.raises(ConfigError, match=r"set model\.restore_from_path"):
        plan(cfg, "policy", tmp_path / "weights")
    cfg = serve_config("dpo", overrides(tmp_path / "none", tmp_path), None)
    with pytest.raises(ConfigError, match="expected a Hugging Face folder"):
        plan(cfg, "policy", tmp_path / "weights")


def test_servers_that_run_already_are_not_served(llama_folder: Path, tmp_path: Path) -> None:
    more = "rollout.vllm.urls=[http://127.0.0.1:1]"
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.urls names servers that run already"):
        serve_config("dpo", overrides(llama_folder, tmp_path, more), None)


@pytest.mark.parametrize("name", ["VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"])
def test_an_open_vllm_is_not_served(
    llama_folder: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, "1")
    status = main(["serve", "--config-name", "dpo", *overrides(llama_folder, tmp_path)])
    assert status == 2
    assert f"unset {name}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_that_is_not_there_is_named(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"rollout.vllm.python={tmp_path / 'no/python'}"
    status = main(["serve", "--config-name", "dpo", *overrides(llama_folder, tmp_path, more)])
    assert status == 2
    said = capsys.readouterr().err
    assert "no/python cannot be started" in said and "Set rollout.vllm.python" in said
