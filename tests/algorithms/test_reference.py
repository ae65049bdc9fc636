"""Reference modes: every method takes those that make sense for it and says why not the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from scripted_run import CFG, ScriptedRun, carry_out, configured, preference, question

from nemo_selfpref.algorithms.base import Averaging, Reference, TrainSettings, algorithms
from nemo_selfpref.algorithms.judged import Pairing
from nemo_selfpref.algorithms.osp import SoftLoss
from nemo_selfpref.algorithms.reference import (
    ITERATED,
    ONE_STAGE,
    REFERENCE_FREE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.algorithms.self_augmented_po import PairLoss, Sampler
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.targets import TargetsConfig, TargetSource

FROZEN, POLICY, EMA, LAST, NONE = (
    RefMode.frozen,
    RefMode.policy,
    RefMode.ema,
    RefMode.last,
    RefMode.none,
)
WHY = {
    LAST: "there is one training stage, so the last iteration is where it starts: frozen",
    NONE: "the loss compares the policy with a reference; orpo is the loss without one",
}
NO_TERM = "the loss has no term for a reference"
ONE = {FROZEN, POLICY, EMA}
"""Methods of one stage."""
SEVERAL = {*ONE, LAST}
"""Methods of several iterations."""
CASES: dict[str, tuple[dict[str, Any], set[RefMode]]] = {
    "sft": ({}, {NONE}),
    "dpo": ({}, ONE),
    "cdpo": ({}, ONE),
    "ipo": ({}, ONE),
    "orpo": ({}, {NONE}),
    "sr_dpo": ({}, ONE),
    "sr_ipo": ({}, ONE),
    "raft": ({}, {NONE}),
    "rso": ({}, ONE),
    "spin": ({}, SEVERAL),
    "self_rewarding": ({}, SEVERAL),
    "osp": ({}, ONE),
    "osp sft": ({"loss": SoftLoss.sft, "pairing": Pairing.raft}, {NONE}),
    "self_augmented_po": ({}, ONE),
    "self_augmented_po orpo": ({"loss": PairLoss.orpo}, {NONE}),
    "sgpo": ({"targets": TargetsConfig(TargetSource.file, "answers.jsonl")}, SEVERAL),
}


def test_every_method_has_a_case() -> None:
    assert {case.split()[0] for case in CASES} == set(algorithms())


@pytest.mark.parametrize("mode", RefMode)
@pytest.mark.parametrize("case", CASES)
def test_what_makes_sense_passes_and_the_rest_is_refused_with_the_reason(
    case: str, mode: RefMode
) -> None:
    settings, possible = CASES[case]
    method = configured(case.split()[0], ref=mode, **settings)
    if mode in possible:
        method.check(CFG)
        return
    why = NO_TERM if possible == {NONE} else WHY[mode]
    names = ", ".join(m.name for m in RefMode if m in possible)
    message = f"algorithm.ref={mode.name}: {why}. Expected one of {names}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        method.check(CFG)


def test_fix_is_the_sapo_papers_word_for_frozen() -> None:
    assert RefMode["fix"] is FROZEN
    assert [mode.name for mode in RefMode] == ["frozen", "policy", "ema", "last", "none"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, TrainSettings(reference=Reference(FROZEN, 0))),
        ({"ref": LAST}, TrainSettings(reference=Reference(LAST, 0))),
        ({"ref": POLICY}, TrainSettings(reference=Reference(POLICY, 108))),
        ({"ref": POLICY, "ref_every": 7}, TrainSettings(reference=Reference(POLICY, 7))),
        (
            {"ref": EMA},
            TrainSettings(reference=Reference(EMA, 108), averaging=Averaging(0.5, 2)),
        ),
        (
            {"ref": EMA, "ref_every": 3, "ema_every": 1, "ema_alpha": 0.9},
            TrainSettings(reference=Reference(EMA, 3), averaging=Averaging(0.9, 1)),
        ),
    ],
)
def test_what_training_is_told(settings: dict[str, Any], expected: TrainSettings) -> None:
    config = ReferenceConfig(name="x", **settings)
    check_reference(config, ITERATED)
    assert train_settings(config) == expected


def test_a_sampler_may_need_the_average_where_the_reference_does_not() -> None:
    config = ReferenceConfig(name="x", ref=FROZEN, ema_alpha=0.25)
    check_reference(config, ONE_STAGE, samples_ema=True)
    assert train_settings(config, samples_ema=True) == TrainSettings(
        reference=Reference(FROZEN, 0), averaging=Averaging(0.25, 2)
    )
    free = ReferenceConfig(name="x", ref=NONE, ema_every=5)
    check_reference(free, REFERENCE_FREE, samples_ema=True)
    assert train_settings(free, samples_ema=True) == TrainSettings(
        reference=Reference(NONE, 0), averaging=Averaging(0.5, 5)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ref_every": 4}, "ref_every=4: nothing uses it with algorithm.ref=frozen."),
        ({"ref": LAST, "ref_every": 4}, "ref_every=4: nothing uses it with algorithm.ref=last."),
        ({"ema_every": 4}, "ema_every=4: nothing uses it with algorithm.ref=frozen."),
        ({"ref": POLICY, "ema_every": 4}, "ema_every=4: nothing uses it with algorithm.ref=policy"),
        ({"ref": POLICY, "ema_alpha": 0.9}, "ema_alpha=0.9: nothing uses it with algorithm.ref="),
        ({"ref": POLICY, "ref_every": 0}, "ref_every=0: expected a positive number"),
        ({"ref": EMA, "ema_every": -1}, "ema_every=-1: expected a positive number"),
        ({"ref": EMA, "ema_alpha": 0.0}, "ema_alpha=0.0: expected a positive number"),
        ({"ref": EMA, "ema_alpha": 1.0}, "ema_alpha=1.0: expected less than 1"),
    ],
)
def test_values_that_nobody_uses_or_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"algorithm.{message}")):
        check_reference(ReferenceConfig(name="x", **settings), ITERATED)


def test_an_unused_value_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"Leave it out, or set algorithm\.ref=ema\.$"):
        configured("dpo", ema_every=2).check(CFG)
    on_policy = configured("self_augmented_po", sampler=Sampler.policy, ref=POLICY, ema_alpha=0.5)
    with pytest.raises(ConfigError, match="nothing uses it"):
        on_policy.check(CFG)
    configured("self_augmented_po", ref=FROZEN, ema_alpha=0.9).check(CFG)  # the sampler's


@pytest.mark.parametrize("mode", [FROZEN, POLICY, EMA])
@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo", "sr_dpo", "sr_ipo"])
def test_methods_on_given_pairs_train_against_it(
    name: str, mode: RefMode, tokenizer: ChatTokenizer
) -> None:
    run = ScriptedRun(CFG, tokenizer, pairs=[preference(tokenizer, "p", "yes", "no")])
    (training,) = carry_out(name, run, ref=mode)
    assert training.settings.reference.mode is mode
    assert (training.settings.averaging is not None) == (mode is EMA)


@pytest.mark.parametrize("mode", [FROZEN, POLICY, EMA, LAST])
@pytest.mark.parametrize("name", ["spin", "self_rewarding"])
def test_iterated_methods_train_against_it(
    name: str, mode: RefMode, tokenizer: ChatTokenizer
) -> None:
    run = ScriptedRun(CFG, tokenizer, demos=[question(tokenizer, "r1")])
    run.verdict = lambda prompt: (float(len(prompt)), 0.0)
    modes = [training.settings.reference.mode for training in carry_out(name, run, ref=mode)]
    assert modes and set(modes) == {mode}
