"""A process killed at any moment of a save leaves what was there before, or what it was to be.

Every moment: before, after and in the middle of each call that changes the disk. Fast tests die at
some of them, slow ones at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from crashing import Outcome, Story, die_everywhere, in_child, unflushed
from saved_training import Training, equal, save, weights_of

from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.seal import problems
from nemo_selfpref.checkpoint.training_state import (
    load_weights,
    save_weights,
)
from nemo_selfpref.config.schema import CheckpointParams
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.files import new_folder, read_json, write_bytes, write_json, write_text
from nemo_selfpref.training.checkpoints import StageCheckpoints
from nemo_selfpref.training.reference_segments import Segments
from nemo_selfpref.training.stage_files import check_stages, done_facts, is_done, mark_done
from nemo_selfpref.training.store import (
    read_completions,
    read_label_scores,
    read_pairs,
    read_tensors,
    write_completions,
    write_label_scores,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import Completion, FinishReason, LabelScores, PreferencePair, WeightSet

CPU = torch.device("cpu")
FEW = 12


@pytest.fixture(scope="module")
def trained(llama_folder: Path) -> Training:
    """In its third step."""
    made = Training(llama_folder)
    for number in (1, 2, 3):
        made.step(number)
    return made


@pytest.fixture(scope="module")
def other(llama_folder: Path) -> Training:
    """Another process' policy, which reads what was saved."""
    made = Training(llama_folder)
    made.step(1)  # the optimizer's state is there after a step
    return made


