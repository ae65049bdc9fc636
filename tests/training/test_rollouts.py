from __future__ import annotations

import pytest
from tiny import scale

from nemo_selfpref.config.schema import RolloutConfig, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import Completion, Demonstration, DropReport, WeightSet

POLICY, FROZEN = WeightSet.POLICY, WeightSet.FROZEN
PROMPTS = [("a", (5, 6)), ("b", (30, 31, 32)), ("c", (5, 6))]


def tokens_of(found: list[Completion]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in found]


class Asked:
    """Rollouts on a small model, and the weights they asked for."""

    def __init__(self, policy: Policy, tokenizer: ChatTokenizer, seed: int = 1) -> None:
        rollout = RolloutConfig(max_new_tokens=8, temperature=1.0, top_p=1.0, batch_size=2)
        cfg = RunConfig(name="test", seed=seed, rollout=rollout)
        self.policy, self.tokenizer, self.weights = policy, tokenizer, WeightSets(policy)
        self.asked: list[WeightSet] = []
        engine = embedded_engine(policy, tokenizer.stop_ids, rollout.batch_size, self.weights)
        self.rollouts = EngineRollouts(cfg, tokenizer, engine, self.ready, max_length=20)

    def ready(self, name: WeightSet) -> None:
        self.asked.append(name)
        if name not in self.weights:
            self.weights.take(name, POLICY)


@pytest.fixture
def run(policy: Policy, tokenizer: ChatTokenizer) -> Asked:
    return Asked(policy, tokenizer)


def test_a_draw_is_named_by_seed_place_name_and_id(run: Asked) -> None:
    first = tokens_of(run.rollouts.sample("draft", PROMPTS))
    assert first[0] != first[2]  # a and c have the same prompt
    assert tokens_of(run.rollouts.sample("draft", PROMPTS[::-1])) == first[::-1]
    others = [
        run.rollouts.sample("answer", PROMPTS),
        run.rollouts.within("07-policy", 3, 0).sample("draft", PROMPTS),
        run.rollouts.within("07-policy", 3, 1).sample("draft", PROMPTS),
        Asked(run.policy, run.tokenizer, seed=2).rollouts.sample("draft", PROMPTS),
    ]
    draws = [first, *map(tokens_of, others)]
    assert all(ours != theirs for i, ours in enumerate(draws) for theirs in draws[:i])
    again = run.rollouts.within("07-policy", 3, 1).sample("draft", PROMPTS)
    assert tokens_of(again) == draws[3]


def test_limits(run: Asked) -> None:
    whole = tokens_of(run.rollouts.sample("draft", PROMPTS))
    found = tokens_of(run.rollouts.sample("draft", PROMPTS, limits=[2, 5, 99]))
    assert found == [whole[0][:2], whole[1][:5], whole[2]]


def test_weights_are_made_ready_before_they_are_used(run: Asked) -> None:
    (found,) = run.rollouts.sample("draft", PROMPTS[:1], weights=FROZEN)
    assert (found.weight_set, found.weight_version) == (FROZEN, 0)
    before = run.rollouts.label_scores("judge", [(5, 6), (7,)], (8, 9), weights=FROZEN)
    scale(run.policy)
    assert run.rollouts.label_scores("judge", [(5, 6), (7,)], (8, 9), weights=FROZEN) == before
    assert run.rollouts.label_scores("judge", [(5, 6), (7,)], (8, 9)) != before
    assert run.asked == [FROZEN, FROZEN, FROZEN, POLICY]


def test_what_fits(run: Asked) -> None:
    # The model takes 20 tokens.
    assert run.rollouts.fits((5,) * 12) and not run.rollouts.fits((5,) * 13)
    assert run.rollouts.fits((5,) * 20, 0) and not run.rollouts.fits((5,) * 20, 1)


def test_the_system_message_stays(run: Asked) -> None:
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    row = Demonstration("a", messages, (5,), (6, 2), "x", "f:1")
    ids = run.rollouts.encode_user(row, "Hello")
    shown = run.rollouts.tokenizer.decode(ids)
    assert "Be brief." in shown and "Hello" in shown and "Hi" not in shown


def test_counts_are_of_one_place(run: Asked) -> None:
    report = DropReport(kept=2, dropped={"tied": 1})
    step = run.rollouts.within("07-policy", 0, 0)
    step.note("pairs", report)
    step.note("pairs", report)
    step.log({"replay/size": 3.0})
    step.log({"replay/size": 4.0, "replay/reused": 1.0})
    drawn = step.sample("draft", PROMPTS)
    assert step.reports == {"pairs": DropReport(kept=4, dropped={"tied": 2})}
    assert step.metrics == {"replay/size": 4.0, "replay/reused": 1.0}
    assert step.generated_tokens == sum(len(c.token_ids) for c in drawn)
    assert report.kept == 2
    other = run.rollouts.within("07-policy", 1, 0)
    assert (other.reports, other.metrics, other.generated_tokens) == ({}, {}, 0)
