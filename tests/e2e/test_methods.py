"""Every registered method trains three steps with finite numbers, goes on bitwise where it was
interrupted, and is the same on two tensor-parallel processes as on one.

The methods come from the registry, so a new one is covered as soon as it has a configuration.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import settings, write_jsonl
from tiny import save_llama

from nemo_selfpref.algorithms.base import algorithms

WORKER = Path(__file__).parent / "many_runs.py"
STEPS = 3
UNCUT = "algorithm.drop_truncated_chosen=false"  # an untrained model never ends its answers
SETTINGS = {
    "raft": ["algorithm.drop_truncated=false", "algorithm.num_samples=4"],
    "rso": [UNCUT, "algorithm.num_samples=4", "algorithm.num_accepted=2"],
    "self_rewarding": [UNCUT],
    "spin": ["algorithm.iterations=3"],
    "osp": ["algorithm.num_samples=4", "algorithm.judge.augmentation.num_pairs=12"],
    "self_augmented_po": [
        "algorithm.segment_length=6",
        "algorithm.ema_every=1",
        "algorithm.ref_every=1",
        "algorithm.replay_capacity=10",
    ],
    "sgpo": [UNCUT, "algorithm.targets.source=file", "algorithm.improver.max_epochs=1"],
}
"""What a method needs besides its defaults to train a random model on twelve rows."""
OTHERS = {
    "dpo-policy": ["algorithm.ref=policy", "algorithm.ref_every=2"],
    "ipo-ema": ["algorithm.ref=ema", "algorithm.ref_every=2", "algorithm.ema_every=1"],
    "sr_dpo-ema": ["algorithm.ref=ema", "algorithm.ref_every=1", "algorithm.ema_every=1"],
    "spin-ema": ["algorithm.iterations=2", "algorithm.ref=ema", "algorithm.ref_every=1"],
    "self_rewarding-last": [UNCUT, "algorithm.ref=last"],
    "osp-policy": [
        *("algorithm.num_samples=4", "algorithm.pairing=random"),
        *("algorithm.ref=policy", "algorithm.ref_every=1"),
    ],
    "osp-raft": [
        *("algorithm.num_samples=4", "algorithm.pairing=raft"),
        *("algorithm.loss=sft", "algorithm.ref=none"),
    ],
    "osp-rso": ["algorithm.num_samples=4", "algorithm.sampling=rso", "algorithm.loss=ipo"],
    "self_augmented_po-orpo": [
        *("algorithm.loss=orpo", "algorithm.ref=none", "algorithm.segment_length=6"),
        "algorithm.ema_every=1",
    ],
    "self_augmented_po-on_policy": ["algorithm.sampler=policy", "algorithm.segment=false"],
    "sgpo-dagger": [*SETTINGS["sgpo"], "algorithm.variant=dagger", "algorithm.ref=frozen"],
}
"""Reference modes, samplers and variants besides: METHOD-NAME and its settings."""
CASES = {name: SETTINGS.get(name, []) for name in algorithms()} | OTHERS
FAST = ("sr_dpo", "self_augmented_po", "osp")
"""One on given pairs, one online with copies that move at every step, one judged after a stage
that teaches the judge."""


@dataclass(frozen=True)
class Runs:
    """Where each case's runs are: on one process, cut after a step and resumed, on two."""

    folder: Path
    output: str

    def of(self, kind: str, case: str) -> Path:
        run = self.folder / kind / case
        assert (run / "summary.json").is_file(), self.output
        return run


def arguments(folder: Path, kind: str, case: str, *more: str) -> list[str]:
    """`selfpref train` of a case, in FOLDER/KIND/CASE."""
    method = case.split("-")[0]
    rollout = ["rollout.max_new_tokens=8", "rollout.temperature=1.0", "rollout.top_p=1.0"]
    every = "exp_manager.checkpoint_callback_params"
    given = [
        *settings(folder / kind, case, folder / "llama", folder / "rows.jsonl"),
        *("data.max_length=640", "data.max_prompt_length=560", "model.global_batch_size=4"),
        # Where a gradient is rounding noise Adam would move by the noise's sign.
        *("model.optim.eps=1e-4", "model.optim.sched.warmup_steps=0"),
        *("model.optim.sched.warmup_ratio=0", f"trainer.max_steps={STEPS}"),
        *(f"{every}.every_n_train_steps=1", f"{every}.save_top_k=-1", "export.hf=false"),
        *rollout,
        *CASES[case],
        *more,
    ]
    if method == "sgpo":
        given.append(f"algorithm.targets.path={folder / 'answers.jsonl'}")
    return ["train", "--config-name", method, *given]


def write_inputs(folder: Path) -> None:
    """A tiny Llama with room for the judge's prompts, twelve pairs, and targets for them.

    Its weights are so large that a few tokens of the 500 are likely: the fewer the ends of the
    likely ones' intervals, the less often a draw falls so near to one that rounding, which differs
    between layouts, decides.
    """
    save_llama(folder / "llama", max_position_embeddings=768, initializer_range=0.3)
    rows = [
        {
            "id": f"r{n}",
            "prompt": f"How much is {n} plus {n + 3}?",
            "chosen": f"It is {2 * n + 3}, gladly. " * (1 + n % 3),
            "rejected": f"{2 * n + 3}. Go away.",
        }
        for n in range(4 * STEPS)
    ]
    write_jsonl(folder / "rows.jsonl", rows)
    kinds = {"improve": "chosen", "answer": "rejected"}
    targets = [
        {"id": f"{row['id']}/{kind}", "answer": row[side]}
        for row in rows
        for kind, side in kinds.items()
    ]
    write_jsonl(folder / "answers.jsonl", targets)


