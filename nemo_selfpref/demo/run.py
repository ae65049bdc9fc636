"""`selfpref demo`: SGPO end to end on a small task, with nothing at hand but this package.

The starting model is trained from random weights by the project's own SFT; the external model of
SGPO's first step answers over a real OpenAI-compatible endpoint on loopback (demo/teacher.py). Both
trainings are ordinary `selfpref train` commands, printed as they run.
"""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_selfpref.config.paths import conf_dir
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.demo.task import corrupt, make_instructions, oracle, score
from nemo_selfpref.demo.teacher import MODEL, serving
from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.files import read_json, write_json, write_text
from nemo_selfpref.monitor.console import SUMMARY_COLUMNS, Console, summary_rows

PROMPTS = Path(__file__).parent / "prompts"
_HELD_OUT, _DEVELOPMENT = 300, 200
_CARELESS = 0.6
_SEED, _HELD_OUT_SEED = 7, 20261121


@dataclass(frozen=True)
class DemoSize:
    """How much the demo makes and trains on."""

    plain: int = 4000
    """SFT rows that are plain instructions, most with a careless answer."""
    refinements: int = 4000
    """SFT rows that show a wrong answer and the right one and ask for the right one: reading a
    reference is a skill that SGPO expects of its starting model."""
    prompts: int = 3000
    """Prompts of the SGPO run."""


def run_demo(out: Path, overrides: Sequence[str], size: DemoSize = DemoSize()) -> dict[str, Any]:
    """Run everything below `out`; returns the scores, also written to out/scores.json.

    Raises:
        SelfPrefError: one of the two trainings failed.
    """
    started = time.monotonic()
    console = Console()
    data = write_data(out / "data", size)
    console.say(f"data and tokenizer in {out / 'data'}")
    # The start is trained on given answers: engines would have nothing to do.
    for_start = [o for o in overrides if not o.startswith("rollout")]
    _train(console, "demo_sft", out, [f"data.train_path=[{data / 'sft.jsonl'}]", *for_start])
    with serving() as url:
        _train(
            console,
            "demo_sgpo",
            out,
            [
                f"model.restore_from_path={out / 'sft' / 'checkpoint'}",
                f"data.train_path=[{data / 'sgpo.jsonl'}]",
                f"algorithm.targets.endpoint.base_url={url}",
                f"algorithm.targets.endpoint.model={MODEL}",
                *(
                    f"algorithm.{n}_prompt={PROMPTS / n}.txt"
                    for n in ("target", "improve", "refine")
                ),
                *overrides,
            ],
        )
    scores = evaluate(out, data, console)
    write_json(out / "scores.json", scores)
    _report(console, out, scores, time.monotonic() - started)
    return scores


def write_data(folder: Path, size: DemoSize) -> Path:
    """Rows for both trainings, held-out prompts, tokenizer; no instruction is in two sets."""
    from nemo_selfpref.data.sentencepiece_tokenizer import train_sentencepiece

    held_out = make_instructions(_HELD_OUT, _HELD_OUT_SEED)
    development = make_instructions(_DEVELOPMENT, _SEED + 1, frozenset(held_out))
    total = size.plain + size.refinements + size.prompts
    others = make_instructions(total, _SEED + 2, frozenset(held_out + development))
    plain = others[: size.plain]
    refined = others[size.plain : size.plain + size.refinements]
    rows = _careless_rows(plain) + _refinement_rows(refined)
    _write_jsonl(folder / "sft.jsonl", rows)
    _write_jsonl(folder / "sgpo.jsonl", [_row(text) for text in others[-size.prompts :]])
    for name, texts in (("held_out", held_out), ("development", development)):
        _write_jsonl(folder / f"{name}.jsonl", [{"prompt": text} for text in texts])
    texts = [value for row in rows for value in row.values()]
    train_sentencepiece(texts, 384, str(folder / "tokenizer"))
    return folder


def _row(instruction: str) -> dict[str, str]:
    return {"prompt": instruction, "completion": oracle(instruction)}


def _careless_rows(instructions: Sequence[str]) -> list[dict[str, str]]:
    rng = random.Random(_SEED)
    rows = [_row(text) for text in instructions]
    for row in rows:
        if rng.random() < _CARELESS:
            row["completion"] = corrupt(row["completion"], rng)
    return rows


def _refinement_rows(instructions: Sequence[str]) -> list[dict[str, str]]:
    rng = random.Random(_SEED)
    template = refine_template()
    rows = []
    for instruction in instructions:
        right = oracle(instruction)
        prompt = template.render(
            instruction=instruction, reference=right, response=corrupt(right, rng)
        )
        rows.append({"prompt": prompt, "completion": right})
    return rows


