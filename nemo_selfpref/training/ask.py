"""A stage that asks an external model: one rank asks, all of them read the answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nemo_selfpref.files import read_json, write_json
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest, write_requests
from nemo_selfpref.training.signals import StopSignals, stopped
from nemo_selfpref.training.stages import Stages
from nemo_selfpref.training.store import is_done, mark_done

_POLL_SECONDS = 0.5


def ask_teacher(
    stages: Stages,
    name: str,
    make_teacher: Callable[[], Teacher],
    requests: Sequence[TeacherRequest],
) -> dict[str, str]:
    """Answers by request id, kept in the stage's folder. Collective."""
    stage = stages.next(name)
    stop = _Stop(stage, stages.signals)
    if stages.is_main:
        stop.reset()
    barrier()
    if stages.is_main:
        _ask(stages, name, stage, make_teacher, requests, stop)
    # An external model may take longer than a collective is allowed to wait, so the other
    # ranks watch for the file; the launcher ends them if the first rank fails.
    while not is_done(stage):
        stop.check()
        time.sleep(_POLL_SECONDS)
    barrier()
    return read_json(stage / "answers.json")


class _Stop:
    """A request to stop that reached any rank, told through a file: no rank waits for another."""

    def __init__(self, stage: Path, signals: StopSignals) -> None:
        self._file, self._signals = stage / ".stop", signals

    def reset(self) -> None:
        self._file.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RunStopped if a rank was asked to stop."""
        asked = self._signals.received is not None
        if asked:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
        if asked or self._file.exists():
            raise stopped(f"answers to {self._file.parent.name} that have come are kept")


def _ask(
    stages: Stages,
    name: str,
    stage: Path,
    make_teacher: Callable[[], Teacher],
    requests: Sequence[TeacherRequest],
    stop: _Stop,
) -> None:
    if is_done(stage):
        stages.skip(name, stage)
        return
    console = stages.console
    stage.mkdir(parents=True, exist_ok=True)
    write_requests(stage / "requests.jsonl", requests)
    console.say(f"{name}: {len(requests)} questions, in {stage / 'requests.jsonl'}")
    teacher = make_teacher()
    estimate = getattr(teacher, "estimate_tokens", None)
    if estimate is not None:
        console.say(f"{name}: about {estimate(requests):,} prompt tokens to send")
    with console.progress(name, len(requests), "answers") as progress:
        seen = 0

        def done(total: int) -> None:
            nonlocal seen
            stop.check()
            progress(total - seen, 0)
            seen = total

        answers = teacher.answer(requests, done)
    write_json(stage / "answers.json", answers)
    cost = getattr(teacher, "cost", None)
    facts = {"stage": name, "answers": len(answers), **(vars(cost()) if cost else {})}
    mark_done(stage, facts)
    stages.summary.append(facts)
