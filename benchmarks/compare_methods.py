"""Every method on the demo's task: one starting model, one budget of generated tokens, three seeds.

    python benchmarks/compare_methods.py --out runs/compare

The score is the oracle's, on held-out prompts that nothing was chosen on; with --development it is
taken on the development prompts, for choosing rates. Methods on given pairs generate nothing and
take as many pairs as the budget buys SPIN. Prints a table and writes OUT/scores.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from nemo_selfpref import __version__
from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.config.paths import conf_dir
from nemo_selfpref.data.dataset import load_prompts
from nemo_selfpref.demo.run import PROMPTS, DemoSize, write_data
from nemo_selfpref.demo.task import corrupt, score
from nemo_selfpref.demo.teacher import MODEL, serving
from nemo_selfpref.files import read_json, write_json, write_text
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.generate import answer_prompts
from nemo_selfpref.training.train import train
from nemo_selfpref.types import SamplingParams

ANSWER_TOKENS = 13
"""Mean length of the starting model's answers, end of turn included."""
_JUDGE_PROMPT = """\
Which response is better?
{{instruction}}
RESPONSE A:{{response_a}}
RESPONSE B:{{response_b}}
"""
_SHARED = [
    "model.micro_batch_size=64",
    "model.global_batch_size=64",
    "model.optim.lr=5e-5",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1000",
    "data.max_length=256",
    "data.max_prompt_length=200",
    "rollout.max_new_tokens=24",
    "rollout.batch_size=256",
    "exp_manager.create_tensorboard_logger=false",
    "export.hf=false",
]
_JUDGED = [
    "algorithm.judge.prompt={prompts}/judge.txt",
    "algorithm.judge.augmentation.num_pairs=1000",
    "algorithm.judge.augmentation.path=[{data}]",
    "algorithm.judge.augmentation.optim.lr=1e-4",
]
_SR = [
    "algorithm.augment_prompt={prompts}/augment.txt",
    "model.optim.name=adamw",
    "model.optim.sched.warmup_steps=5",
]
_SAPO = ["algorithm.segment_length=8", "algorithm.ref_every=10", "model.optim.name=adamw"]


@dataclass(frozen=True)
class Method:
    """A configuration and what it generates: answers a prompt (of ANSWER_TOKENS tokens each)."""

    config: str
    answers: float = 0.0
    overrides: list[str] = field(default_factory=list)


METHODS = {
    "sft": Method("sft"),
    "dpo": Method("dpo"),
    "cdpo": Method("cdpo"),
    "ipo": Method("ipo"),
    "orpo": Method("orpo"),
    "sr_dpo": Method("sr_dpo", 0, _SR),
    "sr_ipo": Method("sr_ipo", 0, _SR),
    "spin": Method("spin", 2, ["algorithm.iterations=2", "algorithm.last_beta=0.1"]),
    "sapo (dpo)": Method("self_augmented_po", 8 / ANSWER_TOKENS, _SAPO),
    "sapo (orpo)": Method(
        "self_augmented_po_orpo",
        8 / ANSWER_TOKENS,
        ["algorithm.segment_length=8", "model.optim.sched.warmup_steps=5"],
    ),
    "sgpo": Method(
        "sgpo",
        2.5,
        [
            "algorithm.beta=0.1",
            "algorithm.improver.max_epochs=1",
            "algorithm.improver.optim.lr=3e-5",
            "algorithm.targets.endpoint.base_url={url}",
            f"algorithm.targets.endpoint.model={MODEL}",
            *(f"algorithm.{n}_prompt={PROMPTS / n}.txt" for n in ("target", "improve", "refine")),
        ],
    ),
    "osp": Method("osp", 7, _JUDGED),
    "self_rewarding": Method("self_rewarding", 8, _JUDGED),
    "raft": Method("raft", 8, _JUDGED),
    "rso": Method("rso", 8, _JUDGED),
}


def prepare(out: Path) -> Path:
    """Data, prompts and the starting model below `out`, made once; returns the model."""
    data = out / "data"
    if not (data / "pairs.jsonl").exists():
        write_text(out / "prompts" / "judge.txt", _JUDGE_PROMPT)
        write_data(data, DemoSize())
        rows = [json.loads(line) for line in (data / "sgpo.jsonl").read_text().splitlines()]
        rng = random.Random(11)
        pairs = [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": rejected}
            for r in rows
            if (rejected := corrupt(r["completion"], rng)) != r["completion"]
        ]
        write_text(out / "prompts" / "augment.txt", "Answer with great care: {{query}}\n")
        write_text(data / "pairs.jsonl", "".join(json.dumps(p) + "\n" for p in pairs))
    model = out / "start" / "checkpoint"
    if not model.exists():
        _train(
            "demo_sft",
            conf_dir() / "demo",
            [
                "name=start",
                f"exp_manager.exp_dir={out}",
                f"model.tokenizer.path={data / 'tokenizer.model'}",
                f"data.train_path=[{data / 'sft.jsonl'}]",
                "export.hf=false",
            ],
        )
    return model


