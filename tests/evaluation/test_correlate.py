"""`selfpref correlate` on a small model and a changed copy, against transformers."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import CHATML_TEMPLATE, CHATML_TOKENS, MakePolicy, train_byte_level
from torch import Tensor

from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.cli import main
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.evaluation import correlate
from nemo_selfpref.megatron.policy import Policy

Correlate = Callable[..., str]
LENGTH = 250

ROWS = [
    {
        "id": f"r{n}",
        "prompt": f"Say ba be bi {n}",
        "chosen": "do fa ge " * (1 + n % 3),
        "rejected": f"hi ka {n}",
        # Differences 1 2 4 1 2 4 1: ties, as ratings have.
        "metadata": {"score_chosen": 5.0, "score_rejected": 5.0 - 2 ** (n % 3)},
    }
    for n in range(7)
]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def changed(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama_folder after what a short training might have done to it."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("changed") / "llama"
    shutil.copytree(llama_folder, folder)
    model = LlamaForCausalLM.from_pretrained(str(llama_folder))
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


@pytest.fixture
def run(
    llama_folder: Path, changed: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> Correlate:
    """run(option=value, ..., status=0): the command's output, errors last."""

    def run(*more: object, status: int = 0, **options: object) -> str:
        options = {
            "model": changed,
            "reference": llama_folder,
            "data": pairs,
            "max_length": LENGTH,
            **options,
        }
        given = [[f"--{name.replace('_', '-')}", value] for name, value in options.items()]
        flat = [str(item) for pair in given for item in pair] + [str(item) for item in more]
        found = main(["correlate", *flat])
        shown = capsys.readouterr()
        assert found == status, shown
        return shown.out + shown.err

    return run


def transformers_marginals(
    changed: Path, reference: Path, tokenizer: ChatTokenizer, prefix: str = ""
) -> list[float]:
    """h of each row, one sequence at a time, from the models that transformers loads."""
    from transformers import LlamaForCausalLM

    policy, base = (LlamaForCausalLM.from_pretrained(str(f)) for f in (changed, reference))

    @torch.no_grad()
    def total(model: LlamaForCausalLM, row: dict, answer: str) -> Tensor:
        plain = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.encode_prompt([{"role": "user", "content": prefix + row["prompt"]}])
        response = tokenizer.encode_response(plain, row[answer])
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        logps = logits.double().log_softmax(-1)
        return logps[range(len(response)), list(response)].sum()

    def ratio(row: dict, answer: str) -> Tensor:
        return total(policy, row, answer) - total(base, row, answer)

    return [float(ratio(row, "chosen") - ratio(row, "rejected")) for row in ROWS]


def test_a_checkpoint_against_its_start(
    run: Correlate,
    changed: Path,
    llama_folder: Path,
    tokenizer: ChatTokenizer,
    make_policy: MakePolicy,
    tmp_path: Path,
) -> None:
    save_weights(tmp_path / "checkpoint", make_policy(changed), tokenizer)
    out = tmp_path / "results" / "sr.json"
    shown = run("--augment-prompt", "sr_augment", model=tmp_path / "checkpoint", out=out)
    assert "7 kept, none dropped" in shown and f"written     {out}" in shown
    facts = json.loads(out.read_text())
    points = facts["points"]
    assert points["id"] == [f"r{n}" for n in range(7)]
    assert points["score_difference"] == [1, 2, 4, 1, 2, 4, 1]

    prefix = (prompts_dir() / "sr_augment.txt").read_text().strip().removesuffix("{{query}}")
    for query, words in {"original": "", "augmented": prefix}.items():
        expected = transformers_marginals(changed, llama_folder, tokenizer, words)
        assert points[query] == pytest.approx(expected, abs=2e-3)
        found = facts["results"][query]
        pearson = statistics.correlation(expected, points["score_difference"])
        assert found["pearson"] == pytest.approx(pearson, abs=2e-3)
        assert found["mean_marginal"] == pytest.approx(statistics.mean(expected), abs=2e-3)
        assert found["accuracy"] == sum(h > 0 for h in expected) / 7 and found["pairs"] == 7
        line = next(line for line in shown.splitlines() if query in line)
        for name in ("pearson", "spearman", "kendall", "mean_marginal", "accuracy"):
            assert f"{found[name]:,.4g}" in line
    assert facts["augment_prompt"]["name"] == "sr_augment" and facts["dropped"] == {}


