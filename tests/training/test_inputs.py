"""What a run says it is made from, and what of it may change before the run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training import inputs, same_inputs
from nemo_selfpref.training.inputs import inputs_of, sampled_sum
from nemo_selfpref.training.store import RunFolder, mark_done

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
ROWS = "".join(json.dumps({"prompt": f"{n}?", "completion": "yes"}) + "\n" for n in range(4))


@dataclass(frozen=True)
class Made:
    """A run that was made, and everything it is made from, in one folder."""

    folder: Path
    settings: tuple[str, ...]
    method: str

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, *more: str) -> DictConfig:
        return load_config(self.method, [*self.settings, *more], SCHEMAS)

    def open(self, *more: str) -> list[str]:
        return RunFolder(self.run).open(self.config(*more), resume=True)

    def refusal(self) -> str:
        with pytest.raises(ConfigError, match="was made from other files") as caught:
            self.open()
        return str(caught.value)


@pytest.fixture
def made(tmp_path: Path, llama_folder: Path) -> Made:
    """Two data files in a folder and one beside it, a start folder, a chat template, a template of
    the judge's, files to learn judging from."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("data/a.jsonl", "data/b.jsonl", "more.jsonl", "judging.jsonl"):
        (tmp_path / name).write_text(ROWS.replace("?", f"? {name}"))
    shutil.copytree(llama_folder, tmp_path / "model")
    shutil.copy(prompts_dir() / "judge_helpful.txt", tmp_path / "judge.txt")
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    settings = (
        f"data.train_path=[{folder},{tmp_path / 'more.jsonl'}]",
        f"model.restore_from_path={tmp_path / 'model'}",
        f"model.tokenizer.chat_template={tmp_path / 'chat.jinja'}",
        f"algorithm.judge.prompt={tmp_path / 'judge.txt'}",
        f"algorithm.judge.augmentation.path=[{tmp_path / 'judging.jsonl'}]",
    )
    made = Made(tmp_path, settings, "osp")
    assert made.open() == []
    return made


def record(made: Made) -> dict:
    return json.loads((made.run / "inputs.json").read_text())


def test_a_run_says_what_it_is_made_from(made: Made) -> None:
    files = record(made)["files"]
    named = {str(Path(name).relative_to(made.folder)): e["setting"] for name, e in files.items()}
    assert {
        "data/a.jsonl": "data.train_path",
        "data/b.jsonl": "data.train_path",
        "more.jsonl": "data.train_path",
        "model/config.json": "model.restore_from_path",
        "model/model.safetensors": "model.restore_from_path",
        "model/tokenizer.json": "model.restore_from_path",
        "chat.jinja": "model.tokenizer.chat_template",
        "judge.txt": "algorithm.judge.prompt",
        "judging.jsonl": "algorithm.judge.augmentation.path",
    }.items() <= named.items()
    data = (made.folder / "more.jsonl").read_bytes()
    expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert files[str(made.folder / "more.jsonl")]["sum"] == expected


def test_the_same_files_continue(made: Made) -> None:
    before = (made.run / "inputs.json").read_bytes()
    for path in sorted(made.folder.glob("**/*.jsonl")):
        path.write_bytes(path.read_bytes())  # written again, at another time
    assert made.open() == []
    assert (made.run / "inputs.json").read_bytes() == before


FILES = [
    ("data/a.jsonl", "data.train_path"),
    ("more.jsonl", "data.train_path"),
    ("judging.jsonl", "algorithm.judge.augmentation.path"),
    ("judge.txt", "algorithm.judge.prompt"),
    ("chat.jinja", "model.tokenizer.chat_template"),
    ("model/config.json", "model.restore_from_path"),
    ("model/tokenizer.json", "model.restore_from_path"),
    ("model/model.safetensors", "model.restore_from_path"),
]


@pytest.mark.parametrize(("name", "setting"), FILES)
def test_one_changed_byte_is_refused_with_both_sums(made: Made, name: str, setting: str) -> None:
    path = made.folder / name
    data = bytearray(path.read_bytes())
    was = record(made)["files"][str(path)]["sum"]
    data[-2] ^= 1
    path.write_bytes(data)
    text = made.refusal()
    now = inputs.sums_of(inputs_of(to_typed(made.config())))[str(path)]
    assert now is not None and now["sha256"] != was["sha256"]
    assert text.splitlines()[1:-1] == [
        f"  {path} ({setting}): sha256 {was['sha256'][:16]} -> {now['sha256'][:16]}, "
        f"bytes {len(data)} -> {len(data)}"
    ]
    assert text.endswith("Give them back as they were, or give the run another `name`.")