def refine_template() -> PromptTemplate:
    slots = frozenset({"instruction", "response", "reference"})
    return load_template(str(PROMPTS / "refine.txt"), slots)


def _write_jsonl(path: Path, rows: Sequence[dict[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _train(console: Console, config: str, out: Path, overrides: Sequence[str]) -> None:
    """One `selfpref train` as a command of its own."""
    name = config.removeprefix("demo_")
    arguments = [
        "train",
        "--config-dir",
        str(conf_dir() / "demo"),
        "--config-name",
        config,
        f"name={name}",
        f"exp_manager.exp_dir={out}",
        f"model.tokenizer.path={out / 'data' / 'tokenizer.model'}",
        *overrides,
    ]
    console.say(f"\n$ selfpref {shlex.join(arguments)}")
    command = [sys.executable, "-m", "nemo_selfpref.cli", *arguments]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise SelfPrefError(f"the {name} training ended with status {status}; see above")


def evaluate(out: Path, data: Path, console: Console) -> dict[str, Any]:
    """Oracle scores on the held-out prompts of each model, and of the improver's revisions of the
    SFT model's answers."""
    from nemo_selfpref.data.dataset import load_prompts

    prompts = load_prompts(data / "held_out.jsonl")
    improver = next((out / "sgpo" / "stages").glob("*-improver")) / "weights"
    models = {
        "SFT policy": out / "sft" / "checkpoint",
        "improver": improver,
        "SGPO policy": out / "sgpo" / "checkpoint",
    }
    console.say(f"\nscoring {len(prompts)} held-out prompts")
    instructions = [messages[0]["content"] for _, messages in prompts]
    scores, answers = {}, {}
    for name, model in models.items():
        answers[name], scores[name] = _answer_and_score(model, prompts, instructions)
    template = load_template(str(PROMPTS / "improve.txt"), frozenset({"instruction", "response"}))
    revise = [
        (name, ({"role": "user", "content": template.render(instruction=text, response=draft)},))
        for (name, _), text, draft in zip(prompts, instructions, answers["SFT policy"], strict=True)
    ]
    _, scores["improver, revising SFT answers"] = _answer_and_score(improver, revise, instructions)
    return scores


def _answer_and_score(
    model: Path, prompts: Sequence[Any], instructions: Sequence[str]
) -> tuple[list[str], dict[str, float]]:
    """Sampled answers of a model, and the scores of those and of its greedy answers."""
    from nemo_selfpref.training.generate import answer_prompts
    from nemo_selfpref.types import SamplingParams

    silent = Console(enabled=False)
    sampled, greedy = (
        [
            text
            for _, text in answer_prompts(
                model, prompts, SamplingParams(24, temperature, top_p), _SEED, silent
            )
        ]
        for temperature, top_p in ((0.7, 0.9), (0.0, 1.0))
    )
    return sampled, {**_mean(instructions, sampled), "greedy": _mean(instructions, greedy)["score"]}


def _mean(instructions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    found = [score(i, a) for i, a in zip(instructions, answers, strict=True)]
    mean = sum(found) / len(found)
    variance = sum((s - mean) ** 2 for s in found) / (len(found) - 1)
    exact = sum(s == 1.0 for s in found) / len(found)
    return {"score": mean, "error": (variance / len(found)) ** 0.5, "exact": exact}


def _report(console: Console, out: Path, scores: dict[str, Any], seconds: float) -> None:
    for name in ("sft", "sgpo"):
        rows = summary_rows(read_json(out / name / "summary.json"))
        console.table(f"What was run: {name}", SUMMARY_COLUMNS, rows)
    console.table(
        f"Oracle score on {_HELD_OUT} held-out prompts (0 to 1)",
        ("model", "temperature 0.7", "standard error", "exactly right", "greedy"),
        [[name, s["score"], s["error"], s["exact"], s["greedy"]] for name, s in scores.items()],
    )
    gain = scores["SGPO policy"]["score"] - scores["SFT policy"]["score"]
    console.say(f"SGPO moved the sampled score by {gain:+.3f} from the SFT model's.")
    console.say(f"checkpoint  {out / 'sgpo' / 'checkpoint'}")
    console.say(f"HF export   {out / 'sgpo' / 'hf'}")
    console.say(f"log         {out / 'sgpo' / 'stages'}")
    console.say(f"took        {seconds:.0f} s")
