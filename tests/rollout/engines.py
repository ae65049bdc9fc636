"""Embedded engines over small policies, and prompts for them."""

from __future__ import annotations

from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.embedded import EmbeddedEngine

PROMPTS = {"a": (5, 6), "b": (7,), "c": (9, 10, 11, 12, 13, 14, 15, 16), "d": (5, 6), "e": (20, 3)}
STOP = frozenset(range(3, 100))
"""A fifth of the vocabulary, so that sequences end at different steps."""


def engine(
    policy: Policy,
    batch_size: int = 64,
    stop: frozenset[int] = STOP,
    max_length: int = 64,
    weights: WeightSets | None = None,
) -> EmbeddedEngine:
    return EmbeddedEngine(
        KVDecoder(policy, weights), stop_ids=stop, max_length=max_length, batch_size=batch_size
    )


class Caught(Exception):
    pass


class Catcher:
    """Stands for the exchange between replicas: keeps what one of them found."""

    def __call__(self, value: dict) -> list:
        self.value = value
        raise Caught
