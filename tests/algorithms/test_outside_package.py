"""A package of one's own with methods, installed and trained. It is the example of CONTRIBUTING.md,
word for word."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

PACKAGE = Path(__file__).parent / "outside_package"
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def blocks(language: str) -> list[str]:
    """The code blocks of CONTRIBUTING.md in a language, those of lists moved to the margin."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [dedent(block) for block in found]


def test_the_example_is_that_of_contributing() -> None:
    sources = [PACKAGE / "my_package" / f"{name}.py" for name in ("long_dpo", "fresh_spin")]
    assert [path.read_text(encoding="utf-8") for path in sources] == blocks("python")
    assert blocks("yaml") == [(PACKAGE / "conf" / "long_dpo.yaml").read_text(encoding="utf-8")]
    (entry,) = blocks("toml")
    assert entry.strip() in (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed in it, without network."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(PACKAGE, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target"]
    subprocess.run([*command, str(folder / "site"), str(source)], check=True, timeout=300)
    return folder / "site"


def selfpref(site: Path, *arguments: str) -> str:
    """The output of a command that finds the installed package."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "nemo_selfpref.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def train(site: Path, method: str, llama_folder: Path, runs: Path, *more: str) -> Path:
    """Two steps of a method on four short and four long answers; the run's folder."""
    rows = [
        {"prompt": f"Say {n}.", "chosen": "gladly " * (1 + 9 * (n % 2)), "rejected": "No."}
        for n in range(8)
    ]
    data = runs / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    selfpref(
        site,
        *("train", "--config-dir", str(PACKAGE / "conf"), "--config-name", method),
        *(f"exp_manager.exp_dir={runs}", f"model.restore_from_path={llama_folder}"),
        *(f"data.train_path=[{data}]", "data.max_length=200", "data.max_prompt_length=100"),
        *("model.micro_batch_size=2", "model.global_batch_size=4", "model.optim.lr=1e-3"),
        *("trainer.max_epochs=2", "trainer.max_steps=2", "rollout.max_new_tokens=8"),
        *("exp_manager.create_tensorboard_logger=false", "export.hf=false"),
        *more,
    )
    return runs / method


def losses(run: Path) -> list[float]:
    (path,) = run.glob("stages/*-policy/metrics.jsonl")
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_an_installed_method_is_listed(site: Path) -> None:
    lines = selfpref(site, "methods").splitlines()
    names = [line.split()[0] for line in lines]
    assert {"long_dpo", "fresh_spin", "dpo"} <= set(names) and names == sorted(names)
    (line,) = [line for line in lines if line.startswith("long_dpo ")]
    assert line.endswith("DPO on pairs whose chosen answer is long [-]")


def test_an_installed_method_trains(site: Path, llama_folder: Path, tmp_path: Path) -> None:
    run = train(site, "long_dpo", llama_folder, tmp_path, "algorithm.min_tokens=15")
    summary = {fact["stage"]: fact for fact in json.loads((run / "summary.json").read_text())}
    assert summary["long pairs"]["kept"] == 4
    assert summary["long pairs"]["dropped"] == {"short_chosen": 4}
    first, second = losses(run)
    assert first == pytest.approx(0.6931472, abs=1e-6) and second < first


@pytest.mark.slow
def test_an_installed_method_makes_its_pairs_online(
    site: Path, llama_folder: Path, tmp_path: Path
) -> None:
    run = train(site, "fresh_spin", llama_folder, tmp_path)
    first, second = losses(run)
    assert first == pytest.approx(0.6931472, abs=1e-6) and second < first
    assert len(list(run.glob("stages/*-policy/pairs/step-*.parquet"))) == 2
