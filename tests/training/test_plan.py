"""selfpref plan: what methods ask, memory, the cheapest change that fits, time, and its display."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import save_llama

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.cli import build_parser, main
from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig
from nemo_selfpref.config.paths import conf_dir
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import Pass
from nemo_selfpref.training.plan import Plan, make_plan, plan_config
from nemo_selfpref.training.plan_costs import Costs
from nemo_selfpref.training.plan_fit import changed
from nemo_selfpref.training.plan_method import Method, sketch_method
from nemo_selfpref.training.plan_report import as_json
from nemo_selfpref.training.plan_weights import parameters, sizes_of, stage_weights
from nemo_selfpref.types import WeightSet

LLAMA_8B: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
SHAPE = [f"model.architecture.{name}={value}" for name, value in LLAMA_8B.items()]
GIB = 2**30
FILES = ["algorithm.targets.source=file", "algorithm.targets.path=answers.jsonl"]


def arguments(*given: str) -> argparse.Namespace:
    return build_parser().parse_args(["plan", "--config-name", "dpo", *given])


def planned(name: str, *overrides: str, given: tuple[str, ...] = ()) -> Plan:
    return make_plan(plan_config(name, [*SHAPE, *overrides], None), arguments(*given))


def method_of(name: str, *overrides: str) -> Method:
    from nemo_selfpref.config.loader import to_typed

    cfg = to_typed(plan_config(name, overrides, None))
    return sketch_method(algorithms()[cfg.algorithm.name](cfg.algorithm), cfg, 100, 40)


# -- what a method asks ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(algorithms()))
def test_every_method_can_be_sketched(name: str) -> None:
    """It trains, and samples from no weights but those it says."""
    found = method_of(name)
    assert found.trainings and all(t.rows > 0 for t in found.trainings)
    cfg = plan_config(name, [], None)
    from nemo_selfpref.config.loader import to_typed

    asked = algorithms()[name](to_typed(cfg).algorithm).asked_weights()
    sets = found.before.sets.union(*(t.in_step.sets for t in found.trainings))
    assert sets == asked


COPIES = [
    ("dpo", [], set()),  # the reference is where the policy starts: scored once
    ("dpo", ["algorithm.ref=policy"], {WeightSet.LAGGED}),
    ("dpo", ["algorithm.ref=ema"], {WeightSet.LAGGED, WeightSet.EMA}),
    ("spin", [], set()),
    ("spin", ["algorithm.ref=frozen"], {WeightSet.FROZEN}),  # after the first iteration
    ("self_augmented_po", [], {WeightSet.LAGGED, WeightSet.EMA}),
    ("self_augmented_po_orpo", [], {WeightSet.EMA}),
    ("osp", [], {WeightSet.FROZEN}),
    ("orpo", [], set()),
]


@pytest.mark.parametrize(("name", "overrides", "copies"), COPIES)
def test_copies_that_a_method_keeps(name: str, overrides: list[str], copies: set) -> None:
    trainings = method_of(name, *overrides).trainings
    assert set().union(*(t.copies for t in trainings)) == copies


def test_counts_of_an_online_method() -> None:
    """Seven answers a prompt make three pairs; each answer against the blank one and each pair are
    judged in both orders: 2 (7 + 3)."""
    (training,) = method_of("osp").trainings
    assert training.online and training.rows == 3 and training.batch == 64 // 3
    assert (training.in_step.answers, training.in_step.judgements) == (7, 20)
    assert training.in_step.generated == 7 * 40
    assert training.live == {Pass.REFERENCE} and not training.once


def test_counts_of_a_method_that_samples_beforehand() -> None:
    found = method_of("spin", "algorithm.iterations=2")
    assert found.before.answers == 2 and found.before.generated == 2 * 40
    assert [t.rows for t in found.trainings] == [1, 2]  # the pairs before are trained on again
    assert all(t.once == {Pass.REFERENCE} and not t.live for t in found.trainings)


def test_a_method_that_made_up_rows_do_not_suit() -> None:
    class Choosy(algorithms()["sft"]):
        def run(self, run: Any) -> None:
            raise KeyError(run.demonstrations()[0].id)

    with pytest.raises(ConfigError, match=r"sft: the method cannot be carried out .*KeyError"):
        sketch_method(Choosy(None), to_typed_sft(), 10, 10)


def to_typed_sft() -> RunConfig:
    from nemo_selfpref.config.loader import to_typed

    return to_typed(plan_config("sft", [], None))


# -- memory ---------------------------------------------------------------------------------------


def test_weights_of_a_known_model() -> None:
    """Llama 3 8B: 8,030,261,248, as published."""
    every, layers = parameters(ArchitectureConfig(**LLAMA_8B))
    assert every == 8_030_261_248
    # all but two vocabularies of 128256 x 4096 and the last norm
    assert layers == every - 2 * 128256 * 4096 - 4096


def test_lines_of_a_known_model() -> None:
    """bf16: 2 bytes a weight, 4 a gradient, 12 of Adam's state."""
    memory = planned("dpo", "trainer.precision=bf16").memory
    lines = {name: memory.always[name] for name in ("weights", "gradients", "optimizer")}
    assert lines == {k: v * 8_030_261_248 for k, v in zip(lines, (2, 4, 12), strict=True)}


