from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.config.schema import DataConfig, DropReason
from nemo_selfpref.data.dataset import (
    load_demonstrations,
    load_preferences,
    load_prompt_rows,
    load_prompts,
)
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_selfpref.errors import DataError

GOOD = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}


@pytest.fixture
def tokenizer(chatml: ChatTokenizer) -> ChatTokenizer:
    return chatml


def write(folder: Path, *rows: Any, name: str = "train.jsonl") -> str:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_preferences_are_token_ids_with_provenance(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = write(tmp_path, {**GOOD, "id": "a", "score_chosen": 5, "score_rejected": 2}, GOOD)
    pairs, report = load_preferences(DataConfig(train_path=[path]), tokenizer)
    first, second = pairs
    messages = [{"role": "user", "content": "Hi"}]
    assert first.id == "a"
    assert first.prompt_ids == tokenizer.encode_prompt(messages)
    assert first.chosen_ids == (*tokenizer.encode_text("Yes"), 2)
    assert first.rejected_ids == (*tokenizer.encode_text("No"), 2)
    assert first.strength == 1.0
    assert first.provenance == {
        "source": f"{path}:1",
        "score_chosen": 5.0,
        "score_rejected": 2.0,
    }
    assert second.id == "train.jsonl:2"
    assert second.provenance == {"source": f"{path}:2"}
    assert report.summary() == "2 kept, none dropped"


def test_demonstrations_use_the_chosen_answer(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path, GOOD, {"prompt": "Q", "completion": "A"})
    rows, report = load_demonstrations(DataConfig(train_path=[path]), tokenizer)
    assert [row.response for row in rows] == ["Yes", "A"]
    assert rows[1].messages == ({"role": "user", "content": "Q"},)
    assert rows[1].response_ids == (*tokenizer.encode_text("A"), 2)
    assert rows[1].source == f"{path}:2"
    assert report.kept == 2


def test_prompt_rows_need_no_answer_and_read_none(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    long = {"prompt": "Q", "completion": "word " * 3000}
    path = write(tmp_path, {"prompt": "Q", "id": "x"}, GOOD, long)
    rows, report = load_prompt_rows(DataConfig(train_path=[path]), tokenizer)
    assert [(row.response, row.response_ids) for row in rows] == [("", ())] * 3
    assert rows[0].id == "x" and rows[0].prompt_ids == rows[2].prompt_ids
    assert report.summary() == "3 kept, none dropped"
    with pytest.raises(DataError, match="prompt is too long"):
        load_prompt_rows(
            DataConfig(train_path=[path], max_length=4, max_prompt_length=3), tokenizer
        )


def test_system_prompt_fills_in_only_where_there_is_none(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "system": "Own."})
    config = DataConfig(train_path=[path], system_prompt="Default.")
    rows, _ = load_demonstrations(config, tokenizer)
    assert [row.messages[0]["content"] for row in rows] == ["Default.", "Own."]
    assert all(row.messages[0]["role"] == "system" for row in rows)


FAULTS = [
    (DropReason.bad_row, '{"prompt": ', "the line is not valid JSON; got Expecting value"),
    (DropReason.bad_row, {"prompt": "Hi", "chosen": 1, "rejected": "x"}, "chosen is not an answer"),
    (DropReason.bad_row, {"prompt": "Hi", "completion": "x"}, "the row has no rejected answer"),
    (DropReason.unknown_field, {**GOOD, "x": 1}, "unknown field 'x'; got the fields"),
    (DropReason.empty_prompt, {**GOOD, "prompt": ""}, "the prompt is empty; got a blank user turn"),
    (DropReason.empty_response, {**GOOD, "rejected": " "}, "the rejected response is empty"),
    (DropReason.identical_pair, {**GOOD, "rejected": "Yes"}, "chosen and rejected are the same"),
    (DropReason.tied_pair, {**GOOD, "score_chosen": 1, "score_rejected": 1}, "the same score"),
    (
        DropReason.prompt_too_long,
        {**GOOD, "prompt": "#" * 90},
        "the prompt is too long; got 100 tokens; expected at most data.max_prompt_length=60",
    ),
    (
        DropReason.too_long,
        {**GOOD, "rejected": "#" * 90},
        "prompt and answer are too long; got 12 + 91 tokens; expected at most data.max_length=90",
    ),
]


@pytest.mark.parametrize(("reason", "row", "message"), FAULTS)
def test_faults_stop_the_run_or_are_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, reason: DropReason, row: Any, message: str
) -> None:
    path = write(tmp_path, GOOD, row, {**GOOD, "chosen": "Sure"})
    config = DataConfig(train_path=[path], max_length=90, max_prompt_length=60)
    others = [other for other in DropReason if other is not reason]
    for config.drop in ([], others):
        with pytest.raises(DataError) as error:
            load_preferences(config, tokenizer)
        assert str(error.value).startswith(f"{path}:2: ")
        assert message in str(error.value)
        assert str(error.value).endswith(
            f"to drop and count such rows set data.drop=[{reason.value}]"
        )
    config.drop = [reason]
    pairs, report = load_preferences(config, tokenizer)
    assert [pair.id for pair in pairs] == ["train.jsonl:1", "train.jsonl:3"]
    assert (report.kept, report.dropped) == (2, {reason.value: 1})
    assert report.examples == {reason.value: f"{path}:2"}


