"""Tokens a second of the embedded engine, which decodes on the training weights."""

from __future__ import annotations

from benchmarks.gpu_check.job import Job
from benchmarks.gpu_check.models import TINY, architecture, build, fill, now, random_pairs
from benchmarks.gpu_check.report import Report
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import GenerationRequest, SamplingParams

_SHAPE = {"hidden": 1024, "layers": 24, "heads": 16, "kv_heads": 8, "ffn": 4096, "vocab": 32000}


def speed(job: Job, report: Report) -> None:
    count, length = job.pick(64, 4), job.pick(128, 8)
    arch = architecture(**job.pick(_SHAPE, TINY), longest=4 * length)
    policy = fill(build(arch, Precision.bf16))
    engine = embedded_engine(policy, frozenset(), count)
    prompts = random_pairs(count, prompt=2 * length, answer=1, vocab=arch.vocab_size)
    requests = [GenerationRequest(p.id, p.prompt_ids, seed=n) for n, p in enumerate(prompts)]
    engine.generate(requests, SamplingParams(2))
    started = now()
    done = engine.generate(requests, SamplingParams(length, temperature=0.8, top_p=0.95))
    seconds = now() - started
    tokens = sum(len(c.token_ids) for c in done)
    report.measure("sequences together", count)
    report.measure("tokens", tokens)
    report.measure("tokens a second", tokens / seconds)
    # No stop tokens: every answer runs to its limit.
    report.bar("tokens decoded", tokens, at_least=count * length, correctness=True)
