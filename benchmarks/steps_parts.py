"""The measurements of steps.py, one function each: Bench in, Part out."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError, Spread, child_environment, run_child
from steps_kit import (
    Bench,
    Facts,
    Measured,
    Part,
    Ratio,
    Rounds,
    Stage,
    Trainee,
    added,
    check_alike,
    counted,
    interleave,
    ratio,
    ratio_of,
    raw,
    seconds_of,
    speed_rows,
)

from nemo_selfpref.algorithms.base import Averaging
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.data.batching import PackedBatch, collate, sequences_of
from nemo_selfpref.data.packing import PackingRule, micro_batches
from nemo_selfpref.files import read_json
from nemo_selfpref.objectives.objective import DPOObjective, Objective, SFTObjective, SrDPOObjective
from nemo_selfpref.pairing.segments import Segment, plan_segment, splice
from nemo_selfpref.rollout.sampling import seed_of, uniform
from nemo_selfpref.training.reference_cache import HIT_RATE
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import (
    Demonstration,
    GenerationRequest,
    PreferencePair,
    SamplingParams,
    TokenIds,
    TrainingRow,
    WeightSet,
)

_RTOL = 1e-3
_PAD = 0
_SPEED = ("variant", "tokens", "s", "range", "CPU s", "tokens/s")
_MADE_UP = (
    "Made-up pairs: the tokenizer has not seen the instruction of the augmented prompts, which "
    "comes to more tokens than with real pairs."
)
_FORWARD_SHARE = 1 / 3
"""Of a step's work: a backward pass is twice a forward one."""


def demonstrations(rows: Sequence[PreferencePair], micro_batch: int) -> list[TrainingRow]:
    """Both answers of each pair, in the order in which a micro-batch of pairs holds them."""
    found: list[TrainingRow] = []
    for start in range(0, len(rows), micro_batch):
        held = rows[start : start + micro_batch]
        for side in ("chosen", "rejected"):
            found += [_demonstration(row, side) for row in held]
    return found


def _demonstration(row: PreferencePair, side: str) -> Demonstration:
    answer = row.chosen_ids if side == "chosen" else row.rejected_ids
    return Demonstration(f"{row.id}-{side}", row.messages, row.prompt_ids, answer, "", "")


def objectives(bench: Bench) -> Part:
    """DPO against SFT on the same sequences, and Sr-DPO against DPO."""
    dpo, sr_dpo = DPOObjective(0.1), SrDPOObjective(0.1, 0.3)

    def stage(objective: Objective, mode: RefMode = RefMode.frozen) -> Stage:
        return Stage(Trainee(bench), bench.rows, objective, mode=mode)

    imitated = demonstrations(bench.rows, bench.args.micro_batch)
    sft = Stage(Trainee(bench), imitated, SFTObjective(), rows_per_pair=2)
    cached, refined = stage(dpo), stage(sr_dpo)
    rounds = interleave(
        {
            "SFT": sft.run,
            "DPO": cached.run,
            "DPO live": stage(dpo, RefMode.policy).run,
            "Sr-DPO": refined.run,
            "Sr-DPO live": stage(sr_dpo, RefMode.policy).run,
            "score for DPO": cached.score_once,
            "score for Sr-DPO": refined.score_once,
        },
        bench.args.runs,
    )
    trained = ("SFT", "DPO", "DPO live", "Sr-DPO", "Sr-DPO live")
    tokens = _same_tokens(rounds, trained)
    difference = max(check_alike(rounds, names, _RTOL) for names in (trained[1:3], trained[3:]))
    plain, augmented = (_sequence_tokens(bench.rows, a) for a in (False, True))
    amounts = {name: float(tokens) for name in trained}
    amounts |= {"score for DPO": plain, "score for Sr-DPO": plain + augmented}
    return Part(
        f"Losses: {len(bench.rows)} pairs in steps of {bench.args.global_batch}",
        _SPEED,
        speed_rows(rounds, amounts),
        _objective_ratios(rounds),
        [
            "SFT: both answers of each pair as demonstrations, in the same micro-batches; all "
            "losses read the log-probs of answer tokens alone.",
            "DPO, Sr-DPO: reference passes given; Sr-DPO scores its refined pass live in each "
            "step, as a run with a frozen reference does. live: every pass is scored in the step, "
            "as a moving reference is. score for ...: the passes a frozen reference scores once.",
            f"Augmented prompts make {augmented / plain:.2f} times the tokens. Counting a forward "
            "pass as a third of a step, Sr-DPO over DPO comes to "
            + ", ".join(f"{v:.2f} {k}" for k, v in _expected(augmented / plain).items())
            + ".",
            f"Under cached and live references, losses and log-probs differ by at most "
            f"{difference:.1e} (relative).",
            *(() if bench.args.pairs else (_MADE_UP,)),
        ],
        {**raw(rounds), "expected": _expected(augmented / plain)},
    )