def test_limit_counts_kept_rows_and_stops_reading(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path, {**GOOD, "chosen": ""}, GOOD, GOOD, "broken")
    config = DataConfig(train_path=[path], limit=2, drop=[DropReason.empty_response])
    pairs, report = load_preferences(config, tokenizer)
    assert [pair.id for pair in pairs] == ["train.jsonl:2", "train.jsonl:3"]
    assert report.summary() == "2 kept, dropped empty_response: 1"


def test_equal_ids_name_both_places(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    first = write(tmp_path, {**GOOD, "id": 5})
    second = write(tmp_path, GOOD, {**GOOD, "id": "5"}, name="more.jsonl")
    with pytest.raises(DataError) as error:
        load_preferences(DataConfig(train_path=[first, second]), tokenizer)
    assert str(error.value).startswith(
        f"{second}:2: the id '5' is taken; got it already at {first}:1; expected another"
    )


def test_nothing_left_reports_the_drops(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write(tmp_path, {**GOOD, "chosen": ""}, {**GOOD, "chosen": "No"})
    drop = [DropReason.empty_response, DropReason.identical_pair]
    with pytest.raises(DataError) as error:
        load_preferences(DataConfig(train_path=[path], drop=drop), tokenizer)
    assert (
        "no row is left; got 0 kept, dropped empty_response: 1, identical_pair: 1; expected"
        in str(error.value)
    )


def test_template_refusal_names_the_row(chatml_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    config = TokenizerConfig(path=str(chatml_folder), chat_template=str(template))
    path = write(tmp_path, GOOD, {**GOOD, "system": "S"})
    with pytest.raises(DataError) as error:
        load_demonstrations(DataConfig(train_path=[path]), load_tokenizer(config))
    assert str(error.value).startswith(
        f"{path}:2: the chat template refuses the conversation: no system"
    )


def test_prompts_from_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "One", "category": "x"},
        {"id": 7, "prompt": [{"role": "user", "content": "Two\u2028"}], "system": "S"},
        {"messages": [{"role": "user", "content": "Three"}], "chosen": None},
    )
    assert load_prompts(path) == [
        ("train.jsonl:1", ({"role": "user", "content": "One"},)),
        (
            "7",
            ({"role": "system", "content": "S"}, {"role": "user", "content": "Two\u2028"}),
        ),
        ("train.jsonl:3", ({"role": "user", "content": "Three"},)),
    ]


def test_prompts_from_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffOne\r\n\n Two\u2028too\n".encode())
    assert load_prompts(path) == [
        ("prompts.txt:1", ({"role": "user", "content": "One"},)),
        ("prompts.txt:3", ({"role": "user", "content": " Two\u2028too"},)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "the row's prompt is unclear; got ['text']; expected either prompt or"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the turns are out of order"),
        ("[1]", "the row is not an object; got [1]"),
    ],
)
def test_bad_prompts_name_the_row(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path, {"prompt": "fine"}, row)
    with pytest.raises(DataError) as error:
        load_prompts(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_bad_prompt_files(tmp_path: Path) -> None:
    path = write(tmp_path, {"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"})
    with pytest.raises(DataError, match=r":2: the id '1' is taken; got it already at .*:1"):
        load_prompts(path)
    with pytest.raises(DataError, match=r"none.txt: cannot be read: .*expected a UTF-8 text file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="the file has no prompts; expected one prompt per line"):
        load_prompts(tmp_path / "empty.txt")


def test_ultrafeedback_ties_and_identical_pairs_are_counted(
    real_data: Path, chatml: ChatTokenizer
) -> None:
    path = str(real_data / "preference/ultrafeedback_1k/train_clean.jsonl")
    config = DataConfig(
        train_path=[path],
        ignore_fields=["source_index"],
        drop=[DropReason.tied_pair, DropReason.identical_pair, DropReason.empty_response],
        max_length=100_000,
        max_prompt_length=50_000,
    )
    pairs, report = load_preferences(config, chatml)
    # Of 111 ties one is also an identical pair: 1000 - 2 - 4 - (111 - 1) = 884.
    assert report.dropped == {"empty_response": 2, "identical_pair": 4, "tied_pair": 110}
    assert len(pairs) == report.kept == 884
    assert pairs[0].provenance["source"] == f"{path}:1"
    config.ignore_fields = []
    with pytest.raises(DataError, match=r"unknown field 'source_index'.*ignore_fields=\[source_in"):
        load_preferences(config, chatml)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("sft/alpaca_en_demo.json", 999),
        ("preference/instruction-data-with-preference.json", 1100),
        ("sft/dolly15k/local_training_1.json", 1493),
    ],
)
def test_real_demonstrations(real_data: Path, llama3: ChatTokenizer, name: str, rows: int) -> None:
    config = DataConfig(
        train_path=[str(real_data / name)],
        drop=list(DropReason),
        max_length=100_000,
        max_prompt_length=50_000,
    )
    config.drop.remove(DropReason.bad_row)
    loaded, report = load_demonstrations(config, llama3)
    assert len(loaded) + sum(report.dropped.values()) == rows
    assert len(loaded) > 0.9 * rows


def test_arena_hard_prompts(real_data: Path) -> None:
    prompts = load_prompts(real_data / "eval/arena_hard/v2.0_question.jsonl")
    assert len(prompts) == 750
    assert prompts[0][0] == "v2.0_question.jsonl:1"
    assert sum("\u2028" in messages[0]["content"] for _, messages in prompts) == 1
