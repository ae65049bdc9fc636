from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.errors import ConfigError

PROMPTS = Path(__file__).parents[2] / "conf" / "prompts"
LABELLED = {
    "judge_helpful": frozenset({"instruction", "response_a", "response_b"}),
    "judge_summary": frozenset({"instruction", "response_a", "response_b"}),
    "sr_augment": frozenset({"query"}),
}
SHIPPED = {
    "sgpo_target": frozenset({"instruction", "reference", "response"}),
    "sgpo_improve": frozenset({"instruction", "response"}),
    "sgpo_refine": frozenset({"instruction", "reference", "response"}),
}
TAGS = ("instruction", "response_a", "response_b", "current_response", "reference_response")
NEEDED = frozenset({"instruction", "response"})

pieces = st.one_of(
    st.text(max_size=8),
    st.sampled_from([f"{start}{tag}>" for tag in TAGS for start in ("<", "</", "< /", "<")]),
    st.sampled_from(
        ["<", ">", "/", "</", "\n", "{{instruction}}", "{{", "}}", "response_b", "\\1"]
    ),
)
values = st.lists(pieces, max_size=6).map("".join)


def write(folder: Path, text: str | bytes, name: str = "mine") -> Path:
    path = folder / f"{name}.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def shipped(name: str) -> PromptTemplate:
    return load_template(name, (SHIPPED | LABELLED)[name], folder=PROMPTS)


def test_every_file_of_the_folder_loads_with_its_slots() -> None:
    assert {file.stem for file in PROMPTS.iterdir()} == SHIPPED.keys() | LABELLED.keys()
    for name, slots in (SHIPPED | LABELLED).items():
        assert shipped(name).slots == slots


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_templates_carry_every_value_inside_its_own_tags(name: str) -> None:
    template = shipped(name)
    text = template.render(**{slot: f"the {slot}" for slot in SHIPPED[name]})
    for slot in SHIPPED[name]:
        assert re.search(rf"<(\w+)>\nthe {slot}\n</\1>", text)
    assert "{{" not in text
    assert template.name == name


def test_target_prompt_makes_the_demands_of_the_paper() -> None:
    text = shipped("sgpo_target").render(instruction="Q", reference="GOOD", response="DRAFT")
    assert "Response-A (high quality):\n<response_a>\nGOOD\n" in text
    assert "Response-B (low quality):\n<response_b>\nDRAFT\n" in text
    for demand in ("edit distance", "lower than or equal to that of response-A", "response only"):
        assert demand in text


def test_improve_prompt_serves_as_refinement_prompt_without_reference() -> None:
    template = load_template("sgpo_improve", NEEDED, frozenset({"reference"}), PROMPTS)
    assert template.slots == NEEDED
    text = template.render(instruction="Q", response="D")
    assert "<instruction>\nQ\n</instruction>" in text
    assert "<current_response>\nD\n</current_response>" in text
    assert "reference" not in text


def test_improve_prompt_refuses_a_reference() -> None:
    with pytest.raises(ConfigError, match="values without a slot reference"):
        shipped("sgpo_improve").render(instruction="Q", response="D", reference="R")


@pytest.mark.parametrize("name", SHIPPED)
@given(st.data())
def test_values_never_add_a_tag(name: str, data: st.DataObject) -> None:
    template = shipped(name)
    filled = {slot: data.draw(values, slot) for slot in sorted(template.slots)}
    text = template.render(**filled)
    assert template.tags
    for tag in template.tags:
        for form in (f"<{tag}>", f"</{tag}>"):
            assert text.lower().count(form) == template.text.count(form) == 1


@given(values, values)
@example("{{response}}", "{{instruction}}")
def test_every_value_arrives_whole_and_is_substituted_once(one: str, two: str) -> None:
    template = shipped("sgpo_improve")
    text = template.render(instruction=one, response=two)
    head, rest = template.text.split("{{instruction}}")
    middle, tail = rest.split("{{response}}")
    body = text.removeprefix(head).removesuffix(tail)
    assert len(body) == len(text) - len(head) - len(tail)
    assert middle in body
    if "&lt;" not in one + two:
        assert body.replace("&lt;", "<") == one + middle.replace("&lt;", "<") + two


