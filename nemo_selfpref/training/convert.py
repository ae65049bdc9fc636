"""`selfpref import` and `selfpref export`."""

from __future__ import annotations

from pathlib import Path

from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.folders import is_checkpoint, read_facts
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.checkpoint.verify import verify_export
from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import (
    AlgorithmConfig,
    DataConfig,
    Precision,
    RunConfig,
    TrainerConfig,
)
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.session import Start, build_policy, find_start


def single_process_policy(folder: Path) -> tuple[Policy, Start]:
    """The model of a Hugging Face folder or checkpoint on this one process, in its precision."""
    cfg = RunConfig(
        name="convert",
        model=ModelConfig(restore_from_path=str(folder)),
        data=DataConfig(train_path=[], max_length=2, max_prompt_length=1),
        algorithm=AlgorithmConfig(name="none"),
        trainer=TrainerConfig(precision=_precision(folder)),
    )
    start = find_start(cfg)
    policy, _ = build_policy(cfg, start)
    return policy, start


def _precision(folder: Path) -> Precision:
    if is_checkpoint(folder):
        return Precision(read_facts(folder)["precision"])
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    half = config.get("dtype", config.get("torch_dtype")) in ("bfloat16", "float16")
    return Precision.bf16 if half else Precision.fp32


def import_hf(hf: Path, out: Path) -> None:
    """Write a Hugging Face folder as a checkpoint.

    Raises:
        ConfigError: `out` exists, or `hf` is no Hugging Face folder.
        CheckpointError: a model this project does not build.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already: choose a new folder")
    if is_checkpoint(hf):
        raise ConfigError(f"--hf {hf} is a checkpoint of ours already; use it as it is")
    policy, start = single_process_policy(hf)
    save_weights(out, policy, start.tokenizer)


def export_hf(checkpoint: Path, out: Path, *, verify: bool) -> str:
    """Write a checkpoint as a Hugging Face folder; returns a line that says how well it agrees.

    Raises:
        ConfigError: `out` exists. CheckpointError: no checkpoint, or the comparison failed.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already: choose a new folder")
    if not is_checkpoint(checkpoint):
        raise CheckpointError(f"--checkpoint {checkpoint}: no checkpoint.json there")
    export_checkpoint(checkpoint, out)
    if not verify:
        return f"HF folder   {out} (not verified)"
    policy, start = single_process_policy(checkpoint)
    result = verify_export(policy, start.tokenizer, out)
    assert result is not None
    return (
        f"HF folder   {out}\nverified    largest logit difference {result.max_difference:.2g} over "
        f"{result.prompts} prompts, best token equal for all"
    )
