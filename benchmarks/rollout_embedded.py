"""The measurement of rollout.py that needs no vLLM: the embedded engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from rollout_kit import Bench, in_turn
from rollout_parts import SPEED, Answers, same_tokens, speed_ratio, speed_rows
from steps_kit import Facts, Part, raw
from transformers import LlamaForCausalLM

from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import GenerationRequest, SamplingParams

_LENGTHS = range(32, 97)


def embedded(bench: Bench) -> Part:
    """Tokens a second of the engine within the trainer over transformers' generate."""
    args = bench.args
    part = Part(
        f"Embedded engine: {args.concurrent} greedy answers of {args.new_tokens} tokens, one batch",
        SPEED,
        [],
        notes=[
            f"Prompts of {_LENGTHS[0]} to {_LENGTHS[-1]} tokens; transformers' are padded on the "
            "left. Ours gives log-probs too, transformers' generate does not."
        ],
    )
    for size in args.embedded_sizes:
        variants, made = _embedded_variants(bench, size)
        rounds = in_turn(variants, args.runs)
        same_tokens(rounds)
        part.rows += speed_rows(size, rounds)
        title = f"{size}: embedded / transformers tokens a second"
        both = rounds["embedded"], rounds["transformers"]
        part.ratios.append(speed_ratio(title, *both))
        ours, theirs = (list(chain.from_iterable(made[name])) for name in made)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        part.notes.append(f"{size}: {same:.0%} of the answers are equal, token by token.")
        part.facts[size] = {**raw(rounds), "same_answers": same}
    return part


def _embedded_variants(
    bench: Bench, size: str
) -> tuple[dict[str, Callable[[], Facts]], dict[str, list[Answers]]]:
    args, (policy, _) = bench.args, bench.policy(size)
    engine = embedded_engine(policy, frozenset(), args.concurrent)
    model = LlamaForCausalLM.from_pretrained(bench.model(size), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no answer ends by itself
    made: dict[str, list[Answers]] = {"embedded": [], "transformers": []}

    def prompts(name: str) -> list[list[int]]:
        seed = args.seed + 1000 * len(made[name])
        return bench.prompts(size, args.concurrent, _LENGTHS, seed)

    def ours() -> Facts:
        asked = prompts("embedded")
        requests = [GenerationRequest(str(n), tuple(p)) for n, p in enumerate(asked)]
        started = time.perf_counter()
        found = engine.generate(requests, SamplingParams(args.new_tokens, temperature=0.0))
        seconds = time.perf_counter() - started
        made["embedded"].append([list(c.token_ids) for c in found])
        return {"seconds": seconds, "tokens": sum(len(c.token_ids) for c in found)}

    def theirs() -> Facts:
        asked = prompts("transformers")
        started = time.perf_counter()
        answers = _generate(model, asked, args.new_tokens)
        seconds = time.perf_counter() - started
        made["transformers"].append(answers)
        return {"seconds": seconds, "tokens": sum(map(len, answers))}

    return {"embedded": ours, "transformers": theirs}, made


def _generate(model: Any, prompts: Answers, new_tokens: int) -> Answers:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
    return found[:, longest:].tolist()