def _objective_ratios(rounds: Rounds) -> list[Ratio]:
    sft = rounds["SFT"]

    def with_scoring(name: str, kind: str) -> list[float]:
        return added(seconds_of(rounds[name], kind), seconds_of(rounds[f"score for {name}"], kind))

    epoch, sr_epoch = (partial(with_scoring, name) for name in ("DPO", "Sr-DPO"))
    sft_seconds = partial(seconds_of, sft)
    sr = "Sr-DPO / DPO time"
    most: Any = {"bar": 1.15, "at_least": False}
    return [
        ratio("DPO / SFT speed, reference given", sft, rounds["DPO"], 0.9),
        ratio("DPO / SFT speed, reference live", sft, rounds["DPO live"], 0.7),
        ratio_of("DPO / SFT speed, one epoch with its scoring", sft_seconds, epoch),
        ratio(f"{sr}, all passes live", rounds["Sr-DPO live"], rounds["DPO live"], **most),
        ratio(f"{sr}, frozen reference, a step", rounds["Sr-DPO"], rounds["DPO"], **most),
        ratio_of(f"{sr}, frozen reference, one epoch with its scoring", sr_epoch, epoch, **most),
    ]


def _expected(longer: float) -> dict[str, float]:
    """Sr-DPO over DPO by forward passes; the augmented ones have `longer` times the tokens."""
    forward, refined = _FORWARD_SHARE, _FORWARD_SHARE * longer
    every_pass = (1 + forward + 2 * refined) / (1 + forward)
    return {"all live": every_pass, "a step": 1 + refined, "one epoch": every_pass}


def _same_tokens(rounds: Rounds, names: Sequence[str]) -> int:
    tokens = {name: rounds[name][0].facts["tokens"] for name in names}
    if len(set(tokens.values())) > 1:
        raise BenchmarkError(f"the variants trained on unlike numbers of tokens: {tokens}")
    return tokens[names[0]]


def _sequence_tokens(rows: Sequence[PreferencePair], augmented: bool) -> int:
    prompts = [(r.augmented_prompt_ids or ()) if augmented else r.prompt_ids for r in rows]
    answers = sum(len(r.chosen_ids) + len(r.rejected_ids) for r in rows)
    return answers + 2 * sum(len(p) for p in prompts)


