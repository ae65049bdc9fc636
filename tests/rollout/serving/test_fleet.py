"""A fleet of real processes that are killed, stopped, slowed and given wrong weights. What answers
there is a stub, which knows what it has to answer."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from stub_engine import INITIAL, stub_scores
from stub_fleet import FAST, Stubs, ask, check_all, collect, eventually, stub_command

from nemo_selfpref.errors import (
    ConfigError,
    RolloutCancelled,
    RolloutError,
    RolloutRefused,
    RolloutTimeout,
    StaleWeightsError,
    WeightSyncError,
)
from nemo_selfpref.files import write_text
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving import client
from nemo_selfpref.rollout.serving.fleet import RemoteMember, State
from nemo_selfpref.rollout.serving.launcher import ChildProcess, engine_environment
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    GroupSource,
    LabelRecord,
    LabelsCall,
    ParamsRecord,
    RequestRecord,
)
from nemo_selfpref.rollout.serving.work import GenerateWork, share_out
from nemo_selfpref.types import WeightSet

FIRST = {"start": 1}


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Stubs]:
    stubs = Stubs(tmp_path)
    yield stubs
    stubs.close()


def first_only(value: object) -> dict[str, object]:
    """A fault of the first start; the process started after it has none."""
    return {**FIRST, "value": value}


# -- without faults ---------------------------------------------------------------------------


def test_every_request_is_answered_once_and_by_both(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    call = ask(30)
    check_all(call, collect(fleet, call), INITIAL)
    labels = LabelsCall(prompts=[[5, n] for n in range(9)], labels=[7, 8])
    scores: dict[int, LabelRecord] = {}
    fleet.label_scores(labels, lambda record: scores.update({record.index: record}), Until())
    want = [stub_scores(prompt, [7, 8], INITIAL) for prompt in labels.prompts]
    assert [scores[n].logprobs for n in range(9)] == want
    assert fleet.health().status == "serving" and fleet.health().weights == {"policy": INITIAL}
    assert fleet.info().memory == {"weights": 200, "kv_cache": 20}
    assert [row["state"] for row in fleet.table()] == ["serving", "serving"]
    assert [m.load for m in members] == [0, 0] and stubs.notes == []


def test_ids_may_repeat_and_an_empty_call_asks_nobody(stubs: Stubs) -> None:
    fleet, _ = stubs.fleet()
    call = ask(6)
    same = [request.model_copy(update={"id": "same"}) for request in call.requests]
    found = collect(fleet, call.model_copy(update={"requests": same}))
    assert [record.id for record in found] == ["same"] * 6
    assert collect(fleet, ask(0)) == []


def work(*prompts: list[int], limit: int = 10) -> GenerateWork:
    requests = [RequestRecord(id=str(n), prompt_ids=p) for n, p in enumerate(prompts)]
    params = ParamsRecord(max_new_tokens=limit)
    return GenerateWork(GenerateCall(requests=requests, params=params), lambda _: None)


def test_answers_to_one_prompt_come_from_one_engine() -> None:
    made = work([5], [6], [5], [7], [5], [8])
    # [5] thrice: 1 + 3 * 10 tokens; the others 11 each, so all three on the other engine.
    assert share_out(made, range(6), [0, 0]) == [[0, 2, 4], [1, 3, 5]]


def test_work_goes_to_whoever_has_least() -> None:
    made = work([5], [6], [7], [8])
    # 11 tokens each; the first engine has 30 to do already: 11, 22, 33 on the second, then 41.
    assert share_out(made, range(4), [30, 0]) == [[3], [0, 1, 2]]
    assert share_out(made, [2], [0, 0, 0]) == [[2], [], []]


def test_callers_mistakes_are_refused_before_any_engine_is_asked(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    stale = ask(2, expect=INITIAL.model_copy(update={"version": 4}))
    with pytest.raises(StaleWeightsError, match=r"version 4 .* were asked for; version -1"):
        collect(fleet, stale)
    with pytest.raises(RolloutError, match=r"no ema weights are held; there are policy"):
        fleet.check(ask(1, weight_set=WeightSet.EMA))
    for prompt, why in (([], "is empty"), ([5] * 61, "with 4 to come"), ([500], "token 500")):
        record = RequestRecord(id="a", prompt_ids=prompt)
        call = GenerateCall(requests=[record], params=ParamsRecord(max_new_tokens=4))
        with pytest.raises(RolloutRefused, match=why):
            fleet.check(call)
    with pytest.raises(RolloutRefused, match="label 500 is no token"):
        fleet.check(LabelsCall(prompts=[[5]], labels=[7, 500]))
    assert [m.state for m in members] == [State.SERVING] * 2 and stubs.notes == []


def test_the_tightest_of_the_engines_limits_holds_for_all(stubs: Stubs) -> None:
    for number, limits in enumerate(({}, {"max_temperature": 2.0}, {"max_labels": 3})):
        (stubs.root / f"model-{number}").mkdir()
        stubs.set(number, **limits)
    fleet, members = stubs.fleet(3)
    assert (fleet.info().max_temperature, fleet.info().max_labels) == (2.0, 3)
    call = ask(6)
    hot = call.model_copy(update={"params": ParamsRecord(max_new_tokens=4, temperature=2.5)})
    with pytest.raises(RolloutRefused, match=r"temperature is 2\.5; the engine samples at 2\.0"):
        collect(fleet, hot)
    found: list[LabelRecord] = []
    with pytest.raises(RolloutRefused, match="4 labels were asked for; the engine weighs 3"):
        labels = LabelsCall(prompts=[[5]], labels=[7, 8, 9, 10])
        fleet.label_scores(labels, found.append, Until.within(60))
    assert found == [] and stubs.notes == [] and [m.load for m in members] == [0, 0, 0]
    warm = call.model_copy(update={"params": ParamsRecord(max_new_tokens=4, temperature=2.0)})
    check_all(warm, collect(fleet, warm), INITIAL)
    repeated = LabelsCall(prompts=[[5]], labels=[7, 8, 9, 7])
    fleet.label_scores(repeated, found.append, Until.within(60))
    assert [len(record.logprobs) for record in found] == [4]


@pytest.mark.parametrize("fault", ["refuse_at_once", "refuse_question"])
def test_what_an_engine_calls_the_callers_mistake_is_asked_of_nobody_else(
    stubs: Stubs, fault: str
) -> None:
    fleet, members = stubs.fleet()
    stubs.set(0, **{fault: True})
    call = ask(10)
    with pytest.raises(RolloutRefused, match=r"no stub can .* that") as error:
        collect(fleet, call)
    assert members[0].url in str(error.value) and "lost" not in str(error.value)
    assert stubs.notes == [] and [m.state for m in members] == [State.SERVING] * 2
    eventually(lambda: [m.load for m in members] == [0, 0])
    stubs.set(0)
    check_all(call, collect(fleet, call), INITIAL)
    assert [m.restarts for m in members] == [0, 0]


def test_engines_of_another_kind_are_refused_and_ended(stubs: Stubs) -> None:
    (stubs.root / "model-1").mkdir()
    stubs.set(1, vocab_size=501)
    members = [stubs.member(0), stubs.member(1)]
    with pytest.raises(RolloutError, match=r"engine-1 .*vocab_size is 501, engine-0 has 500"):
        stubs.fleet(members)
    assert [m.child.alive for m in members if m.child] == [False, False]


def test_an_engine_that_does_not_start_is_named_with_its_log(stubs: Stubs) -> None:
    (stubs.root / "model-0").mkdir()
    stubs.set(0, no_start=True)
    with pytest.raises(RolloutError, match=r"engine-0 did not start: (?s:.*)this stub does not"):
        stubs.fleet()


def test_more_engines_demanded_than_there_are(stubs: Stubs) -> None:
    with pytest.raises(ConfigError, match="min_engines=3, but 2 engines hold policy"):
        stubs.fleet(2, replace(FAST, min_engines=3))


# -- engines that die, go silent or are slow --------------------------------------------------


def kill_at(member: object, count: int, number: int) -> object:
    def act(found: int) -> None:
        if found == count:
            os.kill(member.child.pid, number)  # type: ignore[attr-defined]

    return act


def test_killed_in_the_middle_of_a_batch_nothing_is_lost_or_doubled(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    for number in (0, 1):
        stubs.set(number, answer_s=0.02)
    call = ask(40)
    found = collect(fleet, call, on_record=kill_at(members[0], 6, signal.SIGKILL))
    check_all(call, found, INITIAL)
    assert any("answers of engine-0 are asked for again" in note for note in stubs.notes)
    eventually(lambda: members[0].state is State.SERVING and members[0].restarts == 1)
    assert "status -9" in " ".join(stubs.notes)
    check_all(call, collect(fleet, call), INITIAL)
    assert (stubs.root / "processes" / "engine-0.start-2.log").exists()


def test_one_engine_alone_that_is_killed_is_waited_for(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(1)
    stubs.set(0, die_after=first_only(3))
    call = ask(10)
    check_all(call, collect(fleet, call), INITIAL)
    assert members[0].restarts == 1


def test_a_stopped_engine_that_goes_on_later_doubles_nothing(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 1.5)
    fleet, members = stubs.fleet(2, replace(FAST, suspect_after=1000))
    stubs.set(0, silent_after=4)
    stubs.set(1, answer_s=0.15)
    call = ask(40)
    woken: list[int] = []

    def wake(found: int) -> None:
        again = any("asked for again" in note for note in stubs.notes)
        if again and not woken:
            woken.append(found)
            stubs.set(0, answer_s=0.01)
            os.kill(members[0].child.pid, signal.SIGCONT)

    found = collect(fleet, call, on_record=wake)
    check_all(call, found, INITIAL)
    assert woken and woken[0] < 40, "it went on while its questions were being asked again"
    eventually(lambda: members[0].state is State.SERVING)
    assert members[0].restarts == 0
    stubs.notes.clear()
    check_all(call, collect(fleet, call), INITIAL)
    assert stubs.notes == []


def test_a_stopped_engine_is_noticed_by_its_probes_and_started_again(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 1000.0)
    fleet, members = stubs.fleet(2, replace(FAST, suspect_after=2))
    stubs.set(0, silent_after=first_only(4))
    call = ask(30)
    check_all(call, collect(fleet, call), INITIAL)
    eventually(lambda: members[0].state is State.SERVING and members[0].restarts == 1)
    assert any("2 probes failed in a row" in note for note in stubs.notes)


def test_a_server_that_answers_for_a_dead_engine_is_not_believed(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, stall_s=0.8))
    stubs.set(0, dead_engine=first_only(True))
    call = ask(20)
    check_all(call, collect(fleet, call), INITIAL)
    eventually(lambda: members[0].state is State.SERVING and members[0].restarts == 1)
    assert any("it took no step for" in note for note in stubs.notes)
    assert members[1].restarts == 0


def test_an_engine_that_mistrusts_its_own_weights_is_started_again(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    stubs.set(0, quarantined=first_only("the weights could not be put back"))
    eventually(lambda: members[0].restarts == 1 and members[0].state is State.SERVING)
    assert any("could not be put back" in note for note in stubs.notes)
    check_all(ask(8), collect(fleet, ask(8)), INITIAL)


def test_a_slow_engine_is_waited_for(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 3.0)  # Each answer takes longer.
    fleet, members = stubs.fleet()
    stubs.set(0, answer_s=3.5)
    call = ask(4)
    check_all(call, collect(fleet, call), INITIAL)
    assert stubs.notes == [] and [m.restarts for m in members] == [0, 0]


def test_what_fails_twice_is_an_error_that_counts_and_says_why(stubs: Stubs) -> None:
    fleet, _ = stubs.fleet()
    for number in (0, 1):
        stubs.set(number, refuse_answers=True)
    with pytest.raises(
        RolloutError, match=r"5 of 10 answers were lost twice; engine-[01]: .*"
    ) as e:
        collect(fleet, ask(10))
    assert str(e.value).count("this stub refuses to answer") == 2
    for number in (0, 1):
        stubs.set(number)
    check_all(ask(10), collect(fleet, ask(10)), INITIAL)


# -- restarts and the floor -------------------------------------------------------------------


def test_too_few_engines_are_an_error_with_every_reason(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, min_engines=2, max_restarts=0))
    os.kill(members[0].child.pid, signal.SIGKILL)
    eventually(lambda: members[0].state is State.LOST)
    with pytest.raises(
        RolloutError, match=r"fewer than rollout\.vllm\.min_engines=2 .*engine-0 is"
    ):
        collect(fleet, ask(4))
    health = fleet.health()
    assert health.status == "quarantined" and "status -9" in health.reason
    with pytest.raises(WeightSyncError, match=r"fewer than rollout\.vllm\.min_engines=2"):
        fleet.update(stubs.weights(1))
    assert fleet.table()[0]["state"] == "lost" and "status -9" in fleet.table()[0]["reason"]


def test_an_engine_given_up_does_not_keep_its_memory(stubs: Stubs) -> None:
    _, members = stubs.fleet(2, replace(FAST, max_restarts=0, suspect_after=1))
    os.kill(members[0].child.pid, signal.SIGSTOP)
    eventually(lambda: members[0].state is State.LOST)
    assert not members[0].child.alive


def test_calls_wait_while_an_engine_is_started_again(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, min_engines=2))
    os.kill(members[0].child.pid, signal.SIGKILL)
    eventually(lambda: members[0].state is not State.SERVING)
    check_all(ask(8), collect(fleet, ask(8)), INITIAL)
    assert members[0].restarts == 1
    with pytest.raises(RolloutTimeout):
        os.kill(members[0].child.pid, signal.SIGKILL)
        eventually(lambda: members[0].state is not State.SERVING)
        collect(fleet, ask(8), Until.within(0.05))


def test_an_engine_is_started_again_so_often_and_no_more(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, max_restarts=2))
    stubs.set(0, no_start=True)
    os.kill(members[0].child.pid, signal.SIGKILL)
    eventually(lambda: members[0].state is State.LOST)
    assert members[0].restarts == 2 and (stubs.root / "model-0" / "starts").read_text() == "3"
    assert "started again 2 times" in members[0].reason
    check_all(ask(8), collect(fleet, ask(8)), INITIAL)


def test_an_engine_back_with_old_weights_answers_only_once_it_has_the_latest(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    first, second = stubs.weights(1), stubs.weights(2)
    assert fleet.update(first).stamp == first.manifest.stamp
    fleet.update(second)
    old = first.manifest.stamp.model_dump()
    slow = {"start": 2, "value": 1.0}  # Long enough to be asked with the old ones.
    stubs.set(0, starts_with={"start": 2, "value": old}, update_s=slow, answer_s=0.01)
    stubs.set(1, answer_s=0.01)
    stamp = second.manifest.stamp
    call = ask(12, expect=stamp)
    os.kill(members[0].child.pid, signal.SIGKILL)
    eventually(lambda: members[0].state is not State.SERVING)
    rounds = 0
    stubs.notes.clear()
    while members[0].state is not State.SERVING or stamp not in members[0].held.values():
        check_all(call, collect(fleet, call), stamp)
        rounds += 1
    assert rounds > 3
    check_all(call, collect(fleet, call), stamp)
    assert members[0].restarts == 1
    # The engine itself would have refused; it was not even asked.
    assert not any("asked for again" in note for note in stubs.notes)


def remote(stubs: Stubs, number: int, port: int = 0) -> tuple[ChildProcess, int]:
    spec = stubs.spec(number).model_copy(update={"port": port})
    (stubs.root / f"model-{number}").mkdir(exist_ok=True)
    path = stubs.root / f"remote-{number}.json"
    write_text(path, spec.model_dump_json())
    child = ChildProcess(
        stub_command(os.sys.executable, path),  # type: ignore[attr-defined]
        ready_file=Path(spec.ready_file),
        log=stubs.root / "remote.log",
        env=engine_environment(),
    )
    return child, child.wait_ready(Until.within(60))


def test_somebody_elses_server_is_taken_back_and_brought_up_to_date(stubs: Stubs) -> None:
    child, port = remote(stubs, 1)
    there = RemoteMember("there", f"http://127.0.0.1:{port}", stubs.token)
    fleet, _ = stubs.fleet([stubs.member(0), there], replace(FAST, suspect_after=1))
    sent = stubs.weights(3)
    fleet.update(sent)
    stamp = sent.manifest.stamp
    for number in (0, 1):
        stubs.set(number, answer_s=0.02)

    def kill(found: int) -> None:
        if found == 5:
            os.kill(child.pid, signal.SIGKILL)

    call = ask(40, expect=stamp)
    check_all(call, collect(fleet, call, on_record=kill), stamp)
    child.stop()
    eventually(lambda: there.state is State.QUARANTINED)
    assert fleet.health().status == "serving"
    again, _ = remote(stubs, 1, port)  # With the weights it starts from.
    with again:
        check_all(call, collect(fleet, call), stamp)
        eventually(lambda: there.state is State.SERVING and stamp in there.held.values())
        check_all(call, collect(fleet, call), stamp)
        assert there.restarts == 0
        fleet.close()
        assert again.alive, "only what the fleet started ends with it"


def test_a_server_that_went_silent_is_given_up_before_its_connection_is(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 1000.0)
    child, port = remote(stubs, 1)
    with child:
        there = RemoteMember("there", f"http://127.0.0.1:{port}", stubs.token)
        fleet, _ = stubs.fleet([stubs.member(0), there], replace(FAST, suspect_after=2))
        stubs.set(1, silent_after=3)
        call = ask(20)
        check_all(call, collect(fleet, call), INITIAL)
        assert there.state is State.QUARANTINED
        stubs.set(1)
        os.kill(child.pid, signal.SIGCONT)
        eventually(lambda: there.state is State.SERVING)
        check_all(call, collect(fleet, call), INITIAL)


def test_a_suspect_gets_no_work_until_it_answers(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, suspect_after=1000))
    os.kill(members[0].child.pid, signal.SIGSTOP)
    eventually(lambda: members[0].state is State.SUSPECT)
    check_all(ask(10), collect(fleet, ask(10), Until.within(10)), INITIAL)
    assert not any("asked for again" in note for note in stubs.notes)
    os.kill(members[0].child.pid, signal.SIGCONT)
    eventually(lambda: members[0].state is State.SERVING)


# -- new weights ------------------------------------------------------------------------------


def test_a_wrong_token_is_told_at_once(stubs: Stubs) -> None:
    """Not after start_timeout_s: a server that answers will not answer otherwise later."""
    child, port = remote(stubs, 1)
    with child:
        there = RemoteMember("there", f"http://127.0.0.1:{port}", "x" * 32)
        until = Until.within(600)
        with pytest.raises(RolloutError, match="a bearer token is needed"):
            there.start(until)
        assert until.remaining is not None and until.remaining > 500


def test_an_update_one_engine_refuses_reaches_it_later(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    stubs.set(0, refuse_updates=first_only(True))
    sent = stubs.weights(1)
    assert fleet.update(sent).stamp == sent.manifest.stamp
    assert any("engine-0 did not take in policy version 1" in note for note in stubs.notes)
    call = ask(10, expect=sent.manifest.stamp)
    check_all(call, collect(fleet, call), sent.manifest.stamp)
    # It refuses again, is started anew, and takes them.
    eventually(lambda: members[0].held.get(WeightSet.POLICY) == sent.manifest.stamp)
    assert members[0].restarts == 1
    check_all(call, collect(fleet, call), sent.manifest.stamp)


def test_an_update_all_refuse_leaves_the_weights_before(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    before = stubs.weights(1)
    fleet.update(before)
    for number in (0, 1):
        stubs.set(number, refuse_updates=True)
    with pytest.raises(WeightSyncError, match=r"engine-0: .* stub refuses .*engine-1: .*") as error:
        fleet.update(stubs.weights(2))
    assert "taken in by 0 engines" in str(error.value)
    assert f"{before.manifest.stamp} is served" in str(error.value)
    assert fleet.health().status == "serving"
    call = ask(10, expect=before.manifest.stamp)
    check_all(call, collect(fleet, call), before.manifest.stamp)
    assert [m.restarts for m in members] == [0, 0]


@pytest.mark.parametrize("sent_before", [True, False])
def test_an_update_too_few_take_in_is_taken_back(stubs: Stubs, sent_before: bool) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, min_engines=2))
    stamp = INITIAL
    if sent_before:
        fleet.update(stubs.weights(1))
        stamp = stubs.weights(1).manifest.stamp
    stubs.set(0, refuse_updates=first_only(True))
    with pytest.raises(WeightSyncError, match="taken in by 1 engines, fewer"):
        fleet.update(stubs.weights(2))
    call = ask(10, expect=stamp)
    check_all(call, collect(fleet, call), stamp)
    with pytest.raises(StaleWeightsError):
        collect(fleet, ask(1, expect=stubs.weights(2).manifest.stamp))
    assert [m.held[WeightSet.POLICY] for m in members] == [stamp, stamp]
    # Weights from before any were sent come back with a new start alone.
    assert [m.restarts for m in members] == ([0, 0] if sent_before else [0, 1])
    stubs.set(0)
    fleet.update(stubs.weights(2))
    call = ask(10, expect=stubs.weights(2).manifest.stamp)
    check_all(call, collect(fleet, call), stubs.weights(2).manifest.stamp)


def test_an_update_goes_on_without_an_engine_that_went_silent(stubs: Stubs) -> None:
    fleet, members = stubs.fleet(2, replace(FAST, suspect_after=2))
    os.kill(members[0].child.pid, signal.SIGSTOP)
    sent = stubs.weights(1)
    fleet.update(sent)
    eventually(lambda: members[0].held.get(WeightSet.POLICY) == sent.manifest.stamp)
    assert members[0].restarts == 1


def test_updates_that_cannot_be_meant_are_refused(stubs: Stubs) -> None:
    fleet, _ = stubs.fleet()
    fleet.update(stubs.weights(5))
    with pytest.raises(WeightSyncError, match=r"version 4 .* is older than version 5") as error:
        fleet.update(stubs.weights(4))
    assert "engine-0" not in str(error.value), "no engine had to refuse it"
    fleet.update(stubs.weights(4, run="b"))  # Another run counts anew.
    group = GroupSource(backend="gloo", host="127.0.0.1", port=1, rank=1, world_size=2)
    with pytest.raises(WeightSyncError, match="a fleet sends weights from folders"):
        fleet.update(stubs.weights(6).model_copy(update={"source": group}))
    with pytest.raises(WeightSyncError, match="does not hold ema weights"):
        fleet.update(stubs.weights(6, weight_set=WeightSet.EMA))


def test_sets_on_engines_of_their_own_change_apart(stubs: Stubs) -> None:
    fleet, _ = stubs.fleet([stubs.member(0), stubs.member(1, ["ema"])])
    assert fleet.info().weight_sets == ["ema", "policy"]
    sent = stubs.weights(1, weight_set=WeightSet.EMA)
    fleet.update(sent)
    for name, stamp in ((WeightSet.EMA, sent.manifest.stamp), (WeightSet.POLICY, INITIAL)):
        call = ask(6, stamp, name)
        check_all(call, collect(fleet, call), stamp)
    assert fleet.health().weights == {"ema": sent.manifest.stamp, "policy": INITIAL}


def test_no_call_is_answered_by_two_versions(stubs: Stubs) -> None:
    fleet, _ = stubs.fleet()
    for number in (0, 1):
        stubs.set(number, answer_s=0.005)
    stop, made, wrong = threading.Event(), [], []

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                found = collect(fleet, ask(10))
                made.append({record.weight_digest for record in found})
            except StaleWeightsError:
                continue
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=keep_asking) for _ in range(3)]
    for thread in threads:
        thread.start()
    sent = [stubs.weights(version) for version in range(1, 7)]
    for number, weights in enumerate(sent):
        fleet.update(weights)
        eventually(lambda least=3 * (number + 1): len(made) >= least or bool(wrong))
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and {len(digests) for digests in made} == {1}
    assert {sent[-1].manifest.digest} in made


# -- giving up, sleep, the end ----------------------------------------------------------------


def test_calls_end_at_their_deadline_and_when_cancelled(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    for number in (0, 1):
        stubs.set(number, answer_s=1.0)
    with pytest.raises(RolloutTimeout):
        collect(fleet, ask(60), Until.within(1.0))
    found: list[CompletionRecord] = []
    enough = Until.within(60, lambda: len(found) >= 3)
    with pytest.raises(RolloutCancelled):
        fleet.generate(ask(60), found.append, enough)
    assert len(found) == 3
    for number in (0, 1):
        stubs.set(number, answer_s=60.0)
    checks = itertools.count()
    with pytest.raises(RolloutCancelled):
        collect(fleet, ask(2), Until.within(60, lambda: next(checks) > 10))
    # Nothing comes that could end them: the engines themselves were told.
    eventually(lambda: all(m.client.health().running == 0 for m in members), 20)
    assert len(found) == 3 and [m.load for m in members] == [0, 0]
    assert [m.state for m in members] == [State.SERVING] * 2 and stubs.notes == []


def test_all_sleep_or_none(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    fleet.sleep()
    assert fleet.health().status == "sleeping"
    with pytest.raises(RolloutError, match="wake them first"):
        fleet.check(ask(1))
    with pytest.raises(WeightSyncError, match="wake them first"):
        fleet.update(stubs.weights(1))
    fleet.wake()
    check_all(ask(4), collect(fleet, ask(4)), INITIAL)
    stubs.set(1, cannot_sleep=True)
    with pytest.raises(RolloutError, match=r"engine-1: .*cannot sleep"):
        fleet.sleep()
    check_all(ask(4), collect(fleet, ask(4)), INITIAL)
    assert [m.client.health().status for m in members] == ["serving"] * 2


def test_close_ends_the_processes_and_what_still_waits(stubs: Stubs) -> None:
    fleet, members = stubs.fleet()
    for number in (0, 1):
        stubs.set(number, answer_s=30.0)
    wrong: list[Exception] = []

    def wait_long() -> None:
        try:
            collect(fleet, ask(4))
        except RolloutError as error:
            wrong.append(error)

    waiting = threading.Thread(target=wait_long)
    waiting.start()
    eventually(lambda: all(m.client.health().running == 1 for m in members))
    fleet.close()
    waiting.join(timeout=30)
    assert not waiting.is_alive() and "the fleet was closed" in str(wrong[0])
    assert [m.child.alive for m in members] == [False, False]
