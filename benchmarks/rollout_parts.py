"""What rollout.py measures of engines: our server over vLLM itself, and a judge's cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, count
from typing import Any

from common import BenchmarkError, Spread
from rollout_engines import Child, Served, Serving
from rollout_kit import Bench, fact, in_turn, ratio_per_round
from steps_kit import Facts, Measured, Part, Ratio, Rounds, raw, seconds_of

from nemo_selfpref.algorithms.judged import JudgedPairs
from nemo_selfpref.algorithms.osp import OSPConfig
from nemo_selfpref.rollout.engine import RolloutEngine
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.session import find_start
from nemo_selfpref.types import GenerationRequest, SamplingParams, TokenIds

_LENGTHS = range(16, 33)
"""Of prompts: so short that the engine reads all of them in one step, whatever its budget."""
SPEED = ("model", "variant", "tokens", "s", "range", "tokens/s")

Answers = list[list[int]]


def speed_rows(size: str, rounds: Rounds) -> list[list[Any]]:
    rows = []
    for name, found in rounds.items():
        wall, tokens = Spread.of(seconds_of(found)), found[-1].facts["tokens"]
        speed = f"{tokens / wall.median:,.0f}"
        rows.append([size, name, tokens, *wall.cells(), speed])
    return rows


def same_tokens(rounds: Rounds) -> None:
    counts = {name: [m.facts["tokens"] for m in found] for name, found in rounds.items()}
    if len({tuple(c) for c in counts.values()}) > 1:
        raise BenchmarkError(f"the variants made other numbers of tokens: {counts}")


def speed_ratio(
    name: str, ours: Sequence[Measured], theirs: Sequence[Measured], **bar: Any
) -> Ratio:
    return ratio_per_round(name, seconds_of(theirs), seconds_of(ours), at_least=True, **bar)


# -- our server, and vLLM itself --------------------------------------------------------------


def server(bench: Bench) -> Part:
    """Tokens a second through front and engine over those of LLM.generate."""
    args = bench.args
    part = Part(
        f"Server: {args.concurrent} answers of {args.new_tokens} tokens, all asked for at once",
        SPEED,
        [],
        notes=[
            "raw: vLLM's LLM.generate in one process with the engine's own settings, asked for "
            "log-probs and given a seed an answer, as ours; plain: without either. Through the "
            "server: one call as a run makes it (client's fleet, HTTP, front, HTTP, engine), and "
            "a call an answer, from as many threads, straight to the front.",
            "Times of raw are the child's own, without its pipe; ours are the client's.",
        ],
    )
    for size in args.server_sizes:
        rounds, same = _serve(bench, size)
        part.rows += speed_rows(size, rounds)
        for name, bar in (("one call", 0.97), ("a call each", 0.97)):
            title = f"{size}: server, {name} / raw tokens a second"
            part.ratios.append(speed_ratio(title, rounds[name], rounds["raw"], bar=bar))
        title = f"{size}: server, one call / raw, plain tokens a second"
        part.ratios.append(speed_ratio(title, rounds["one call"], rounds["raw, plain"]))
        part.notes.append(f"{size}: {same:.0%} of the server's answers are raw's, token by token.")
        part.facts[size] = {**raw(rounds), "same_answers": same}
    return part


def _serve(bench: Bench, size: str) -> tuple[Rounds, float]:
    serving = Serving(bench, size)
    with Child(bench, "raw", serving.spec.engines[0].spec) as child, serving as served:
        asked = _Asked(bench, size)
        variants = {
            "raw": lambda: asked.by_child(child, plain=False),
            "one call": lambda: asked.in_one_call(served),
            "a call each": lambda: asked.in_calls(served),
            "raw, plain": lambda: asked.by_child(child, plain=True),
        }
        rounds = in_turn(variants, bench.args.runs)
    same_tokens(rounds)
    return rounds, asked.same()


class _Asked:
    """The same prompts for all variants of a round, others in every round."""

    def __init__(self, bench: Bench, size: str) -> None:
        self.bench, self.size = bench, size
        self.params = SamplingParams(bench.args.new_tokens, temperature=0.7, top_p=0.9)
        self.answers: dict[str, list[Answers]] = {}

    def _note(self, name: str, answers: Answers) -> Facts:
        self.answers.setdefault(name, []).append(answers)
        return {"tokens": sum(map(len, answers))}

    def _requests(self, name: str) -> list[GenerationRequest]:
        done = len(self.answers.get(name, []))
        seed = self.bench.args.seed + 1000 * done
        prompts = self.bench.prompts(self.size, self.bench.args.concurrent, _LENGTHS, seed)
        return [GenerationRequest(str(n), tuple(p), seed + n) for n, p in enumerate(prompts)]

    def by_child(self, child: Child, plain: bool) -> Facts:
        name = f"raw-{plain}"
        requests, p = self._requests(name), self.params
        found = child.ask(
            prompts=[r.prompt_ids for r in requests],
            seeds=[r.seed for r in requests],
            params={"temperature": p.temperature, "top_p": p.top_p, "max_tokens": p.max_new_tokens},
            plain=plain,
        )
        return {"seconds": found["seconds"], **self._note(name, found["answers"])}

    def in_one_call(self, served: Served) -> Facts:
        requests = self._requests("one")
        started = time.perf_counter()
        found = served.engine.generate(requests, self.params)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, **self._note("one", [list(c.token_ids) for c in found])}

    def in_calls(self, served: Served) -> Facts:
        requests = self._requests("each")
        with ThreadPoolExecutor(len(requests)) as pool:
            started = time.perf_counter()
            calls = [pool.submit(served.client.generate, [r], self.params) for r in requests]
            found = [call.result()[0] for call in calls]
            seconds = time.perf_counter() - started
        return {"seconds": seconds, **self._note("each", [list(c.token_ids) for c in found])}

    def same(self) -> float:
        """Share of the answers in one call that are raw vLLM's."""
        ours, theirs = (list(chain.from_iterable(self.answers[n])) for n in ("one", "raw-False"))
        return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