def packing(bench: Bench) -> Part:
    """No padding against padding to the longest, and packing by length against rows by count."""
    size, dpo = bench.args.micro_batch, DPOObjective(0.1)
    budget = _largest_fixed(bench)
    by_length = Trainee(bench, micro_batch_tokens=budget)
    rounds = interleave(
        {
            "packed": Stage(Trainee(bench), bench.rows, dpo).run,
            "padded": Stage(
                Trainee(bench), bench.rows, dpo, pack=partial(padded_batches, size=size)
            ).run,
            "by length": Stage(by_length, bench.rows, dpo).run,
        },
        bench.args.runs,
    )
    difference = check_alike(rounds, ("packed", "padded", "by length"), _RTOL)
    tokens = {name: float(found[0].facts["tokens"]) for name, found in rounds.items()}
    balance = balances(bench, budget)
    return Part(
        f"Packing: {len(bench.rows)} pairs in steps of {bench.args.global_batch}, {size} a "
        "micro-batch, not sorted",
        _SPEED,
        speed_rows(rounds, tokens),
        [
            ratio("packed / padded speed", rounds["padded"], rounds["packed"], 1.5),
            ratio("packed by length / by count speed", rounds["packed"], rounds["by length"]),
        ],
        [
            f"Padded computes {tokens['padded'] / tokens['packed']:.2f} times the tokens. Its "
            "padding is no target and costs the log-prob head nothing, which favours it.",
            f"By length: at most {budget} tokens, those of the largest micro-batch by count.",
            *(_balance_line(facts) for facts in balance),
            f"Losses and log-probs of the three differ by at most {difference:.1e} (relative).",
        ],
        {**raw(rounds), "micro_batch_tokens": budget, "balance": balance},
    )


def padded_batches(rows: Sequence[TrainingRow], size: int) -> list[PackedBatch]:
    """Micro-batches whose sequences are all as long as the longest; padding is no target."""
    found = []
    for start in range(0, len(rows), size):
        held = rows[start : start + size]
        sequences = sequences_of(held, paired=True)
        longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
        longer = [(p, a + (_PAD,) * (longest - len(p) - len(a))) for p, a in sequences]
        batch = collate(longer, range(start, start + len(held)), paired=True)
        real = zip(longer, sequences, strict=True)
        kept = torch.cat([torch.arange(len(y)) < len(a) for (_, y), (_, a) in real])
        found.append(_without_targets(batch, kept))
    return found


def _without_targets(batch: PackedBatch, kept: torch.Tensor) -> PackedBatch:
    names = ("predict_from", "targets", "target_sequence", "target_is_response")
    return PackedBatch(**{**vars(batch), **{name: getattr(batch, name)[kept] for name in names}})


def _largest_fixed(bench: Bench) -> int:
    """Tokens of the largest micro-batch of so many rows, over all pairs there are."""
    rows, size = bench.all_rows, bench.args.micro_batch
    starts = range(0, len(rows), size)
    return max(_sequence_tokens(rows[start : start + size], False) for start in starts)


def balances(bench: Bench, budget: int) -> list[Facts]:
    """The fullest replica's tokens over the mean, of the steps of an epoch."""
    args, rows = bench.args, bench.all_rows
    whole = len(rows) - len(rows) % args.global_batch
    steps = [
        rows[start : start + args.global_batch] for start in range(0, whole, args.global_batch)
    ]
    rules = {
        "by count": PackingRule(args.micro_batch),
        "by length": PackingRule(args.micro_batch, micro_batch_tokens=budget),
    }
    found = []
    for replicas in (2, 4, 8):
        for name, rule in rules.items():
            values = [_imbalance(step, replicas, rule) for step in steps]
            spread = Spread.of(values)
            facts = {"replicas": replicas, "packing": name, "steps": len(steps)}
            found.append({**facts, "median": spread.median, "worst": spread.max})
    return found


def _imbalance(rows: Sequence[PreferencePair], replicas: int, rule: PackingRule) -> float:
    make = partial(micro_batches, rows, range(len(rows)), rule=rule, paired=True)
    tokens = [
        sum(batch.num_tokens for batch in make(replica=replica, num_replicas=replicas))
        for replica in range(replicas)
    ]
    return max(tokens) / (sum(tokens) / replicas)


def _balance_line(facts: Facts) -> str:
    return (
        f"{facts['replicas']} replicas, {facts['packing']}: the fullest has {facts['median']:.3f} "
        f"times the mean's tokens (median of {facts['steps']} steps, worst {facts['worst']:.3f})."
    )