def _train(config: str, folder: Path, overrides: Sequence[str]) -> None:
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    train(load_config(config, overrides, schemas, folder))


def run_once(
    out: Path, model: Path, name: str, seed: int, budget: int, url: str, prompts: Path, engine: str
) -> dict[str, Any]:
    """Train one method with one seed and score it; a finished one is read back."""
    slug = re.sub("[^a-z_]+", "-", name).strip("-")
    run = out / "runs" / (f"{slug}-{seed}" + ("" if engine == "embedded" else f"-{engine}"))
    result = out / "results" / prompts.stem / f"{run.name}.json"
    if result.exists():
        return read_json(result)
    method = METHODS[name]
    rows = round(budget / ANSWER_TOKENS / (method.answers or METHODS["spin"].answers))
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    _train(
        method.config,
        conf_dir(),
        [
            f"name={run.name}",
            f"seed={seed}",
            f"exp_manager.exp_dir={run.parent}",
            f"model.restore_from_path={model}",
            f"data.train_path=[{out / 'data' / 'pairs.jsonl'}]",
            f"data.limit={min(rows, 2700)}",
            f"rollout={engine}",
            *_SHARED,
            *(
                o.format(url=url, prompts=out / "prompts", data=out / "data" / "pairs.jsonl")
                for o in method.overrides
            ),
        ],
    )
    seconds = time.monotonic() - started
    summary = read_json(run / "summary.json")
    found = {
        "seconds": seconds,
        "generated": sum(int(s.get("generated_tokens", 0)) for s in summary),
        "trained": sum(int(s.get("tokens", 0)) for s in summary if "steps" in s),
        **evaluate(run / "checkpoint", prompts),
    }
    write_json(result, found)
    shutil.rmtree(run / "stages")
    return found


def evaluate(model: Path, prompts: Path) -> dict[str, float]:
    """Mean oracle score of sampled (T 0.7) and of greedy answers."""
    rows = load_prompts(prompts)
    found = {}
    for kind, params in (
        ("sampled", SamplingParams(24, 0.7, 0.9)),
        ("greedy", SamplingParams(24, 0.0)),
    ):
        answers = answer_prompts(model, rows, params, 7, Console(enabled=False))
        scores = [
            score(messages[0]["content"], text)
            for (_, messages), (_, text) in zip(rows, answers, strict=True)
        ]
        found[kind] = mean(scores)
    return found


def report(found: dict[str, list[dict[str, Any]]], start: dict[str, float]) -> None:
    """Scores of each method, best first, with the spread over its seeds."""
    console = Console()
    rows = [["start (SFT)", start["sampled"], 0.0, start["greedy"], 0.0, 0, 0, 0.0]]
    ranked = sorted(found.items(), key=lambda item: -mean(r["sampled"] for r in item[1]))
    for name, runs in ranked:
        sampled, greedy = ([r[kind] for r in runs] for kind in ("sampled", "greedy"))
        spread = [stdev(values) if len(values) > 1 else 0.0 for values in (sampled, greedy)]
        costs = [mean(r[kind] for r in runs) for kind in ("generated", "trained", "seconds")]
        costs = [round(costs[0]), round(costs[1]), costs[2]]
        rows.append([name, mean(sampled), spread[0], mean(greedy), spread[1], *costs])
    console.table(
        f"Oracle score, mean over seeds (nemo_selfpref {__version__}, torch {torch.__version__})",
        ("method", "T 0.7", "sd", "greedy", "sd", "generated", "trained tokens", "seconds"),
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--budget", type=int, default=60_000, help="generated tokens a run")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--development", action="store_true", help="score on development prompts")
    parser.add_argument("--engine", choices=["embedded", "vllm"], default="embedded")
    args = parser.parse_args()
    out = args.out.resolve()
    model = prepare(out)
    name = "development" if args.development else "held_out"
    prompts = out / "data" / f"{name}.jsonl"
    with serving() as url:
        found = {
            method: [
                run_once(out, model, method, seed, args.budget, url, prompts, args.engine)
                for seed in args.seeds
            ]
            for method in args.methods
        }
    start = evaluate(model, prompts)
    write_json(out / f"scores-{name}-{args.engine}.json", {"start": start, "methods": found})
    report(found, start)


if __name__ == "__main__":
    main()
