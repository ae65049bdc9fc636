"""What a run shows and leaves behind holds no key, no token, and nothing of its folder's
repository: not on a terminal, in a file, or to other users of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from echo_server import echoing
from payloads import ENVIRONMENT, KEY, TOKEN
from tiny import save_llama

from nemo_selfpref.demo.run import PROMPTS
from nemo_selfpref.demo.task import make_instructions, oracle

ROOT = Path(__file__).resolve().parents[2]
VLLM_PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
OF_REPOSITORY = "repository-canary-112233"
CANARIES = [*ENVIRONMENT.values(), TOKEN, OF_REPOSITORY]


@dataclass
class Seen:
    """What a run showed and left behind."""

    folder: Path
    statuses: list[int]
    output: str
    lines: set[bytes]
    """Command lines of its processes, as everybody on the machine can read them."""
    sent: set[str]


def command_lines(session: int) -> set[bytes]:
    """Of every process of a session."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session or _child_of(process, session):
                found.add((process / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def _child_of(process: Path, ancestor: int) -> bool:
    """Engines have a session of their own."""
    pid = int(process.name)
    while pid > 1:
        if pid == ancestor:
            return True
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


def watched(command: list[str], where: Path, environment: Mapping[str, str]) -> Seen:
    """Run a command to its end under a strict umask and look at its processes meanwhile."""
    log, lines = where / "output.txt", set[bytes]()
    with open(log, "wb") as output:
        child = subprocess.Popen(
            command,
            cwd=where,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
        )
        while True:
            lines |= command_lines(child.pid)
            try:
                status = child.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                continue
    return Seen(where, [status], log.read_text(errors="replace"), lines, set())


def repository(folder: Path) -> None:
    """A git repository with a secret that is not committed, and a program for git to run."""
    git = shutil.which("git")
    if git is None:
        return
    (folder / "mine.txt").write_text("nothing\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "mine.txt"], [*who, "commit", "-qm", "m"]):
        subprocess.run([git, *arguments], cwd=folder, check=True)
    (folder / "mine.txt").write_text(f"password: {OF_REPOSITORY}\n")
    ran = folder / "ran"
    subprocess.run([git, "config", "diff.external", f"touch {ran};:"], cwd=folder, check=True)


def arguments(folder: Path, model: Path, url: str, *more: str) -> list[str]:
    rows = folder / "rows.jsonl"
    prompts = make_instructions(6, seed=3)
    rows.write_text(
        "".join(json.dumps({"prompt": p, "completion": oracle(p)}) + "\n" for p in prompts)
    )
    return [
        *(sys.executable, *([] if __debug__ else ["-O"]), "-m", "nemo_selfpref.cli", "train"),
        *("--config-name", "sgpo"),
        *("name=run", f"exp_manager.exp_dir={folder}", f"model.restore_from_path={model}"),
        *(f"data.train_path=[{rows}]", "data.max_length=250", "data.max_prompt_length=200"),
        *("model.micro_batch_size=2", "model.global_batch_size=4", "trainer.max_steps=1"),
        *(f"algorithm.{n}_prompt={PROMPTS / n}.txt" for n in ("target", "improve", "refine")),
        *("rollout.max_new_tokens=8", "algorithm.drop_truncated_chosen=false"),
        *(f"algorithm.targets.endpoint.base_url={url}", "algorithm.targets.endpoint.model=m"),
        "algorithm.targets.endpoint.api_key_env=TEACHER_API_KEY",
        *more,
    ]


def run(folder: Path, model: Path, *more: str, refused_first: bool = False) -> Seen:
    """Run to the end; before that once with a teacher that refuses and repeats the key."""
    repository(folder)
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with echoing() as echo:
        command, every = arguments(folder, model, echo.url, *more), list[Seen]()
        for echo.refusing in (True, False) if refused_first else (False,):
            every.append(watched(command, folder, environment))
        return Seen(
            folder / "run",
            [status for seen in every for status in seen.statuses],
            "".join(seen.output for seen in every),
            {line for seen in every for line in seen.lines},
            echo.keys,
        )


def check(seen: Seen, *, endings: list[int]) -> None:
    assert seen.statuses == endings, seen.output[-3000:]
    assert seen.sent == {f"Bearer {KEY}"}, "the key was not used"
    assert any(b"nemo_selfpref.cli" in line for line in seen.lines)
    files = [path for path in seen.folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "summary.json", "metrics.jsonl", "cmd-args.log"} <= names
    shown = {"the output": seen.output.encode(), "a command line": b"\n".join(seen.lines)}
    shown |= {str(path): path.read_bytes() for path in files}
    found = [(where, c) for where, text in shown.items() for c in CANARIES if c.encode() in text]
    assert found == []
    assert not (seen.folder.parent / "ran").exists(), "git ran a repository's program"


def check_modes(folder: Path) -> None:
    """Nobody else gets in; the files of an export are open, their folder is not."""
    for path in folder.rglob("*"):
        if not path.is_symlink() and path.parent.name != "hf":
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Seen:
    return run(tmp_path_factory.mktemp("secrets"), llama_folder, refused_first=True)


def test_a_run_shows_no_secret(seen: Seen) -> None:
    check(seen, endings=[2, 0])
    assert "HTTP 401" in seen.output and "Bearer [API key]" in seen.output


def test_a_run_is_as_private_as_the_umask_says(seen: Seen) -> None:
    check_modes(seen.folder)
    assert seen.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="needs .venv-rollout: make rollout-env")
def test_a_run_with_engines_shows_no_secret(tmp_path: Path) -> None:
    model = save_llama(
        tmp_path / "model", hidden_size=128, head_dim=32, max_position_embeddings=1024
    )
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    more = (
        *("rollout=vllm", f"rollout.vllm.python={VLLM_PYTHON}", "rollout.vllm.kv_cache_gb=0.1"),
        *(f"rollout.vllm.token_file={token}", "export.hf=false"),
    )
    seen = run(tmp_path, model, *more)
    check(seen, endings=[0])
    check_modes(seen.folder)
    engines = [line for line in seen.lines if b"engine_process" in line]
    assert engines and all(b"policy-0" in line or b"frozen-0" in line for line in engines)
    assert list((seen.folder / "rollout").glob("*.log"))