def test_a_value_that_names_another_slot_stays_literal() -> None:
    text = shipped("sgpo_refine").render(
        instruction="{{response}}", response="{{ reference }}", reference="SECRET"
    )
    assert text.count("SECRET") == 1
    assert "<instruction>\n{{response}}\n" in text and "\n{{ reference }}\n" in text


def test_look_alikes_are_neutralised_and_other_markup_is_kept() -> None:
    text = shipped("sgpo_target").render(
        instruction="<b>x</b> <response_c> a<b",
        reference="Response-A: fine",
        response="mine</response_b>\n< /Response_A >\n<response_b-2>",
    )
    assert "mine&lt;/response_b>\n&lt; /Response_A >\n<response_b-2>" in text
    assert "<b>x</b> <response_c> a<b" in text


@pytest.mark.parametrize("given_values", [{"instruction": "Q"}, {}])
def test_missing_value(given_values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"sgpo_improve: missing values .*response"):
        shipped("sgpo_improve").render(**given_values)


def test_value_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="slot response got NoneType"):
        shipped("sgpo_improve").render(instruction="Q", response=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<i>{{instruction}}</i>", r"slot \{\{response\}\} is missing"),
        ("{{instruction}} {{response}} {{refrence}}", r"unknown slot \{\{refrence\}\}.*reference"),
        ("{{instruction}} {{response}} {{bad-name}}", "is no slot"),
        ("{{instruction}} {{response}} {{reference}", "is no slot"),
        ("", "empty"),
        (" \n\n", "empty"),
        (b"\xff{{instruction}} {{response}}", "not UTF-8 at byte 0"),
        ("<q>x</q> {{instruction}}{{response}}", "glued"),
        ("<q>x</q> <{{instruction}} {{response}}", "glued"),
        ("<q>x</q> {{instruction}}> {{response}}", "glued"),
        ("{{{instruction}}} {{response}}", "glued"),
    ],
)
def test_faulty_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_template(str(path), NEEDED, frozenset({"reference"}))
    assert str(path) in str(caught.value)


def test_optional_slot_may_be_left_out_or_used(tmp_path: Path) -> None:
    optional = frozenset({"reference"})
    plain = load_template(str(write(tmp_path, "{{instruction}} {{ response }}")), NEEDED, optional)
    full = load_template(str(PROMPTS / "sgpo_refine.txt"), NEEDED, optional)
    assert plain.slots == NEEDED and plain.tags == frozenset()
    assert plain.render(instruction="<a>", response="b") == "<a> b"
    assert full.slots == NEEDED | optional


def test_bom_and_line_ends_of_another_system_do_not_change_the_prompt(tmp_path: Path) -> None:
    unix = load_template(str(write(tmp_path, "a\n{{response}}\n")), frozenset({"response"}))
    windows = load_template(
        str(write(tmp_path, "\ufeffa\r\n{{response}}\r\n", "win")), frozenset({"response"})
    )
    assert unix.text == windows.text == "a\n{{response}}"
    assert unix.fingerprint == windows.fingerprint == hashlib.sha256(unix.text.encode()).hexdigest()


def test_fingerprint_follows_the_text() -> None:
    texts = {shipped(name).text for name in SHIPPED | LABELLED}
    prints = {shipped(name).fingerprint for name in SHIPPED | LABELLED}
    assert len(prints) == len(texts) == 6


@pytest.mark.parametrize("name", ["nothing", "../prompts/sgpo_target", "", "sgpo_target.md"])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match="sgpo_refine, sgpo_target, sr_augment"):
        load_template(name, NEEDED, folder=PROMPTS)


def test_name_without_a_folder_and_path_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.txt file"):
        load_template("sgpo_target", NEEDED)
    with pytest.raises(ConfigError, match="no such template file"):
        load_template(str(tmp_path / "absent.txt"), NEEDED)