def test_only_one_model_is_in_memory(run: Correlate, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    load = correlate.single_process_policy

    def counted(folder: Path) -> object:
        alive.append(sum(isinstance(thing, Policy) for thing in gc.get_objects()))
        return load(folder)

    monkeypatch.setattr(correlate, "single_process_policy", counted)
    gc.collect()
    assert "augmented" not in run()
    assert len(alive) == 2 and alive[0] == alive[1]


def test_rows_that_cannot_be_compared_are_counted(run: Correlate, tmp_path: Path) -> None:
    """r0 to r3 stay; r4 has no scores, r5 is too long, and r6 only with the longer prompt."""
    rows = [dict(row) for row in ROWS]
    del rows[4]["metadata"]
    rows[5]["chosen"] = "ba " * 300
    rows[6]["chosen"] = "ba " * 80
    data = write_rows(tmp_path / "some.jsonl", rows)
    shown = run(status=2, data=data)
    assert "some.jsonl:6: prompt and answer are too long" in shown
    assert "at most --max-length=250" in shown and "set --drop too_long" in shown
    assert "6 kept" not in shown
    shown = run("--drop", "too_long", "tied_pair", data=data)
    assert "5 kept, dropped no_scores: 1, too_long: 1" in shown
    out = tmp_path / "facts.json"
    given = ["--drop", "too_long", "--augment-prompt", "sr_augment"]
    run(*given, data=data, out=out)
    facts = json.loads(out.read_text())
    assert facts["dropped"] == {"augmented_too_long": 1, "no_scores": 1, "too_long": 1}
    assert {query: r["pairs"] for query, r in facts["results"].items()} == {
        "original": 4,
        "augmented": 4,
    }


def test_limit_and_fields_not_read(run: Correlate, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "more.jsonl", [{**row, "source_index": 1} for row in ROWS])
    assert "set --ignore-fields source_index" in run(status=2, data=data)
    assert "4 kept" in run("--ignore-fields", "source_index", data=data, limit=4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{k: v for k, v in row.items() if k != "metadata"} for row in ROWS],
            "no scores in the data; got 7 pairs without; expected two numbers, score_chosen",
        ),
        (ROWS[:2], "too few pairs for a correlation; got 2; expected at least 3"),
        (ROWS[::3], "the score differences do not vary; got 1 for all 3 pairs"),
    ],
    ids=["no scores", "two pairs", "one difference"],
)
def test_data_refused_before_work(
    run: Correlate, tmp_path: Path, rows: list[dict], message: str
) -> None:
    shown = run(status=2, data=write_rows(tmp_path / "bad.jsonl", rows))
    assert message in shown and "score with" not in shown


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("data", "absent.jsonl", "absent.jsonl: no such file or folder"),
        ("model", "absent", "--model=absent: expected a Hugging Face folder"),
        ("reference", "absent", "--reference=absent: expected a Hugging Face folder"),
        ("max_length", 257, "--max-length=257 passes the model's 256 positions"),
        ("max_length", 0, "--max-length=0: expected at least 1"),
        ("max_prompt_length", 250, "--max-prompt-length=250 leaves no room for an answer"),
        ("limit", 0, "--limit=0: expected at least 1"),
        ("drop", "odd", "--drop odd: no such reason; expected bad_row, "),
        ("augment_prompt", "odd", "template 'odd': not a name in"),
        ("augment_prompt", "odd.txt", "odd.txt: no such template file"),
        ("augment_prompt", "judge_summary", "slot {{query}} is missing"),
        ("out", ".", "--out .: this is a folder; expected the name of a file"),
    ],
)
def test_options_refused_before_work(
    run: Correlate, option: str, value: object, message: str
) -> None:
    shown = run(status=2, **{option: value})
    assert message in shown and "kept" not in shown


def test_two_models_are_needed(run: Correlate, changed: Path) -> None:
    shown = run(status=2, reference=changed / ".." / changed.name)
    assert "are both" in shown and "every marginal would be 0" in shown


def test_different_tokenizers(run: Correlate, changed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(changed, other)
    train_byte_level(other, CHATML_TOKENS, "{{ '' }}" + CHATML_TEMPLATE, eos_token="<|endoftext|>")
    shown = run(status=2, model=other)
    assert "have different tokenizers; got the fingerprints" in shown and "kept" not in shown


def test_a_model_that_never_moved(run: Correlate, llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "copy")
    out = tmp_path / "out.json"
    shown = run(status=2, model=tmp_path / "copy", out=out)
    assert "the marginals do not vary; got 0 for all 7 pairs" in shown
    assert not out.exists()