def test_without_the_comparison_nothing_would_be_noticed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made.folder / "more.jsonl").write_text(ROWS)
    assert "more.jsonl" in made.refusal()
    monkeypatch.setattr(same_inputs, "_differences", lambda *_: [])
    assert made.open() == []


def test_all_that_changed_is_told_at_once(made: Made) -> None:
    (made.folder / "data" / "a.jsonl").unlink()
    (made.folder / "data" / "c.jsonl").write_text(ROWS)
    (made.folder / "judge.txt").write_text("other")
    size = record(made)["files"][str(made.folder / "data" / "a.jsonl")]["sum"]["bytes"]
    gone, new, changed = made.refusal().splitlines()[1:-1]
    assert f"data/a.jsonl (data.train_path): is gone; it had {size} bytes, sha256 " in gone
    assert "data/c.jsonl (data.train_path): is new: the run was made without it" in new
    assert "judge.txt (algorithm.judge.prompt): sha256 " in changed


def test_appended_rows_do_not_fit_the_cursor(made: Made) -> None:
    with open(made.folder / "more.jsonl", "a", encoding="utf-8") as file:
        file.write(ROWS)
    assert "it has grown, what it held is unchanged: the cursor no longer fits" in made.refusal()


def test_a_longer_file_with_other_rows_has_not_grown(made: Made) -> None:
    path = made.folder / "more.jsonl"
    path.write_text("\n" + path.read_text() + ROWS)
    assert "it has grown" not in made.refusal()


def test_a_weight_file_of_other_values_is_noticed(made: Made) -> None:
    from safetensors.torch import load_file, save_file

    path = made.folder / "model" / "model.safetensors"
    size = path.stat().st_size
    save_file({name: t + 0.125 for name, t in load_file(path).items()}, path, {"format": "pt"})
    assert path.stat().st_size == size
    assert "model.safetensors (model.restore_from_path): sha256" in made.refusal()


def test_a_large_weight_file_is_sampled(tmp_path: Path) -> None:
    """64 blocks of 64 KiB, first and last byte included: of 20 MiB some 4 MiB are read."""
    path, size = tmp_path / "w.safetensors", 20 << 20
    header = json.dumps({"x": [0, 1]}).encode().ljust(1 << 17)
    data = bytearray(len(header).to_bytes(8, "little") + header).ljust(size, b"\1")
    path.write_bytes(data)
    before = sampled_sum(path, size)

    def changed_at(place: int) -> bool:
        data[place] ^= 1
        path.write_bytes(data)
        data[place] ^= 1
        return sampled_sum(path, size) != before

    last_block = (size - (1 << 16)) // 63  # the second block begins here
    assert all(map(changed_at, (0, 8, 1 << 17, last_block, size - 1)))
    assert not changed_at(last_block - 1)


def test_a_checkpoint_is_known_by_its_manifest(made: Made, tmp_path: Path) -> None:
    start = tmp_path / "start"
    for name in (
        "checkpoint.json",
        "manifest.json",
        "weights/index.json",
        "tokenizer/tokenizer.json",
    ):
        (start / name).parent.mkdir(parents=True, exist_ok=True)
        (start / name).write_text("{}")
    found = inputs_of(to_typed(made.config(f"model.restore_from_path={start}")))
    names = {str(Path(name).relative_to(start)) for name in found if name.startswith(str(start))}
    assert names == {
        "checkpoint.json",
        "manifest.json",
        "weights/index.json",
        "tokenizer/tokenizer.json",
    }


