"""`selfpref generate`: answers of a trained model to a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_selfpref.data.dataset import load_prompts
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.files import write_text
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import Completion, GenerationRequest, Message, SamplingParams


def answer_prompts(
    model: Path,
    prompts: Sequence[tuple[str, Sequence[Message]]],
    params: SamplingParams,
    seed: int,
    console: Console,
) -> list[tuple[Completion, str]]:
    """Each prompt's completion and its text, on one process."""
    policy, start = single_process_policy(model)
    engine = embedded_engine(policy, start.tokenizer.stop_ids, batch_size=64)
    requests = [
        GenerationRequest(name, start.tokenizer.encode_prompt(messages), seed_of(seed, name))
        for name, messages in prompts
    ]
    with console.progress("generate", len(requests), "answers") as progress:
        found = engine.generate(requests, params, on_done=progress)
    return [(c, start.tokenizer.decode(c.token_ids)) for c in found]


def generate(args: argparse.Namespace) -> None:
    """Write one JSON line a prompt: id, answer, finish_reason, weight_version."""
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise ConfigError("expected --temperature >= 0, 0 < --top-p <= 1, --max-new-tokens >= 1")
    params = SamplingParams(args.max_new_tokens, args.temperature, args.top_p)
    console = Console(enabled=args.out is not None)
    answers = answer_prompts(args.model, load_prompts(args.prompts), params, args.seed, console)
    lines = [
        json.dumps(
            {
                "id": completion.id,
                "answer": text,
                "finish_reason": completion.finish_reason.value,
                "weight_version": completion.weight_version,
            },
            ensure_ascii=False,
        )
        for completion, text in answers
    ]
    text = "\n".join(lines) + "\n"
    if args.out is None:
        sys.stdout.write(text)
    else:
        write_text(args.out, text)
