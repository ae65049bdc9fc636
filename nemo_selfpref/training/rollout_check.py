"""Do the answers come from the weights they name? The trainer computes some log-probs again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.scoring import response_token_logprobs
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.types import Completion, TokenIds, WeightSet

Sampled = tuple[TokenIds, Completion]
"""A prompt and its answer."""


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` numbers, evenly spread."""
    step = max(count / wanted, 1.0) if wanted else math.inf
    return [int(i * step) for i in range(min(wanted, count))]


class RolloutCheck:
    """Compares the log-probs that came with answers with the trainer's own.

    Args:
        ready: puts a set of weights into the trainer's memory.
        alarm: mean difference of a token's log-prob above which `say` warns.
    """

    def __init__(
        self,
        weights: WeightSets,
        ready: Callable[[WeightSet], None],
        alarm: float,
        say: Callable[[str], None],
    ) -> None:
        self.weights, self._ready, self.alarm, self._say = weights, ready, alarm, say
        self._warned = False

    def metrics(self, sampled: Sequence[Sampled]) -> dict[str, float]:
        """Collective. Over the tokens of the answers |rollout - trainer| in the mean and at most,
        and over the answers the effective sample size of the trainer's distribution over the
        engine's, (sum w)^2 / (n sum w^2), in [1/n, 1].
        """
        sets = {completion.weight_set for _, completion in sampled}
        pairs: list[tuple[Completion, list[float]]] = []
        for name in sorted(sets):
            of_set = [s for s in sampled if s[1].weight_set is name]
            pairs += zip((c for _, c in of_set), self._own(name, of_set), strict=True)
        if not pairs:
            return {}
        found = compare(pairs)
        apart = not found["rollout/logprob_diff_mean"] <= self.alarm
        if apart and not self._warned:
            self._say(
                "warning: the log-probs of sampled tokens differ by "
                f"{found['rollout/logprob_diff_mean']:.3g} in the mean from the trainer's "
                f"(rollout.logprob_alarm={self.alarm}): the engine may hold other weights, another "
                "precision, or weights much older than the trainer's"
            )
        self._warned = apart  # once each time it begins
        return found

    def _own(self, name: WeightSet, sampled: Sequence[Sampled]) -> list[list[float]]:
        self._ready(name)
        with self.weights.using(name):
            sequences = [(prompt, completion.token_ids) for prompt, completion in sampled]
            return response_token_logprobs(self.weights.policy, sequences)


def compare(pairs: Sequence[tuple[Completion, Sequence[float]]]) -> dict[str, float]:
    """The metrics of answers beside the trainer's log-probs of their tokens.

    Raises:
        RolloutError: a log-prob that came with an answer is not a finite number.
    """
    differences, logs = [], []
    for completion, own in pairs:
        if not all(map(math.isfinite, completion.logprobs)):
            raise RolloutError(
                f"answer {completion.id} came with a log-prob that is not finite; its weights are "
                f"{completion.weight_set.value} {completion.weight_version}"
            )
        signed = [a - b for a, b in zip(own, completion.logprobs, strict=True)]
        differences += [abs(d) for d in signed]
        logs.append(sum(signed))
    peak = max(logs)
    shares = [math.exp(value - peak) for value in logs]
    ess = sum(shares) ** 2 / (len(shares) * sum(w * w for w in shares))
    return {
        "rollout/logprob_diff_mean": sum(differences) / len(differences),
        "rollout/logprob_diff_max": max(differences),
        "rollout/ess": ess,
    }