def sharing(bench: Bench) -> Part:
    """A prompt computed once for its K answers, against once for each."""
    args = bench.args
    rows = _answers_of_prompts(bench)
    variants: dict[str, Callable[[], Facts]] = {}
    for name, share in (("apart", False), ("shared", True)):
        stage = Stage(Trainee(bench, share_prompts=share), rows, DPOObjective(0.1))
        variants[f"train {name}"] = stage.run
        variants[f"score {name}"] = stage.score_once
    rounds = interleave(variants, args.runs)
    check_alike(rounds, ("train apart", "train shared"), _RTOL)
    tokens = {
        name: float(rounds[name][0].facts["tokens"]) for name in ("train apart", "train shared")
    }
    tokens |= {
        f"score {name}": float(sum(_score_tokens(rows, share)))
        for name, share in (("apart", False), ("shared", True))
    }
    reachable = _reachable(bench, rows)
    ratios = []
    for work in ("train", "score"):
        fewer = tokens[f"{work} apart"] / tokens[f"{work} shared"]
        speed = ratio(f"{work}: speed", rounds[f"{work} apart"], rounds[f"{work} shared"])
        ratios += [
            Ratio(f"{work}: tokens apart / shared", Spread(fewer, fewer, fewer)),
            speed,
            _divided(f"{work}: speed / token ratio", speed, fewer, 0.8),
        ]
    return Part(
        f"Shared prompts: {len(rows)} pairs, {args.answers_per_prompt} answers a prompt, about "
        f"{args.prompt_tokens} + {args.answer_tokens} tokens",
        _SPEED,
        speed_rows(rounds, tokens),
        ratios,
        [
            "Disjoint pairs among the answers to one prompt. The log-prob head has as many "
            "targets either way: by multiply-adds of the weights, speed can reach "
            f"{reachable['train']:.2f} of the token ratio trained, "
            f"{reachable['score']:.2f} scored.",
            "tokens: as laid out when trained; scored, each prompt counted once a prompt, though "
            "one that two scoring batches divide is computed in both.",
        ],
        {**raw(rounds), "reachable": reachable},
    )


def _reachable(bench: Bench, rows: Sequence[PreferencePair]) -> dict[str, float]:
    """The share of the token ratio that speed can reach. In a step a layer's weight takes part in
    three products, one of the head in four: its logits are computed again."""
    size = bench.args.size
    attention = 2 * size.hidden * size.hidden * (1 + size.kv_heads / size.heads)
    layers = size.layers * (attention + 3 * size.hidden * size.ffn)
    head = size.hidden * size.vocabulary
    apart, shared = (sum(_score_tokens(rows, share)) for share in (False, True))
    targets = sum(len(row.chosen_ids) + len(row.rejected_ids) for row in rows)

    def work(tokens: int, again: float) -> float:
        return tokens * layers + again * targets * head

    return {
        name: work(apart, again) / work(shared, again) / (apart / shared)
        for name, again in (("train", 4 / 3), ("score", 1.0))
    }


def _divided(name: str, ratio: Ratio, by: float, bar: float) -> Ratio:
    s = ratio.spread
    spread = Spread(s.median / by, s.min / by, s.max / by)
    return Ratio(name, spread, bar, cpu=None if ratio.cpu is None else ratio.cpu / by)