def test_the_optimizer_is_split_over_the_replicas() -> None:
    split = ["trainer.devices=8", "trainer.precision=bf16", "model.use_distributed_optimizer=true"]
    memory = planned("dpo", *split).memory
    assert memory.always["optimizer"] == pytest.approx(12 * 8_030_261_248 / 8, rel=1e-6)
    assert memory.always["gradients"] >= 4 * 8_030_261_248


@pytest.mark.parametrize(
    "layout",
    [{"tensor_model_parallel_size": 4}, {"pipeline_model_parallel_size": 4}, {}],
    ids=["tp", "pp", "whole"],
)
def test_no_weight_is_lost_between_the_ranks(layout: dict[str, Any]) -> None:
    """Norms are whole on every tensor-parallel rank: 2 x 32 + 1 of 4096. Four ranks pad the two
    vocabularies to a multiple of 512: by 256 rows."""
    model = ModelConfig(**layout)
    arch = ArchitectureConfig(**LLAMA_8B)
    stages = range(model.pipeline_model_parallel_size)
    parts = [part for stage in stages for part in stage_weights(arch, model, stage)]
    held = sum(weight.numel for part in parts for weight in part)
    tensor = model.tensor_model_parallel_size
    padding = 2 * 256 * 4096 if tensor > 1 else 0
    assert held * tensor == 8_030_261_248 + (tensor - 1) * 65 * 4096 + padding


def test_copies_and_where_they_lie() -> None:
    settings = ["trainer.precision=bf16", "algorithm.ref=ema"]
    here = planned("dpo", *settings).memory.always
    there = planned("dpo", *settings, "model.copies_on_cpu=true").memory.always
    assert here["EMA (float32)"] == 2 * here["reference weights"] == 4 * 8_030_261_248
    assert there.keys() == here.keys() - {"EMA (float32)", "reference weights"}


def test_the_head_takes_chunks_of_the_vocabulary() -> None:
    def head(*overrides: str) -> int:
        memory = planned("dpo", "trainer.precision=bf16", "data.max_length=2048", *overrides).memory
        return memory.phases["reference passes"]["log-prob head"]

    # Float32 logits and their bf16 gradient, and the states' gradient, of eight times 2047 targets.
    states = 8 * 2047 * 4096 * 4
    assert head() == 1024 * 128256 * 6 + states
    assert head("model.logprob_chunk_size=512") == 512 * 128256 * 6 + states


def test_the_cache_of_the_embedded_engine() -> None:
    lengths = ["data.max_prompt_length=512", "rollout.max_new_tokens=256", "rollout.batch_size=16"]
    memory = planned("spin", "trainer.precision=bf16", *lengths).memory
    # keys and values, 32 layers, 16 sequences of 768 tokens, 8 heads of 128 numbers of 2 bytes
    expected = 2 * 32 * 16 * 768 * 8 * 128 * 2
    assert memory.phases["rollouts"]["key-value cache"] == expected


