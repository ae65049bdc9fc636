"""import, export, generate, methods, help and the errors people meet."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from small_runs import Selfpref


def test_import_export_generate(selfpref: Selfpref, llama_folder: Path, tmp_path: Path) -> None:
    selfpref("import", "--hf", llama_folder, "--out", tmp_path / "ckpt")
    shown = selfpref("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "hf").stdout
    assert "best token equal for all" in shown
    before = load_file(llama_folder / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Name a colour.\nWho are you?\n")
    common = ["--prompts", prompts, "--max-new-tokens", "5"]
    selfpref("generate", "--model", tmp_path / "ckpt", *common, "--out", tmp_path / "a.jsonl")
    shown = selfpref("generate", "--model", tmp_path / "hf", *common).stdout
    assert shown == (tmp_path / "a.jsonl").read_text()
    rows = [json.loads(line) for line in shown.splitlines()]
    assert len(rows) == 2 and rows[0]["finish_reason"] == "length"


def test_refusals(selfpref: Selfpref, llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    there = selfpref("import", "--hf", llama_folder, "--out", tmp_path / "full", status=2)
    assert "exists already" in there.stderr
    none = selfpref("export", "--checkpoint", tmp_path, "--out", tmp_path / "x", status=2)
    assert "no checkpoint.json" in none.stderr
    odd = selfpref("import", "--hf", tmp_path / "full", "--out", tmp_path / "x", status=2)
    assert "expected a Hugging Face folder" in odd.stderr


def test_help_and_methods(selfpref: Selfpref) -> None:
    shown = selfpref("--help").stdout
    for command in ("train", "generate", "import", "export", "methods", "demo"):
        assert command in shown
    lines = selfpref("methods").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "cdpo",
        "dpo",
        "ipo",
        "orpo",
        "osp",
        "raft",
        "rso",
        "self_augmented_po",
        "self_rewarding",
        "sft",
        "sgpo",
        "spin",
        "sr_dpo",
        "sr_ipo",
    ]