def work(commands: Path, *launcher: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(WORKER), str(commands)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return done.stdout[-6000:] + done.stderr[-6000:]


def run_cases(folder: Path, cases: list[str]) -> Runs:
    write_inputs(folder)
    alone: list[list[str]] = []
    for case in cases:
        one, resumed = folder / "one" / case, folder / "resumed" / case
        alone.append(arguments(folder, "one", case))
        alone.append(["cut", str(one), str(resumed)])
        alone.append(arguments(folder, "resumed", case))
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    together = [arguments(folder, "two", case, *layout) for case in cases]
    (folder / "alone.json").write_text(json.dumps(alone))
    (folder / "together.json").write_text(json.dumps(together))
    output = work(folder / "alone.json")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return Runs(folder, output + work(folder / "together.json", *launcher))


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("sample"), list(FAST))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_cases(tmp_path_factory.mktemp("matrix"), [c for c in CASES if c not in FAST])


@pytest.fixture(
    params=[pytest.param(c, marks=[] if c in FAST else [pytest.mark.slow]) for c in CASES]
)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def runs(request: pytest.FixtureRequest, case: str) -> Runs:
    return request.getfixturevalue("sample" if case in FAST else "matrix")


def training_stages(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob("stages/*/metrics.jsonl"))


def steps_of(stage: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def measured(stage: Path) -> list[dict[str, float]]:
    """The steps without accuracies, which are signs of margins that are rounding noise at first."""
    return [
        {name: value for name, value in step.items() if not name.endswith("accuracies")}
        for step in steps_of(stage)
    ]


def files(run: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob(pattern))}


def sampled(run: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(file, id, tokens) of every answer sampled, and of both sides of every pair trained on."""
    for path in sorted(run.glob("stages/*/completions.parquet")):
        for row in pq.read_table(path).to_pylist():
            yield path.parent.name, row["id"], row["token_ids"]
    for path in sorted(run.glob("stages/**/pairs*/*.parquet")) + sorted(
        run.glob("stages/*/pairs.parquet")
    ):
        for row in pq.read_table(path).to_pylist():
            name = str(path.relative_to(run))
            yield name, row["id"], row["chosen_ids"] + [-1] + row["rejected_ids"]


def test_three_steps_with_finite_numbers(runs: Runs, case: str) -> None:
    stages = training_stages(runs.of("one", case))
    assert stages
    for stage in stages:
        steps = steps_of(stage)
        assert [step["step"] for step in steps] == list(range(1, STEPS + 1)), stage.name
        assert {"loss", "lr", "grad_norm", "tokens"} <= steps[0].keys()
        assert all(math.isfinite(value) for step in steps for value in step.values()), steps
        assert steps[0]["grad_norm"] > 0


def test_an_interrupted_run_goes_on_bitwise(runs: Runs, case: str) -> None:
    one, resumed = runs.of("one", case), runs.of("resumed", case)
    last = training_stages(one)[-1].relative_to(one)
    first = "checkpoints/step-000001/checkpoint.json"
    times = [(run / last / first).stat().st_mtime_ns for run in (one, resumed)]
    assert times[0] == times[1], "the first step was done again"
    for pattern in ("stages/*/metrics.jsonl", "checkpoint/**/*.safetensors", "stages/*/pairs/*"):
        assert files(resumed, pattern) == files(one, pattern), pattern
    assert files(one, "checkpoint/**/*.safetensors")


def test_two_processes_are_as_one(runs: Runs, case: str) -> None:
    one, two = runs.of("one", case), runs.of("two", case)
    ours, theirs = training_stages(one), training_stages(two)
    assert [stage.name for stage in theirs] == [stage.name for stage in ours]
    fork = first_fork(one, two, after=ours[0].name)
    for a, b in zip(ours, theirs, strict=True):
        if fork is not None and a.name >= fork:
            break
        for step, other in zip(measured(a), measured(b), strict=True):
            assert other == pytest.approx(step, rel=1e-3, abs=1e-3), (a.name, step["step"])


def first_fork(one: Path, two: Path, after: str) -> str | None:
    """The stage where an answer of the two runs differs for the first time; None if none does.

    Trained weights differ by rounding, and a draw that near to the border of a token's interval
    falls on either side: one answer in 30 may, and later stages then train on another pair. Before
    stage `after` nothing has been trained and all answers must be the same.
    """
    ours, theirs = list(sampled(one)), list(sampled(two))
    assert [answer[:2] for answer in theirs] == [answer[:2] for answer in ours]
    forks = [stage_of(a[0]) for a, b in zip(ours, theirs, strict=True) if a != b]
    if not forks:
        return None
    first = min(forks)
    answers = [a for a in ours if stage_of(a[0]) == first]
    assert first > after and forks.count(first) <= max(len(answers) // 30, 1)
    return first


def stage_of(name: str) -> str:
    """The stage's folder, of a name that `sampled` gives."""
    return name.removeprefix("stages/").split("/")[0]


def test_the_sample_is_of_the_matrix() -> None:
    assert set(FAST) <= set(CASES)
    assert {case.split("-")[0] for case in CASES} == set(algorithms())