def test_engines_on_the_trainers_devices_take_their_share() -> None:
    vllm = ["trainer.precision=bf16", "rollout=vllm", "rollout.vllm.gpu_memory_utilization=0.5"]
    beside = planned("spin", *vllm)
    assert beside.memory.phases["rollouts"] == {"vLLM, 1 awake": beside.device.memory // 2}
    apart = planned("spin", *vllm, "rollout.placement=disaggregated")
    assert "rollouts" not in apart.memory.phases


# -- what fits ------------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_given_settings_that_do() -> None:
    plan = planned("dpo", "trainer.devices=8", "trainer.precision=bf16")
    assert not plan.fits and plan.change is not None
    again = changed(plan.cfg, plan.change.settings)
    check_config(again)
    check_architecture(again, plan.arch)
    settings = [f"{k}={getattr(v, 'value', v)}" for k, v in plan.change.settings.items()]
    fitting = planned("dpo", "trainer.devices=8", "trainer.precision=bf16", *settings)
    assert fitting.fits and fitting.memory.total == plan.change.memory.total


def test_each_of_the_changes_is_needed() -> None:
    plan = planned("dpo", "trainer.devices=8", "trainer.precision=bf16")
    assert plan.change is not None
    base = ["trainer.devices=8", "trainer.precision=bf16"]
    needed = {k: v for k, v in plan.change.settings.items() if k != "model.sequence_parallel"}
    for left_out in needed:
        kept = {k: v for k, v in plan.change.settings.items() if k != left_out}
        if left_out == "model.tensor_model_parallel_size":
            kept.pop("model.sequence_parallel")
        settings = [f"{k}={getattr(v, 'value', v)}" for k, v in kept.items()]
        assert not planned("dpo", *base, *settings).fits, left_out


def test_more_devices_where_these_cannot_do() -> None:
    """18 bytes a weight are 135 GiB on one GPU, whatever is recomputed."""
    plan = planned("dpo", "trainer.precision=bf16")
    assert plan.change is not None
    assert plan.change.settings["trainer.devices"] in (2, 4)
    assert plan.change.memory.total <= plan.device.memory


def test_a_smaller_micro_batch_is_preferred_to_recomputing() -> None:
    base = ["trainer.devices=8", "trainer.precision=bf16", "model.use_distributed_optimizer=true"]
    base += ["model.tensor_model_parallel_size=4", "model.sequence_parallel=true"]
    plan = planned("dpo", *base, "model.micro_batch_size=16")
    assert not plan.fits and plan.change is not None
    assert plan.change.settings.keys() <= {"model.micro_batch_size", "model.logprob_chunk_size"}


# -- time -----------------------------------------------------------------------------------------


def test_operations_of_a_step_by_hand() -> None:
    """6 N D, with attention's 6 L channels s for each token and the head on answers alone."""
    plan = planned("dpo", given=("--prompt-tokens", "300", "--answer-tokens", "100"))
    (step,) = plan.time.stages
    tokens, targets = 64 * 2 * 400, 64 * 2 * 100
    _, layers = parameters(plan.arch)
    expected = 3 * (tokens * (2 * layers + 2 * 32 * 4096 * 400) + targets * 2 * 4096 * 128256)
    assert step.tokens == tokens and step.model_flops == expected
    assert step.flops == expected + 2 * 4096 * 128256 * targets  # the logits, computed again


def test_a_shared_prompt_is_computed_once() -> None:
    given = ("--prompt-tokens", "300", "--answer-tokens", "100")
    shared = planned("dpo", "model.share_prompts=true", given=given).time.stages[0]
    assert shared.tokens == 64 * (300 + 2 * 100)


def test_recomputing_costs_a_forward_pass() -> None:
    given = ("--prompt-tokens", "300", "--answer-tokens", "100")
    plain = planned("dpo", given=given)
    full = planned("dpo", "model.recompute_granularity=full", given=given)
    layers = Costs(plain.cfg, plain.arch, plain.rates).layers(64 * 2 * 400, 400)
    assert full.time.stages[0].flops - plain.time.stages[0].flops == pytest.approx(layers)
    assert full.time.stages[0].model_flops == plain.time.stages[0].model_flops


def test_seconds_from_stated_rates() -> None:
    given = ("--mfu", "0.5", "--peak-tflops", "100", "--tokens-per-second", "1000", "--rows", "640")
    plan = planned("spin", "trainer.devices=8", "algorithm.iterations=1", given=given)
    (step,) = plan.time.stages
    assert step.compute_s == pytest.approx(step.flops / (8 * 0.5 * 100e12))
    assert plan.time.before_rollout_s == 640 * plan.rates.answer_tokens / 8000
    assert step.steps == 10
    assert plan.time.total_s == pytest.approx(
        plan.time.before_s + plan.time.once_s["policy"] + step.seconds * step.steps * step.epochs
    )


def test_gradients_are_reduced_over_the_slower_link_between_nodes() -> None:
    base = ["trainer.devices=8", "trainer.precision=bf16"]
    rows = planned("dpo", *base, "model.micro_batch_size=1").scaling
    assert [row.devices for row in rows] == [8, 16, 32, 64, 128, 256, 512]
    # A ring sends 2 (d - 1) / d float32 gradients.
    for row in rows:
        share = (row.replicas - 1) / row.replicas
        assert row.step.reduced == pytest.approx(8 * 8_030_261_248 * share)
    assert rows[1].step.gradient_s > 5 * rows[0].step.gradient_s
    assert [row.raised for row in rows] == [False] * 4 + [True] * 3
    assert [row.batch for row in rows][-1] == 512


def test_bubbles_of_a_pipeline() -> None:
    """Two stages and 16 micro-batches: one of 16 in vain."""
    base = ["trainer.devices=2", "model.pipeline_model_parallel_size=2"]
    (step,) = planned("dpo", *base).time.stages
    assert step.bubble_s == pytest.approx(step.compute_s / 16)


def test_a_checkpoint_holds_what_a_stage_keeps() -> None:
    plan = planned("dpo", "trainer.precision=bf16", "algorithm.ref=ema", given=("--disk-gbs", "4"))
    assert plan.checkpoint == (2 + 12 + 4 + 2) * 8_030_261_248
    assert plan.checkpoint_s == plan.checkpoint / 4e9


# -- the command ----------------------------------------------------------------------------------


def test_rows_are_counted_where_the_data_is_there(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    plan = planned("dpo", f"data.train_path=[{data}]")
    assert plan.rates.rows == 2 and not plan.notes
    absent = planned("dpo", "data.train_path=[nowhere.jsonl]")
    assert absent.rates.rows == 10_000
    assert absent.notes == ("data.train_path: nowhere.jsonl does not exist",)


def test_the_shape_is_read_from_config_json_alone(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    for file in [*folder.glob("*.safetensors"), *folder.glob("tokenizer*")]:
        file.rename(tmp_path / f"{file.name}.away")
    cfg = plan_config(
        "dpo", [f"model.restore_from_path={folder}", "data.max_length=128", *_SHORT], None
    )
    plan = make_plan(cfg, arguments("--gpu", "cpu"))
    assert plan.arch.num_layers == 4 and plan.fits


_SHORT = ["data.max_prompt_length=64", "rollout.max_new_tokens=64"]


def test_exit_status_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config-name", "sgpo", *SHAPE, *FILES, "trainer.precision=bf16"]
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total"] == sum(found["memory"]["lines"].values())
    assert not found["memory"]["fits"] and found["cheapest_fit"]["settings"]
    assert [stage["name"] for stage in found["stages"]] == ["improver", "policy"]
    small = [*command, "trainer.devices=8", "model.lora.rank=16", "model.micro_batch_size=1"]
    assert main([*small, "--gpu", "h200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cheapest_fit"] is None


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config-name", "sgpo", *SHAPE, "trainer.precision=bf16"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("optimizer", "activations", "OVER", "It does not fit", "cheapest change", "512"):
        assert text in shown
    assert "40% of the device's peak reached in training (--mfu)" in shown
    assert "would refuse: algorithm.targets.endpoint.base_url" in shown


REFUSED = [
    (["model.tensor_model_parallel_size=3", "trainer.devices=3"], [], "does not divide"),
    (["model.pipeline_model_parallel_size=2"], [], "cannot be split into replicas"),
    (["model.global_batch_size=30"], [], "is not a multiple of"),
    (["model.architecture.num_layers=0"], [], "num_layers=0"),
    ([], ["--mfu", "1.5"], "--mfu 1.5: expected"),
    ([], ["--rows", "0"], "--rows 0: expected"),
    ([], ["--disk-gbs", "-1"], "--disk-gbs -1.0: expected"),
    ([], ["--prompt-tokens", "2000", "--answer-tokens", "90"], "pass data.max_length=2048"),
]


@pytest.mark.parametrize(("overrides", "given", "told"), REFUSED)
def test_refusals(
    overrides: list[str], given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "--config-name", "dpo", *given, *SHAPE, *overrides]
    assert main(command) > 1
    assert told in " ".join(capsys.readouterr().err.split())


def test_nothing_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config-name", "dpo"]) > 1
    assert "nothing to start from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted((conf_dir() / "cluster").glob("*.yaml")), ids=lambda f: f.stem
)
def test_clusters(file: Path) -> None:
    plan = planned("dpo", f"+cluster={file.stem}", "model.micro_batch_size=1")
    nodes, devices = map(int, file.stem.rpartition("_")[2].split("x"))
    assert (plan.cfg.trainer.num_nodes, plan.cfg.trainer.devices) == (nodes, devices)
    assert sizes_of(plan.cfg.model, nodes * devices).replicas == nodes * devices


def test_numbers_are_plain_json() -> None:
    plan = planned("osp", "trainer.devices=8", "trainer.precision=bf16", "algorithm.num_samples=4")
    text = json.dumps(as_json(replace(plan, notes=("a",))), allow_nan=False)
    assert json.loads(text)["notes"] == ["a"]
