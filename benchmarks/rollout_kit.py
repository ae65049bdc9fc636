"""What rollout.py measures with: models, prompts, clocks, cores."""

from __future__ import annotations

import argparse
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import Spread
from material import ModelSize, Pair, make_tokenizer, save_model, synthetic_pairs
from steps_kit import Facts, Measured, Ratio, Rounds, counted, interleave

from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import (
    Accelerator,
    AlgorithmConfig,
    DataConfig,
    RolloutConfig,
    RolloutEngineName,
    RunConfig,
    TrainerConfig,
    VLLMConfig,
)
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.session import Start, build_policy, find_start
from nemo_selfpref.types import Demonstration

START_S = 300.0
SIZES = {
    "tiny": ModelSize(hidden=128, layers=4, heads=4, kv_heads=2, ffn=344, vocabulary=2048),
    "small": ModelSize(),
    "middle": ModelSize(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1376),
    "300 MB": ModelSize(hidden=768, layers=10, heads=12, kv_heads=4, ffn=2064),
}


@dataclass(frozen=True)
class Bench:
    """Models by name, made when they are first asked for. shared: a folder in memory."""

    args: argparse.Namespace
    scratch: Path
    shared: Path

    @cached_property
    def words(self) -> list[str]:
        """Invented ones, as frequent as in made-up pairs."""
        return " ".join(pair["chosen"] for pair in self._pairs).split()

    @cached_property
    def _pairs(self) -> list[Pair]:
        return synthetic_pairs(400, self.args.seed)

    def model(self, name: str) -> Path:
        """Hugging Face folder of random weights and a tokenizer of the words."""
        folder = self.scratch / name.replace(" ", "-")
        if not folder.exists():
            tokenizer = make_tokenizer(self._pairs, SIZES[name].vocabulary)
            save_model(folder, SIZES[name], tokenizer, self.args.seed)
        return folder

    def config(self, name: str, *, micro_batch: int = 8, **rollout: Any) -> RunConfig:
        """A run on this model whose engines are vLLM's; **rollout is RolloutConfig's."""
        args, vllm = self.args, rollout.pop("vllm", {})
        v = VLLMConfig(python=str(args.rollout_python), start_timeout_s=START_S, **vllm)
        return RunConfig(
            name="rollout",
            seed=args.seed,
            trainer=TrainerConfig(accelerator=Accelerator.cpu),
            model=ModelConfig(
                restore_from_path=str(self.model(name)), micro_batch_size=micro_batch
            ),
            data=DataConfig([], max_length=SIZES[name].max_length),
            rollout=RolloutConfig(engine=RolloutEngineName.vllm, vllm=v, **rollout),
            algorithm=AlgorithmConfig("none"),
        )

    def policy(self, name: str) -> tuple[Policy, Start]:
        cfg = self.config(name)
        start = find_start(cfg)
        return build_policy(cfg, start)[0], start

    def prompts(self, name: str, count: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Random tokens, others for every seed, so that no prefix is in a cache already."""
        rng, vocabulary = random.Random(seed), SIZES[name].vocabulary
        chosen = itertools.islice(itertools.cycle(lengths), count)
        return [[rng.randrange(4, vocabulary) for _ in range(n)] for n in chosen]

    def rows(self, start: Start, count: int, prompt_words: int, words: int) -> list[Demonstration]:
        """Instructions and answers of so many words, no two alike."""
        source, encode, found = itertools.cycle(self.words), start.tokenizer, []
        for number in range(count):
            text = " ".join(itertools.islice(source, prompt_words))
            answer = " ".join(itertools.islice(source, words))
            asked = ({"role": "user", "content": text},)
            prompt, response = encode.encode_prompt(asked), encode.encode_response(asked, answer)
            found.append(Demonstration(f"row-{number}", asked, prompt, response, answer, "made:0"))
        return found


# -- measuring --------------------------------------------------------------------------------


def in_turn(variants: Mapping[str, Callable[[], Facts]], runs: int) -> Rounds:
    """steps_kit.interleave, with a variant's own clock where its facts hold one ("seconds")."""
    found = interleave(variants, runs)
    return {name: [_own_clock(m) for m in rounds] for name, rounds in found.items()}


def _own_clock(measured: Measured) -> Measured:
    facts = dict(measured.facts)
    return replace(measured, seconds=facts.pop("seconds", measured.seconds), facts=facts)


def fact(rounds: Sequence[Measured], name: str) -> list[float]:
    """One of the facts, of every round that counts."""
    return [m.facts[name] for m in counted(rounds)]


def ratio_per_round(
    name: str,
    above: Sequence[float],
    below: Sequence[float],
    bar: float | None = None,
    at_least: bool = False,
) -> Ratio:
    values = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(name, Spread.of(values), bar, at_least)


# -- cores ------------------------------------------------------------------------------------


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many, here and in processes started from here."""
    names, before = ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), torch.get_num_threads()
    given = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for name, value in given.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def pin(cores: set[int]) -> None:
    """Every thread of this process on these cores; what it starts later inherits them."""
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(task.name), cores)