# -- the judge --------------------------------------------------------------------------------


class Clocked:
    """RolloutEngine that says how long it was asked for answers and for verdicts."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self.seconds = engine, {"generate": 0.0, "judge": 0.0}
        self.judged_tokens = self.verdicts = 0

    def generate(self, *args: Any, **more: Any) -> Any:
        return self._clock("generate", partial(self.engine.generate, *args, **more))

    def label_scores(self, prompts: Sequence[TokenIds], *args: Any, **more: Any) -> Any:
        self.verdicts += len(prompts)
        self.judged_tokens += sum(map(len, prompts))
        return self._clock("judge", partial(self.engine.label_scores, prompts, *args, **more))

    def _clock(self, what: str, ask: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = ask()
        self.seconds[what] += time.perf_counter() - started
        return found


def judge(bench: Bench) -> Part:
    """What the judge of an OSP step costs, with and without vLLM's prefix caching."""
    args, size = bench.args, "small"
    cfg = bench.config(size, max_new_tokens=args.new_tokens, check_samples=0)
    start = find_start(cfg)
    wanted = args.judged_prompts * (args.runs + 1)
    rows = {on: bench.rows(start, wanted, 24, 1) for on in (True, False)}
    steps = {on: count() for on in rows}

    def step(engine: RolloutEngine, caching: bool) -> Facts:
        clocked, number = Clocked(engine), next(steps[caching])
        rollouts = EngineRollouts(
            cfg, start.tokenizer, clocked, lambda _: None, start.arch.max_position_embeddings
        )
        asked = rows[caching][number * args.judged_prompts :][: args.judged_prompts]
        JudgedPairs(OSPConfig(), soft=True).pairs(number, rollouts.within(number), asked)
        return {
            **clocked.seconds,
            "seconds": sum(clocked.seconds.values()),
            "verdicts": clocked.verdicts,
            "judged_tokens": clocked.judged_tokens,
            "tokens": args.judged_prompts * OSPConfig().num_samples * args.new_tokens,
        }

    sets = ("policy", "frozen")
    with_cache = Serving(bench, size, sets=sets)
    without = Serving(bench, size, sets=sets, caching=False)
    with with_cache as cached, without as plain:
        variants = {
            "caching": partial(step, cached.engine, True),
            "no caching": partial(step, plain.engine, False),
        }
        rounds = in_turn(variants, args.runs)
    return _judge_part(bench, rounds)


def _judge_part(bench: Bench, rounds: Rounds) -> Part:
    ratios, rows = [], []
    for name, found in rounds.items():
        spent = {what: fact(found, what) for what in ("generate", "judge")}
        cells = [c for values in spent.values() for c in Spread.of(values).cells()]
        last = found[-1].facts
        rows.append([name, last["tokens"], last["verdicts"], last["judged_tokens"], *cells])
        title = f"{name}: judging / generating"
        ratios.append(ratio_per_round(title, spent["judge"], spent["generate"]))
    cached, plain = (fact(rounds[name], "judge") for name in ("caching", "no caching"))
    ratios.append(ratio_per_round("judging with / without prefix caching", cached, plain))
    return Part(
        f"Judge: an OSP step, {bench.args.judged_prompts} prompts, 7 answers of "
        f"{bench.args.new_tokens} tokens each, small model",
        (
            "engine",
            "tokens made",
            "verdicts",
            "tokens judged",
            "generate s",
            "range",
            "judge s",
            "range",
        ),
        rows,
        ratios,
        [
            "Every answer against the blank one, then the pairs; both orders each. The engine "
            "holds policy and frozen weights, equal here, so nothing is swapped.",
            "Only whole blocks of a prefix are reused (128 tokens without a GPU).",
        ],
        raw(rounds),
    )