@pytest.fixture(scope="module")
def stage(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage with the checkpoints of the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("stage")
    made = Training(llama_folder)
    for number in (1, 2):
        made.step(number)
        save(folder, number, made.snapshot(number))
    return folder


def start(stage: Path, trained: Training, other: Training) -> int:
    """The step that the next start of a run goes on from; all it finds is whole."""
    said: list[str] = []
    found = StageCheckpoints(stage, CheckpointParams(), CPU, said.append).newest()
    assert found is not None and said == []
    assert problems(found) == []
    step = int(found.name.removeprefix("step-"))
    assert equal(other.load(found), trained.states[step]) and other.facts["global_step"] == step
    names = sorted(path.name for path in found.parent.iterdir())
    kept = [name for name in names if name.startswith("step-")]
    left = [n for n in names if n not in kept and n != "latest"]
    # Of a line not yet renamed; a few bytes that nothing reads.
    assert all(n.startswith(".latest.") for n in left), left
    # Step 1 is gone on from only where step 2 was to be replaced, between the two renamings.
    assert step == 1 or (found.parent / "latest").read_text().strip() in kept
    return step


def tell(name: str, outcome: Outcome) -> None:
    print(f"\n{outcome.row(name)}", end="")
    assert outcome.found.total() == outcome.deaths and {"old", "new"} <= set(outcome.found)


EVERY = pytest.mark.parametrize(
    "most",
    [FEW, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.long])],
    ids=["some", "all"],
)
WHEN = pytest.mark.parametrize(
    ("most", "background"),
    [
        pytest.param(FEW, False, id="some"),
        pytest.param(FEW, True, id="some-background"),
        pytest.param(None, False, id="all", marks=[pytest.mark.slow, pytest.mark.long]),
        pytest.param(None, True, id="all-background", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)


@WHEN
@pytest.mark.parametrize("keep", [9, 1], ids=["", "pruning"])
def test_a_save_cut_off_anywhere(
    keep: int,
    background: bool,
    most: int | None,
    stage: Path,
    trained: Training,
    other: Training,
    tmp_path: Path,
) -> None:
    # Taken here: a forked process cannot take part in collectives.
    snapshot = trained.snapshot(3)

    def act(copy: Path) -> None:
        save(copy, 3, snapshot, background, keep)

    def after(copy: Path) -> str:
        return {2: "old", 3: "new"}[start(copy, trained, other)]

    outcome = die_everywhere(Story("save", stage, act, after), tmp_path, most)
    tell(f"step 3 over 2, keeping {keep}{', background' * background}", outcome)


@WHEN
def test_a_step_saved_again(
    background: bool,
    most: int | None,
    stage: Path,
    trained: Training,
    other: Training,
    tmp_path: Path,
) -> None:
    other.load(stage / "checkpoints" / "step-000002")
    snapshot = other.snapshot(2, epoch=1)

    def act(copy: Path) -> None:
        save(copy, 2, snapshot, background)

    def after(copy: Path) -> str:
        step = start(copy, trained, other)
        assert step in (1, 2)
        return "step 1" if step == 1 else ("old", "new")[other.facts["epoch"]]

    outcome = die_everywhere(Story("save", stage, act, after), tmp_path, most)
    tell(f"step 2 again{', background' * background}", outcome)
    assert outcome.found["step 1"] <= 2


@EVERY
def test_putting_a_damaged_checkpoint_aside_cut_off_anywhere(
    most: int | None, stage: Path, trained: Training, other: Training, tmp_path: Path
) -> None:
    before = Path(shutil.copytree(stage, tmp_path / "damaged"))
    (before / "checkpoints" / "step-000002" / "lightning.json").write_text("{}")
    (before / "checkpoints" / "damaged-step-000002").mkdir()
    (before / "checkpoints" / "damaged-step-000002" / "old.json").write_text("{}")

    def newest(copy: Path) -> Path | None:
        return StageCheckpoints(copy, CheckpointParams(), CPU, lambda _: None).newest()

    def after(copy: Path) -> str:
        damaged = copy / "checkpoints" / "step-000002"
        state = "old" if damaged.exists() else "new"
        found = newest(copy)
        assert found is not None and found.name == "step-000001" and not damaged.exists()
        assert equal(other.load(found), trained.states[1])
        assert (copy / "checkpoints" / "damaged-step-000002" / "lightning.json").exists()
        return state

    story = Story("aside", before, lambda copy: void(newest(copy)), after)
    (tmp_path / "scratch").mkdir()
    tell("a damaged step 2 put aside", die_everywhere(story, tmp_path / "scratch", most))


def void(_: object) -> None:
    pass


# -- weights alone ------------------------------------------------------------------------------


@EVERY
def test_weights_over_the_weights_of_an_earlier_start(
    most: int | None,
    trained: Training,
    other: Training,
    tokenizer: ChatTokenizer,
    stage: Path,
    tmp_path: Path,
) -> None:
    before = tmp_path / "run"
    other.load(stage / "checkpoints" / "step-000001")
    save_weights(before / "checkpoint", other.policy, tokenizer)
    assert other.policy.weight_version == 1 and trained.policy.weight_version == 3

    snapshot = weights_of(trained.policy, tokenizer, before)

    def act(copy: Path) -> None:
        save_now(copy / "checkpoint", snapshot, CPU)

    def after(copy: Path) -> str:
        found = copy / "checkpoint"
        between = not found.exists()
        if between:  # between the two renamings: both wait under names beside it
            found = copy / ".checkpoint.old"
            assert problems(copy / ".checkpoint.tmp") == []
        assert problems(found) == []
        load_weights(found, other.policy)
        version = other.policy.weight_version
        wanted, named = trained.states[version], dict(other.policy.module.named_parameters())
        assert all(torch.equal(named[name], wanted[name]) for name in named)
        act(copy)  # what the next start does
        assert os.listdir(copy) == ["checkpoint"] and problems(copy / "checkpoint") == []
        return "between" if between else {1: "old", 3: "new"}[version]

    (tmp_path / "scratch").mkdir()
    story = Story("weights", before, act, after)
    outcome = die_everywhere(story, tmp_path / "scratch", most)
    tell("weights again", outcome)
    assert outcome.found["between"] <= 2


# -- single files -------------------------------------------------------------------------------


def pair(name: str) -> list[PreferencePair]:
    return [PreferencePair(name, (1, 2), (3,), (4, 5), provenance={"source": name})]


def answer(name: str) -> list[Completion]:
    return [Completion(name, (5, 2), (-0.5, -2.5), FinishReason.STOP, WeightSet.POLICY, 7)]


def folder_of(path: Path, name: str) -> None:
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        for file in ("a", "sub/b"):
            (folder / file).write_text(name * 100)


def read_folder(path: Path) -> str:
    texts = {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}
    assert texts.keys() == {"a", "sub/b"} and len(set(texts.values())) == 1
    return texts["a"][:3]


FILES: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], str]]] = {
    "write_json": (lambda p, name: write_json(p, {"is": name}), lambda p: read_json(p)["is"]),
    "write_text": (write_text, lambda p: p.read_text()),
    "write_bytes": (lambda p, name: write_bytes(p, name.encode()), lambda p: p.read_text()),
    "write_pairs": (lambda p, name: write_pairs(p, pair(name)), lambda p: read_pairs(p)[0].id),
    "write_completions": (
        lambda p, name: write_completions(p, answer(name)),
        lambda p: read_completions(p)[0].id,
    ),
    "write_label_scores": (
        lambda p, name: write_label_scores(p, [LabelScores((-0.5,), float(name == "new"))]),
        lambda p: ("old", "new")[int(read_label_scores(p)[0].best)],
    ),
    "write_tensors": (
        lambda p, name: write_tensors(p, {name: torch.ones(3)}),
        lambda p: next(iter(read_tensors(p))),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_replaced(name: str, tmp_path: Path) -> None:
    write, read = FILES[name]
    write(tmp_path / "before" / "file", "old")

    def after(copy: Path) -> str:
        found = read(copy / "file")
        write(copy / "file", "new")
        assert read(copy / "file") == "new"
        return found

    story = Story(name, tmp_path / "before", lambda copy: write(copy / "file", "new"), after)
    tell(name, die_everywhere(story, tmp_path))


@EVERY
def test_a_folder_replaced(most: int | None, tmp_path: Path) -> None:
    folder_of(tmp_path / "before" / "out", "old")

    def after(copy: Path) -> str:
        between = not (copy / "out").exists()
        found = read_folder(copy / (".out.old" if between else "out"))
        folder_of(copy / "out", "new")
        assert os.listdir(copy) == ["out"] and read_folder(copy / "out") == "new"
        return "between" if between else found

    story = Story("f", tmp_path / "before", lambda copy: folder_of(copy / "out", "new"), after)
    outcome = die_everywhere(story, tmp_path, most)
    tell("new_folder", outcome)
    assert outcome.found["between"] <= 2


# -- stages and the reference cache -------------------------------------------------------------


@EVERY
def test_a_stage_is_done_when_all_of_it_is_on_disk(most: int | None, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()

    def act(copy: Path) -> None:
        stage = copy / "stages" / "01-answer"
        write_completions(stage / "completions.parquet", answer("new"))
        write_pairs(stage / "pairs" / "step-000001.parquet", pair("new"))
        write_tensors(stage / "reference.safetensors", {"new": torch.ones(3)})
        mark_done(stage, {"stage": "answer"})

    def after(copy: Path) -> str:
        stage = copy / "stages" / "01-answer"
        assert check_stages(copy) == []
        if not is_done(stage):
            act(copy)  # the stage is done again
        assert check_stages(copy) == [] and done_facts(stage) == {"stage": "answer"}
        assert read_pairs(stage / "pairs" / "step-000001.parquet") == pair("new")
        return "new"

    outcome = die_everywhere(Story("stage", tmp_path / "before", act, after), tmp_path, most)
    print(f"\n{outcome.row('a stage with its done.json')}", end="")
    assert outcome.deaths >= (most or 40)


def cached(root: Path, entries: Mapping[bytes, tuple[float, int]]) -> None:
    segments = Segments(root, lambda _: None)
    segments.open("c")
    for key, entry in entries.items():
        segments.add(key, entry)
    segments.flush()


def test_a_segment_of_the_reference_cache(tmp_path: Path) -> None:
    old, new = ({bytes([n]) * 32: (-1.5 * n, n) for n in range(a, a + 4)} for a in (1, 5))
    cached(tmp_path / "before", old)

    def after(copy: Path) -> str:
        said: list[str] = []
        segments = Segments(copy, said.append)
        segments.open("c")
        assert said == [] and {key: segments.get(key) for key in old} == old
        found = {key: segments.get(key) for key in new}
        assert found in (new, dict.fromkeys(new))
        return "new" if found == new else "old"

    story = Story("cache", tmp_path / "before", lambda copy: cached(copy, new), after)
    tell("a segment", die_everywhere(story, tmp_path))


# -- a power cut, which also takes what was not flushed -----------------------------------------


def test_what_has_a_name_was_flushed(
    trained: Training, stage: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(stage, tmp_path / "stage"))
    taken = trained.snapshot(3)
    calls = in_child(lambda: save(copy, 3, taken, True, keep=1), copy)
    assert sum(call.name == "fsync" for call in calls) > 20
    assert unflushed(calls) == []
    final = weights_of(trained.policy, tokenizer, copy)
    weights = in_child(lambda: save_now(copy / "weights", final, CPU), copy)
    assert unflushed(weights) == []
    for name, (write, _) in FILES.items():
        path = copy / "files" / name
        calls = in_child(lambda: write(path, "new"), copy)  # noqa: B023
        done = in_child(lambda: mark_done(path.parent, {}), copy)  # noqa: B023
        assert unflushed([*calls, *done]) == [], name


def test_a_flush_left_out_would_be_seen(stage: Path, trained: Training, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stage, tmp_path / "stage"))
    taken = trained.snapshot(3)
    calls = in_child(lambda: save(copy, 3, taken), copy)
    once = ("shard-00000.safetensors", "checkpoint.json", "weights", "checkpoints")
    flushed = {call.path for call in calls if call.name == "fsync"}
    chosen = [p for p in flushed if p.endswith(once) or Path(p).name.startswith(".latest")]
    assert len(chosen) >= len(once) + 1
    for path in chosen:
        left = [call for call in calls if not (call.name == "fsync" and call.path == path)]
        assert unflushed(left), path
