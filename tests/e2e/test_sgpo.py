"""SGPO from prompts to a Hugging Face folder, through a real endpoint, under every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_runs import Selfpref, settings

from nemo_selfpref.demo.run import PROMPTS
from nemo_selfpref.demo.teacher import MODEL, serving

STAGES = [
    "01-draft",
    "02-targets",
    "03-perplexity-improve",
    "04-perplexity-answer",
    "05-improver",
    "06-answer",
    "07-improve",
    "08-policy",
]


def sgpo_settings(folder: Path, name: str, model: Path, data: Path, *more: str) -> list[str]:
    prompts = [f"algorithm.{n}_prompt={PROMPTS / n}.txt" for n in ("target", "improve", "refine")]
    rollout = ["rollout.max_new_tokens=12", "algorithm.drop_truncated_chosen=false"]
    return settings(folder, name, model, data, *prompts, *rollout, *more)


def pairs(run: Path) -> list[tuple[list[int], list[int]]]:
    table = pq.read_table(run / "stages" / "08-policy" / "pairs.parquet").to_pylist()
    return [(row["chosen_ids"], row["rejected_ids"]) for row in table]


def test_whole_loop(
    selfpref: Selfpref, llama_folder: Path, answers_file: Path, tmp_path: Path
) -> None:
    with serving() as url:
        endpoint = [
            f"algorithm.targets.endpoint.base_url={url}",
            f"algorithm.targets.endpoint.model={MODEL}",
        ]
        arguments = sgpo_settings(tmp_path, "sgpo", llama_folder, answers_file, *endpoint)
        shown = selfpref("train", "--config-name", "sgpo", *arguments).stdout
    run = tmp_path / "sgpo"
    assert sorted(p.name for p in (run / "stages").iterdir()) == STAGES
    assert "pairs: " in shown and (run / "hf" / "model.safetensors").is_file()
    provenance = json.loads(
        pq.read_table(run / "stages" / "08-policy" / "pairs.parquet").to_pylist()[0]["provenance"]
    )
    done = json.loads((run / "stages" / "05-improver" / "done.json").read_text())
    assert provenance["chosen"]["weight_version"] == done["weight_version"] == done["steps"]
    # The endpoint is gone: a second start reads every stage back and asks nothing.
    again = selfpref("train", "--config-name", "sgpo", *arguments).stdout
    assert again.count("already done, read back") == 6


def test_targets_from_a_file(
    selfpref: Selfpref, llama_folder: Path, answers_file: Path, tmp_path: Path
) -> None:
    """The run writes its questions, stops, and goes on once they are answered."""
    from nemo_selfpref.demo.teacher import reply

    answers = tmp_path / "targets.jsonl"
    source = ["algorithm.targets.source=file", f"algorithm.targets.path={answers}"]
    arguments = sgpo_settings(
        tmp_path, "run", llama_folder, answers_file, *source, "export.hf=false"
    )
    stopped = selfpref("train", "--config-name", "sgpo", *arguments, status=2)
    assert "no answer to 20 of 20 requests" in stopped.stderr
    requests = tmp_path / "run" / "stages" / "02-targets" / "requests.jsonl"
    asked = [json.loads(line) for line in requests.read_text().splitlines()]
    answers.write_text(
        "".join(json.dumps({"id": q["id"], "answer": reply(q["prompt"])}) + "\n" for q in asked)
    )
    selfpref("train", "--config-name", "sgpo", *arguments)
    assert (tmp_path / "run" / "checkpoint" / "checkpoint.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "model.tensor_model_parallel_size=2",
        "model.pipeline_model_parallel_size=2",
        "model.tensor_model_parallel_size=1",
    ],
)
def test_two_processes_make_the_same_pairs(
    selfpref: Selfpref, llama_folder: Path, answers_file: Path, tmp_path: Path, layout: str
) -> None:
    with serving() as url:
        endpoint = [
            f"algorithm.targets.endpoint.base_url={url}",
            f"algorithm.targets.endpoint.model={MODEL}",
            "algorithm.improver.max_epochs=1",
            "algorithm.improver.optim.lr=1e-4",
        ]
        one = sgpo_settings(tmp_path, "one", llama_folder, answers_file, *endpoint)
        selfpref("train", "--config-name", "sgpo", *one)
        two = sgpo_settings(
            tmp_path, "two", llama_folder, answers_file, *endpoint, "trainer.devices=2", layout
        )
        selfpref("train", "--config-name", "sgpo", *two)
    assert pairs(tmp_path / "one") == pairs(tmp_path / "two")