def _answers_of_prompts(bench: Bench) -> list[PreferencePair]:
    """Pairs of random tokens: K answers to each prompt, each in one pair, lengths within a
    quarter of what is asked for."""
    args = bench.args
    rng = random.Random(args.seed)

    def tokens(middle: int) -> TokenIds:
        length = round(middle * rng.uniform(0.75, 1.25))
        return tuple(rng.choices(range(4, args.size.vocabulary), k=length))

    pairs = args.answers_per_prompt // 2
    rows = []
    for number in range(-(-args.count // pairs)):
        prompt = tokens(args.prompt_tokens)
        for pair in range(pairs):
            answers = tokens(args.answer_tokens), tokens(args.answer_tokens)
            rows.append(PreferencePair(f"{number}-{pair}", prompt, *answers))
    return rows[: args.count]


def _score_tokens(rows: Sequence[PreferencePair], share: bool) -> list[int]:
    prompts = [row.prompt_ids for row in rows for _ in range(2)]
    counted_prompts = set(prompts) if share else prompts
    answers = [len(a) for row in rows for a in (row.chosen_ids, row.rejected_ids)]
    return [*(len(p) for p in counted_prompts), *answers]


def ema(bench: Bench) -> Part:
    """The moving average's share of a step."""
    averaging = Averaging(alpha=0.99, every=1)
    stage = Stage(Trainee(bench), bench.rows, DPOObjective(0.1), averaging=averaging)
    plain = Stage(Trainee(bench), bench.rows, DPOObjective(0.1))
    rounds = interleave({"without": plain.run, "with average": stage.run}, bench.args.runs)
    tokens = float(_same_tokens(rounds, ("without", "with average")))
    shares = [m.facts["after_step"] / m.seconds for m in counted(rounds["with average"])]
    milliseconds = [
        1000 * m.facts["after_step"] / stage.steps.num_steps
        for m in counted(rounds["with average"])
    ]
    return Part(
        f"EMA of the weights: DPO in steps of {bench.args.global_batch} pairs, averaged in each",
        _SPEED,
        speed_rows(rounds, dict.fromkeys(rounds, tokens)),
        [
            Ratio("averaging / step time", Spread.of(shares), 0.01, at_least=False),
            ratio("with / without, step time", rounds["with average"], rounds["without"]),
        ],
        [f"An average takes {Spread.of(milliseconds).median:.2f} ms; larger steps pay less of it."],
        raw(rounds),
    )


def segments(bench: Bench) -> Part:
    """SAPO's regenerated segments against whole answers."""
    args = bench.args
    rows = [_demonstration(row, "chosen") for row in bench.rows[: args.answers]]
    trainee = Trainee(bench)
    trainee.weights.take(WeightSet.EMA, WeightSet.POLICY)
    # Nothing stops an answer: these weights write noise, so lengths are given, not sampled.
    engine = embedded_engine(trainee.policy, frozenset(), args.decode_batch, trainee.weights)

    def regenerate(length: int | None) -> Facts:
        plans = [_segment_plan(bench, row, length) for row in rows]
        requests = [
            GenerationRequest(
                row.id,
                row.prompt_ids + row.response_ids[: plan.start],
                seed_of(row.id),
                plan.length,
            )
            for row, plan in zip(rows, plans, strict=True)
        ]
        params = SamplingParams(args.size.max_length, temperature=0.7, top_p=0.9)
        found = engine.generate(requests, params, WeightSet.EMA)
        for row, plan, sample in zip(rows, plans, found, strict=True):
            splice(row.response_ids, plan, sample.token_ids, frozenset())
        return {"tokens": sum(len(c.token_ids) for c in found)}

    variants: dict[str, Callable[[], Facts]] = {"whole": partial(regenerate, None)}
    variants |= {f"segments of {n}": partial(regenerate, n) for n in args.segment_lengths}
    rounds = interleave(variants, args.runs)
    tokens = {name: float(found[0].facts["tokens"]) for name, found in rounds.items()}
    ratios = []
    for name in list(rounds)[1:]:
        fewer = tokens["whole"] / tokens[name]
        ratios.append(Ratio(f"whole / {name}: tokens generated", Spread(fewer, fewer, fewer)))
        ratios.append(ratio(f"whole / {name}: time", rounds["whole"], rounds[name]))
    lengths = Spread.of([len(row.response_ids) for row in rows])
    return Part(
        f"Segments: {len(rows)} answers regenerated, {args.decode_batch} decoded together",
        _SPEED,
        speed_rows(rounds, tokens),
        ratios,
        [
            f"Answers have {lengths.min} to {lengths.max} tokens, median {lengths.median:g}; "
            "`whole` writes as many as the answer had. One that is no longer than a segment is "
            "regenerated whole either way.",
            "A batch lasts as long as its longest answer, and segments are of one length. What "
            "precedes a segment is read first, as a longer prompt.",
        ],
        raw(rounds),
    )


def _segment_plan(bench: Bench, row: Demonstration, length: int | None) -> Segment:
    if length is None:
        return Segment(0, len(row.response_ids))
    longest = bench.args.size.max_length
    sizes = len(row.response_ids), len(row.prompt_ids), length, longest, longest - 1
    return plan_segment(*sizes, draw=uniform(seed_of(bench.args.seed, row.id), 0))


def cache(bench: Bench) -> Part:
    """Scoring the reference through the cache, cold and warm, in whole runs."""
    args = bench.args
    jobs = args.work / "jobs"
    shutil.rmtree(jobs, ignore_errors=True)
    rounds: Rounds = {"no cache": [], "cold": [], "warm": []}
    for number in range(args.runs + 1):
        folder = jobs / f"cache-{number}"
        for name, found in rounds.items():
            found.append(
                _scored_run(bench, jobs / f"{number}-{name.replace(' ', '-')}", folder, name)
            )
            print(f"  run {number}: {name}: {found[-1].seconds:.3f} s of scoring", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    hits = {n: [m.facts["hit_rate"] for m in counted(rounds[n])] for n in ("cold", "warm")}
    sequences = float(2 * len(bench.rows))
    return Part(
        f"Reference cache: scoring {int(sequences)} answers",
        ("variant", "answers", "s", "range", "CPU s", "answers/s"),
        speed_rows(rounds, dict.fromkeys(rounds, sequences)),
        [
            Ratio("hit rate, cold", Spread.of(hits["cold"])),
            Ratio("hit rate, warm", Spread.of(hits["warm"]), 1.0),
            ratio("cold / warm, time of scoring", rounds["cold"], rounds["warm"]),
            ratio("cold / no cache, time of scoring", rounds["cold"], rounds["no cache"]),
        ],
        [
            "A new process for each, its first pass among those timed; naming the weights (a hash "
            "of their files) and writing are counted.",
        ],
        raw(rounds),
    )


def _scored_run(bench: Bench, out: Path, folder: Path, name: str) -> Measured:
    """One run by ours_child.py, of as few steps as it takes; the time of its scoring."""
    args = bench.args
    settings = ["trainer.max_steps=1"]
    if name != "no cache":
        settings.append(f"model.reference_cache_dir={folder}")
    job = {
        "out": str(out),
        "model": str(bench.model_folder),
        "pairs": str(bench.pairs_path),
        "num_pairs": len(bench.rows),
        "micro_batch": args.micro_batch,
        "global_batch": args.global_batch,
        "max_length": args.size.max_length,
        "threads": args.threads,
        "seed": args.seed,
        "lr": args.lr,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "beta": 0.1,
        "clip": 1.0,
        "overrides": settings,
    }
    script = Path(__file__).resolve().parent / "ours_child.py"
    env = child_environment(args.threads, out / "scratch")
    found = run_child(Path(sys.executable), script, job, env, args.limit)
    facts = {"hit_rate": _hit_rate(out / "run"), "losses": found["losses"]}
    shutil.rmtree(out / "run", ignore_errors=True)
    parts = found["parts"]
    return Measured(parts["reference"], parts["reference_cpu"], facts)


def _hit_rate(runs: Path) -> float | None:
    """What the run's own summary says; None where it had no cache."""
    (path,) = runs.glob("*/summary.json")
    rates = [stage.get("metrics", {}).get(HIT_RATE) for stage in read_json(path)]
    return next((rate for rate in rates if rate is not None), None)


PARTS: dict[str, Callable[[Bench], Part]] = {
    "objectives": objectives,
    "packing": packing,
    "sharing": sharing,
    "ema": ema,
    "segments": segments,
    "cache": cache,
}
