from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.config.schema import DropReason, RowFormat
from nemo_selfpref.data.formats import ParsedRow, RowFault, parse_prompt, parse_row
from nemo_selfpref.data.readers import BadRow, RawRow


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "Hi"), turn("assistant", "Yes"), turn("assistant", "No")
LONG = [turn("user", "A"), turn("assistant", "B"), turn("user", "C")]


def parse(value: Any, fmt: RowFormat = RowFormat.auto, **options: Any) -> ParsedRow:
    return parse_row(RawRow(value, "/data/set/train.jsonl:7"), fmt, **options)


def fault(value: Any, fmt: RowFormat = RowFormat.auto, **options: Any) -> RowFault:
    with pytest.raises(RowFault) as error:
        parse(value, fmt, **options)
    return error.value


PAIRS = [
    (RowFormat.trl, {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}),
    (RowFormat.trl, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    (RowFormat.trl, {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    (RowFormat.trl, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    (
        RowFormat.nemo_rl,
        {
            "context": [USER],
            "completions": [
                {"rank": 1, "completion": [BAD]},
                {"rank": 0, "completion": [GOOD]},
            ],
        },
    ),
    (
        RowFormat.nemo_rl,
        {
            "context": "Hi",
            "completions": [
                {"rank": 2, "completion": "Hm"},
                {"rank": 3, "completion": "No"},
                {"rank": 1, "completion": "Yes"},
            ],
        },
    ),
    (RowFormat.aligner, {"prompt": "Hi", "chosen_response": "Yes", "rejected_response": "No"}),
    (RowFormat.spin, {"real": [USER, GOOD], "generated": [USER, BAD]}),
    (RowFormat.alpaca, {"instruction": "Hi", "chosen": "Yes", "rejected": "No"}),
    (
        RowFormat.alpaca,
        {"instruction": "Hi", "input": "", "output": "Hm", "chosen": "Yes", "rejected": "No"},
    ),
]


@pytest.mark.parametrize(("fmt", "row"), PAIRS)
def test_pairs_of_every_format_read_the_same(fmt: RowFormat, row: dict[str, Any]) -> None:
    expected = ParsedRow(
        id="train.jsonl:7",
        messages=(USER,),
        chosen="Yes",
        rejected="No",
        score_chosen=None,
        score_rejected=None,
        source="/data/set/train.jsonl:7",
    )
    assert parse(row, fmt) == expected
    assert parse(row, RowFormat.auto) == expected


DEMONSTRATIONS = [
    ({"messages": [USER, GOOD]}, "Hi", "Yes"),
    ({"prompt": "Hi", "completion": "Yes"}, "Hi", "Yes"),
    ({"prompt": [USER], "completion": [GOOD]}, "Hi", "Yes"),
    ({"context": "Hi", "completions": [{"rank": 0, "completion": "Yes"}]}, "Hi", "Yes"),
    ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2", "3"),
    ({"instruction": "Add", "input": " ", "output": "3"}, "Add", "3"),
    ({"instruction": "Add", "output": "3"}, "Add", "3"),
    (
        {"instruction": "Who?", "context": "Text", "response": "Me", "category": "qa"},
        "Who?\n\nText",
        "Me",
    ),
    ({"instruction": "Who?", "context": "", "response": "Me"}, "Who?", "Me"),
]


@pytest.mark.parametrize(("row", "prompt", "answer"), DEMONSTRATIONS)
def test_demonstrations_have_no_rejected_answer(
    row: dict[str, Any], prompt: str, answer: str
) -> None:
    parsed = parse(row)
    assert parsed.messages == (turn("user", prompt),)
    assert (parsed.chosen, parsed.rejected) == (answer, None)


def test_longer_conversations_keep_their_turns() -> None:
    parsed = parse({"chosen": [*LONG, GOOD], "rejected": [*LONG, BAD]})
    assert parsed.messages == tuple(LONG)
    assert (parsed.chosen, parsed.rejected) == ("Yes", "No")


def test_columns_make_question_and_answer_a_demonstration() -> None:
    columns = {"question": "prompt", "answer": "completion"}
    parsed = parse({"question": "1+1?", "answer": "2"}, columns=columns)
    assert (parsed.messages[0]["content"], parsed.chosen) == ("1+1?", "2")


def test_passthrough_fields() -> None:
    row = {**PAIRS[0][1], "id": 12, "system": "Be brief.", "score_chosen": 3, "score_rejected": 1.5}
    parsed = parse(row)
    assert parsed.id == "12"
    assert parsed.messages == (turn("system", "Be brief."), USER)
    assert (parsed.score_chosen, parsed.score_rejected) == (3.0, 1.5)


def test_scores_from_metadata_and_rewards() -> None:
    metadata = {"score_chosen": 8.5, "score_rejected": 2, "model": "x"}
    parsed = parse({**PAIRS[0][1], "metadata": metadata})
    assert (parsed.score_chosen, parsed.score_rejected) == (8.5, 2.0)
    aligner = {"prompt": "Hi", "chosen_response": "Yes", "rejected_response": "No"}
    parsed = parse({**aligner, "chosen_reward": 1.0, "rejected_reward": -2})
    assert (parsed.score_chosen, parsed.score_rejected) == (1.0, -2.0)


def test_null_is_absent_and_blank_system_is_left_out() -> None:
    parsed = parse({**PAIRS[0][1], "system": " ", "id": None, "messages": None})
    assert parsed.messages == (USER,)
    assert parsed.id == "train.jsonl:7"
    assert parse({"messages": [turn("system", ""), USER, GOOD]}).messages == (USER,)


def test_ignored_fields_make_way_for_renamed_ones() -> None:
    row = {"prompt": "raw", "text": "Hi", "chosen": "Yes", "rejected": "No", "extra": 1}
    parsed = parse(row, columns={"text": "prompt"}, ignore_fields=["prompt", "extra"])
    assert parsed.messages == (USER,)


PAIR = PAIRS[0][1]
BAD_ROWS = [
    (["a"], "the row is not an object; got ['a']; expected an object with named fields"),
    (BadRow("the line is broken"), "the line is broken"),
    ({"x": 1}, "no format fits the row; got the fields ['x']; expected those of one of [spin: "),
    ({**PAIR, "chosen": 3}, "chosen is not an answer; got 3; expected a string or a list"),
    ({**PAIR, "prompt": 3}, "prompt is not a conversation; got 3; expected a string or a list"),
    ({**PAIR, "prompt": [turn("bot", "x")]}, "prompt[0] has an unknown role; got 'bot'; expected"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "prompt[0] cannot be used; got ['role']; expected"),
    ({**PAIR, "prompt": [{**USER, "name": "Bo"}]}, "expected the fields role and content"),
    ({**PAIR, "prompt": [turn("user", None)]}, "prompt[0] cannot be used; got ['role']"),
    ({**PAIR, "prompt": [{"role": "user", "content": 4}]}, "content of prompt[0] is not text"),
    ({**PAIR, "prompt": ["Hi"]}, "prompt[0] is not a message; got 'Hi'"),
    ({**PAIR, "prompt": "\ud800"}, "prompt holds half of a surrogate pair"),
    ({**PAIR, "prompt": [USER, GOOD]}, "the prompt does not end with the user"),
    ({**PAIR, "prompt": [USER, USER]}, "the turns are out of order; got ['user', 'user']"),
    ({**PAIR, "prompt": [GOOD, USER]}, "the turns are out of order"),
    ({**PAIR, "prompt": [USER, turn("system", "S"), USER]}, "the turns are out of order"),
    ({**PAIR, "chosen": [USER]}, "chosen does not end with an answer; got ['user']"),
    ({**PAIR, "chosen": [*LONG, GOOD]}, "chosen has other turns before its answer than the"),
    ({"chosen": [USER, GOOD], "rejected": [*LONG, BAD]}, "differ before their last message"),
    ({**PAIR, "messages": [USER, GOOD]}, "the row has messages and also prompt"),
    ({**PAIR, "completion": "x"}, "the row has completion and also chosen"),
    ({**PAIR, "id": True}, "the id cannot be used; got True; expected a non-empty string"),
    ({**PAIR, "score_chosen": "9"}, "score_chosen is not a score; got '9'; expected a finite"),
    ({**PAIR, "metadata": [1]}, "metadata is not an object; got [1]"),
    (
        {**PAIR, "prompt": [turn("system", "S"), USER], "system": "T"},
        "the row has two system messages",
    ),
    ({"context": "Hi", "completions": []}, "completions cannot be used; got []"),
    ({"context": "Hi", "completions": ["x"]}, "completions[0] cannot be used; got 'x'"),
    (
        {"context": "Hi", "completions": [{"rank": "1", "completion": "x"}]},
        "the rank of completions[0] is not an integer; got '1'; expected an integer",
    ),
    ({"instruction": "Hi", "input": 5, "output": "x"}, "input is not text; got 5"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_rows_say_what_got_and_expected(row: Any, message: str) -> None:
    found = fault(row)
    assert found.reason is DropReason.bad_row
    assert message in found.message


@pytest.mark.parametrize(
    ("row", "reason", "message"),
    [
        ({**PAIR, "prompt": " \n"}, DropReason.empty_prompt, "got a blank user turn"),
        ({**PAIR, "prompt": []}, DropReason.empty_prompt, "got no turn"),
        ({**PAIR, "chosen": " "}, DropReason.empty_response, "the chosen response is empty"),
        ({**PAIR, "rejected": ""}, DropReason.empty_response, "the rejected response is empty"),
        ({**PAIR, "rejected": "Yes"}, DropReason.identical_pair, "are the same text; got 'Yes'"),
        (
            {**PAIR, "metadata": {"score_chosen": 4, "score_rejected": 4.0}},
            DropReason.tied_pair,
            "the two answers have the same score; got 4 for both",
        ),
        (
            {"context": "Hi", "completions": [{"rank": 1, "completion": c} for c in "ab"]},
            DropReason.tied_pair,
            "all completions have the same rank; got 1",
        ),
        (
            {**PAIR, "source_index": 3, "zeta": 1},
            DropReason.unknown_field,
            "unknown field 'source_index'; got the fields ",
        ),
        ({**PAIR, "extra": None}, DropReason.unknown_field, "set data.ignore_fields=[extra]"),
    ],
)
def test_faults_have_their_reason(row: Any, reason: DropReason, message: str) -> None:
    found = fault(row)
    assert found.reason is reason
    assert message in found.message


def test_unknown_fields_are_all_named_in_the_fix() -> None:
    found = fault({**PAIR, "source_index": 3, "zeta": 1})
    assert found.message.endswith("set data.ignore_fields=[source_index,zeta]")


def test_two_fields_renamed_to_one() -> None:
    found = fault({**PAIR, "question": "x"}, columns={"question": "prompt"})
    assert found.reason is DropReason.bad_row
    assert found.message.startswith(
        "two fields become 'prompt'; got 'prompt' and 'question'; expected one"
    )


def test_given_format_is_held_to() -> None:
    assert "the field 'real' is missing" in fault({}, RowFormat.spin).message
    found = fault(PAIR, RowFormat.dolly)
    assert found.reason is DropReason.unknown_field
    assert "expected for format dolly only" in found.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    ["prompt", "chosen", "rejected", "messages", "completion", "role", "content",
                     "context", "completions", "rank", "real", "generated", "instruction", "output",
                     "input", "response", "metadata", "id", "system", "score_chosen", "other"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from(RowFormat),
)  # fmt: skip
def test_any_row_parses_or_has_a_fault(row: Any, fmt: RowFormat) -> None:
    try:
        parsed = parse(row, fmt)
    except RowFault as found:
        assert found.message
    else:
        assert parsed.messages[-1]["role"] == "user"
        assert parsed.chosen.strip()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "id": "a"},
        {"messages": [{"role": "user", "content": "Why?"}], "id": "a"},
        {"prompt": [{"role": "user", "content": "Why?"}], "id": "a", "system": None},
    ],
)
def test_a_row_of_a_prompt_alone(row: dict) -> None:
    parsed = parse_prompt(RawRow(row, "rows.jsonl:1"))
    assert (parsed.id, parsed.chosen, parsed.rejected) == ("a", "", None)
    assert parsed.messages == ({"role": "user", "content": "Why?"},)


def test_a_row_with_an_answer_serves_as_a_prompt_too() -> None:
    parsed = parse_prompt(RawRow({"prompt": "Why?", "completion": "So."}, "rows.jsonl:1"))
    assert parsed.messages == ({"role": "user", "content": "Why?"},) and parsed.chosen == "So."
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    assert parse_prompt(RawRow({"messages": turns}, "rows.jsonl:1")).chosen == "So."


def test_a_prompt_row_keeps_the_rules_of_every_row() -> None:
    with pytest.raises(RowFault, match="no format fits"):
        parse_prompt(RawRow({"prompt": "Why?", "colour": "red"}, "rows.jsonl:1"))
    with pytest.raises(RowFault) as empty:
        parse_prompt(RawRow({"prompt": "  "}, "rows.jsonl:1"))
    assert empty.value.reason is DropReason.empty_prompt