@pytest.fixture
def upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Puts another text into a prompt of the package, in a copy of it."""
    shutil.copytree(prompts_dir(), tmp_path / "prompts")
    monkeypatch.setattr(inputs, "prompts_dir", lambda: tmp_path / "prompts")
    return lambda name: (tmp_path / "prompts" / f"{name}.txt").write_text("{{query}} in verse")


def test_a_prompt_changed_by_an_upgrade_is_refused_by_name(
    tmp_path: Path, upgrade: Callable[[str], object]
) -> None:
    made = Made(tmp_path, ("data.train_path=[x.jsonl]",), "sr_dpo")
    made.open()
    upgrade("judge_helpful")
    assert made.open() == []  # not asked by this method
    upgrade("sr_augment")
    assert "conf/prompts/sr_augment.txt (algorithm.augment_prompt): sha256" in made.refusal()


def test_prompts_a_method_chooses_itself_are_watched(
    tmp_path: Path, upgrade: Callable[[str], object]
) -> None:
    made = Made(tmp_path, ("data.train_path=[x.jsonl]",), "sgpo")
    made.open()
    upgrade("sgpo_refine")
    assert "conf/prompts/sgpo_refine.txt (algorithm.improve_prompt): sha256" in made.refusal()


def test_answers_come_after_the_questions_and_stay(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    settings = ("data.train_path=[x.jsonl]", "algorithm.targets.source=file")
    made = Made(tmp_path, (*settings, f"algorithm.targets.path={answers}"), "sgpo")
    made.open()
    for text in ('{"id": "a", "answer": "1"}\n', '{"id": "a", "answer": "2"}\n'):
        answers.write_text(text)
        assert made.open() == []  # not read yet
    stage = made.run / "stages" / "02-targets"
    stage.mkdir(parents=True)
    (stage / "answers.json").write_text("{}")
    mark_done(stage, {"stage": "targets"})
    assert made.open() == []
    answers.write_text(answers.read_text() + '{"id": "b", "answer": "3"}\n')
    assert made.open() == []  # answers to later questions
    answers.write_text('{"id": "a", "answer": "4"}\n')
    assert "answers.jsonl (algorithm.targets.path): sha256" in made.refusal()
    answers.unlink()
    assert "answers.jsonl (algorithm.targets.path): is gone" in made.refusal()


def test_other_versions_are_told_and_allowed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    was = record(made)["versions"]
    assert {"python", "nemo_selfpref", "torch", "megatron-core", "transformers"} <= was.keys()
    now = {**was, "torch": "99.0", "nemo_selfpref": "98.0"}
    monkeypatch.setattr(same_inputs, "versions_of", lambda _: now)
    (note,) = made.open()
    assert f"nemo_selfpref {was['nemo_selfpref']} -> 98.0, torch {was['torch']} -> 99.0" in note
    assert "last bits may differ" in note


def test_the_vllm_of_another_environment_is_recorded(made: Made, tmp_path: Path) -> None:
    (tmp_path / "env/lib/python3.12/site-packages/vllm-0.32.1.dist-info").mkdir(parents=True)
    more = ("rollout=vllm", f"rollout.vllm.python={tmp_path}/env/bin/python")
    assert same_inputs.versions_of(to_typed(made.config(*more)))["vllm"] == "0.32.1"
    assert "vllm" not in same_inputs.versions_of(to_typed(made.config()))


def test_another_layout_is_told_and_allowed(made: Made) -> None:
    (note,) = made.open("model.tensor_model_parallel_size=2", "trainer.devices=4")
    assert note == (
        "resharded: the run was made on TP1 PP1 CP1 EP1 on 1 process, "
        "it goes on with TP2 PP1 CP1 EP1 on 4 processes"
    )


def test_changed_settings_stand_one_above_the_other(made: Made) -> None:
    with pytest.raises(ConfigError) as caught:
        made.open("seed=2", "model.global_batch_size=8", "model.optim.lr=1e-3")
    assert str(caught.value).splitlines()[1:-1] == [
        "  -model.global_batch_size: 64",
        "  +model.global_batch_size: 8",
        "  -model.optim.lr: 5e-07",
        "  +model.optim.lr: 0.001",
        "  -seed: 1234",
        "  +seed: 2",
    ]
    assert "The cursor no longer fits: the order of the steps depends on" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        made.open("model.optim.lr=1e-3")
    assert "cursor" not in str(caught.value)


def test_a_run_without_a_record_is_told_and_watched_from_then_on(made: Made) -> None:
    (made.run / "inputs.json").unlink()
    (note,) = made.open()
    assert "has no inputs.json: an earlier version made it, or the file is lost" in note
    assert made.open() == []
    (made.folder / "more.jsonl").write_text(ROWS)
    assert "more.jsonl" in made.refusal()
