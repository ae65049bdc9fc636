"""What a run's folder tells: of the whole run, of one step, of one pair."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import read_json
from nemo_selfpref.training.run_files import RunFiles, StageFiles
from nemo_selfpref.training.store import DROPPED, PLAN, read_completions
from nemo_selfpref.types import PreferencePair

_HIDDEN = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})


def printable(text: str, keep: str = "") -> str:
    r"""The text with everything but letters, marks, numbers, signs, spaces and `keep` written out
    (\x1b, \u202e), so that it cannot move the cursor, recolour or reorder what is read."""
    return "".join(c if c in keep or not _hides(c) else _written_out(c) for c in text)


def _hides(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def run_facts(run: RunFiles, stage: str | None = None) -> dict[str, Any]:
    """Each stage with its rows, weight versions and state; rows kept and dropped, by stage."""
    stages = [run.stage(stage)] if stage else run.stages
    return {
        "run": str(run.path),
        "algorithm": run.cfg.algorithm.name,
        "stages": [_stage_facts(s) for s in stages],
        "drops": [*_noted(run, stage), *(d for s in stages for d in _reported(s))],
    }


def _stage_facts(stage: StageFiles) -> dict[str, Any]:
    facts, origins = stage.facts(), _origins(stage)
    steps = len(stage.steps())
    state = "done" if stage.done else f"at step {steps}" if steps else "begun"
    return {
        "stage": stage.folder.name,
        "state": state,
        "rows": facts.get("rows", facts.get("answers", _rows_so_far(stage))),
        "steps": steps,
        "weight_versions": sorted({version for _, version in origins}),
        "sampled_by": sorted({weights for weights, _ in origins}),
    }


def _rows_so_far(stage: StageFiles) -> int:
    given = [stage.folder / "pairs.parquet", stage.folder / "completions.parquet"]
    files = [p for p in given if p.is_file()] or sorted((stage.folder / "pairs").glob("*.parquet"))
    try:
        return sum(pq.read_metadata(path).num_rows for path in files)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{stage.folder}: pairs or answers cannot be read: {error}"
        ) from error


def _origins(stage: StageFiles) -> set[tuple[str, int]]:
    """(weight set, version) of all answers sampled in a stage or put into its pairs."""
    completions = stage.folder / "completions.parquet"
    if completions.is_file():
        return {(c.weight_set.value, c.weight_version) for c in read_completions(completions)}
    pairs = list(stage.given_pairs() or ()) + [p for _, made in stage.made_pairs() for p in made]
    sides = [pair.provenance.get(side) for pair in pairs for side in ("chosen", "rejected")]
    return {(s["weight_set"], s["weight_version"]) for s in sides if isinstance(s, dict)}


def _noted(run: RunFiles, stage: str | None) -> list[dict[str, Any]]:
    if stage is not None:
        return []
    return [
        {name: f.get(name, {}) for name in ("stage", "kept", "dropped", "examples")}
        for f in run.summary()
        if "kept" in f
    ]


def _reported(stage: StageFiles) -> list[dict[str, Any]]:
    """What an online stage left out; before its end as its newest checkpoint knows."""
    reports = stage.facts().get("reports", {})
    states = sorted(stage.folder.glob("checkpoints/step-*/rollouts/state.json"))
    if not stage.done and states:
        reports = read_json(states[-1]).get("reports", {})
    return [{"stage": f"{stage.folder.name}: {title}", **r} for title, r in reports.items()]


def counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))


def plan_of(stage: StageFiles) -> StepPlan | None:
    """Which rows each step of a training stage takes; None where an earlier version made it."""
    path = stage.folder / PLAN
    return StepPlan(**read_json(path)) if path.is_file() else None


def step_facts(run: RunFiles, step: int, stage_name: str | None = None) -> dict[str, Any]:
    """The ids a step trained on, None where that was not kept, and what was measured in it."""
    stage = run.trained(step, stage_name)
    pairs = recorded_rows(run, stage, step)
    ids = None if pairs is None else [pair.id for pair in pairs]
    measured = stage.measured(step)
    return {"stage": stage.folder.name, "step": step, "pairs": ids, "metrics": measured}


def recorded_rows(run: RunFiles, stage: StageFiles, step: int) -> list[PreferencePair] | None:
    """The pairs a step trained on, as they were kept; None where they were not."""
    if stage.pairs_file(step).is_file():
        return stage.pairs_of(step)
    given = stage.given_pairs()
    plan = plan_of(stage) if given else None
    return [given[n] for n in plan.rows_of_step(step - 1)] if given and plan else None


def pair_facts(
    run: RunFiles, id: str, stage_name: str | None = None, step: int | None = None
) -> dict[str, Any]:
    """All that is known of a pair, once for each stage that trained on it.

    Raises:
        ConfigError: no stage has it, or not in that step; the message says what came of answers
            to a prompt of that id.
    """
    stages = [run.stage(stage_name)] if stage_name else run.stages
    tokenizer = run.tokenizer()
    found = [f for s in stages if (f := _in_stage(run, s, id, tokenizer)) is not None]
    if step is not None:
        found = [f for f in found if f["steps"] is None or str(step) in f["steps"]]
    if not found:
        where = (f" in stage {stage_name}" if stage_name else "") + (
            f" at step {step}" * bool(step)
        )
        raise ConfigError(f"--pair {printable(id)}: not trained on{where}. {_unpaired(run, id)}")
    return {"id": id, "found": found}


def _in_stage(
    run: RunFiles, stage: StageFiles, id: str, tokenizer: ChatTokenizer
) -> dict[str, Any] | None:
    given = stage.given_pairs()
    found = _made(stage, id) if given is None else _given(run, stage, given, id)
    if found is None:
        return None
    pair, rest = found
    return {"stage": stage.folder.name, **_facts(pair, tokenizer), **rest}


def _given(
    run: RunFiles, stage: StageFiles, pairs: Sequence[PreferencePair], id: str
) -> tuple[PreferencePair, dict[str, Any]] | None:
    place = next((n for n, pair in enumerate(pairs) if pair.id == id), None)
    if place is None:
        return None
    plan = plan_of(stage)
    steps = None if plan is None else _steps_of_row(plan, place, len(stage.steps()))
    return pairs[place], {"steps": steps, **_reference(stage, place)}


def _made(stage: StageFiles, id: str) -> tuple[PreferencePair, dict[str, Any]] | None:
    steps, (pair, kept) = Counter[str](), _kept(stage, id)
    for number, made in stage.made_pairs():
        for own in (p for p in made if p.id == id):
            pair = own
            steps[str(number)] += 1
    return None if pair is None else (pair, {"steps": dict(steps), **kept})


def _kept(stage: StageFiles, id: str) -> tuple[PreferencePair | None, dict[str, Any]]:
    """A pair that the newest checkpoint keeps for later draws, and what it knows of its use."""
    checkpoint, pairs, state = stage.buffered() or ("", [], {})
    pair = next((pair for pair in pairs if pair.id == id), None)
    if pair is None:
        return None, {}
    known = {name: state.get(name, {}).get(id) for name in ("counts", "pushed_steps")}
    return pair, {"kept": {"checkpoint": checkpoint, **known}}


def _steps_of_row(plan: StepPlan, row: int, done: int) -> dict[str, int]:
    """By step, counted from 1, how often a row was trained on."""
    # An epoch's order depends on the seed alone, so one step of all rows shows it whole.
    whole = replace(plan, global_batch_size=plan.num_rows, max_steps=-1)
    places = enumerate(whole.rows_of_step(epoch).index(row) for epoch in range(plan.max_epochs))
    size, per_epoch = plan.global_batch_size, plan.steps_per_epoch
    steps = (epoch * per_epoch + place // size + 1 for epoch, place in places)
    return {str(step): 1 for step in steps if step <= done}


def _facts(pair: PreferencePair, tokenizer: ChatTokenizer) -> dict[str, Any]:
    texts = {"prompt": pair.prompt_ids, "chosen": pair.chosen_ids, "rejected": pair.rejected_ids}
    if pair.augmented_prompt_ids is not None:
        texts["augmented_prompt"] = pair.augmented_prompt_ids
    return {
        **{side: tokenizer.decode(ids, skip_special_tokens=False) for side, ids in texts.items()},
        "tokens": {side: len(ids) for side, ids in texts.items()},
        "strength": pair.strength,
        "provenance": dict(pair.provenance),
    }


def _reference(stage: StageFiles, row: int) -> dict[str, Any]:
    """Log-prob sums that were scored once, before the first step."""
    path = stage.folder / "reference.safetensors"
    if not path.is_file():
        return {}
    from safetensors.numpy import load_file

    return {"logprobs": {name: float(v[row]) for name, v in sorted(load_file(path).items())}}


def _unpaired(run: RunFiles, id: str) -> str:
    """What is known of an id that no pair has."""
    prompt = id.partition("@")[0].partition("/")[0]
    sampled = [
        s.folder.name
        for s in run.stages
        if (path := s.folder / "completions.parquet").is_file()
        and any(c.id == id or c.id.partition("/")[0] == prompt for c in read_completions(path))
    ]
    drops = [*_noted(run, None), *(d for s in run.stages for d in _reported(s))]
    reasons = sum((Counter(d["dropped"]) for d in drops), Counter())
    answered = f"Answers to that prompt are in {', '.join(sampled)}. " if sampled else ""
    found = "".join(f"Dropped: {d['title']}, {d['reason']} ({d['row']}). " for d in _drops(run, id))
    return f"{answered}{found}Dropped in the whole run: {counts(reasons) or 'nothing'}."


def _drops(run: RunFiles, row: str) -> Iterator[dict[str, str]]:
    """Where a row, named as FILE:LINE, was left out."""
    kept = [*run.path.glob(f"{DROPPED}/*.jsonl"), *run.path.glob("stages/*/pairs/*.jsonl")]
    for path in sorted(kept):
        for line in path.read_text(encoding="utf-8").splitlines():
            drop = json.loads(line)
            if drop["row"] == row or drop["row"].rpartition("/")[2] == row:
                yield drop
