"""What reaches the ranks is what was written, whatever it looks like: no shell reads it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from nemo_selfpref.cli import main
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.job_script import JobScript, job_script

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("slurm/*node*.sh"))
HOSTILE = [
    "data.system_prompt=$(touch PWNED)",
    "data.system_prompt=`touch PWNED`",
    "data.system_prompt=a;touch PWNED",
    "data.system_prompt=two\nlines\n#SBATCH --wrap=touch",
    "data.system_prompt='single' \"double\" \\",
    "data.system_prompt=$HOME ${HOME} ~ * ? [a-z] {a,b} !!",
    "data.system_prompt=' || touch PWNED || '",
    "--kill-on-bad-exit=1",
]
# Stands for the interpreter: writes what it was given, and names a run's folder to job_facts.
PYTHON = """\
#!{python}
import json, os, pathlib, sys
record = {{"argv": sys.argv[1:], "environment": dict(os.environ)}}
if "nemo_selfpref.training.job_facts" in sys.argv:
    print({run!r})
    print("policy")
    sys.exit(0)
path = pathlib.Path({out!r}) / (os.environ["RANK"] + ".json")
path.write_text(json.dumps(record))
sys.exit(int(os.environ.get("STATUS_" + os.environ["RANK"], "0")))
"""
SRUN = """\
#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
alone = "--ntasks=1" in sys.argv
statuses = [0]
for rank in range(1 if alone else 2):
    names = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}}
    statuses.append(subprocess.run(words, env={{**os.environ, **names}}).returncode)
sys.exit(max(statuses))
"""
SCONTROL = """\
#!/bin/sh
case "$1 $2" in
  "show hostnames") printf 'n1\\nn2\\n' ;;
  "show node") echo "   NodeAddr=10.0.0.7 NodeHostName=$3 Version=22" ;;
  requeue*) echo "$2" >>"{requeued}" ;;
esac
"""


class Stand:
    """The scripts where srun and scontrol only pass on what they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.run = folder, folder / "out", folder / "my 100% run"
        self.requeued = folder / "requeued"
        self.out.mkdir()
        names = {"python": sys.executable, "out": str(self.out), "run": str(self.run)}
        names["requeued"] = str(self.requeued)
        for name, text in (
            ("bin/srun", SRUN),
            ("bin/scontrol", SCONTROL),
            ("venv/bin/python", PYTHON),
        ):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(**names))
            path.chmod(0o755)

    def start(self, command: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
        given = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "VENV": str(self.folder / "venv"),
            "SELFPREF_HOME": str(ROOT),
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            **more,
        }
        return subprocess.run(
            command, cwd=self.folder, env=given, capture_output=True, text=True, check=False
        )

    def rank(self, number: int) -> Mapping:
        return json.loads((self.out / f"{number}.json").read_text())


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_hostile_overrides_reach_every_rank_as_they_are(stand: Stand, script: Path) -> None:
    done = stand.start(["bash", str(script), *HOSTILE])
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        argv = stand.rank(rank)["argv"]
        assert argv[-len(HOSTILE) :] == HOSTILE
        assert argv[:3] == ["-m", "nemo_selfpref.cli", "train"]
    assert not list(stand.folder.rglob("PWNED"))
    assert not (Path.cwd() / "PWNED").exists()


def test_ranks_know_their_places(stand: Stand) -> None:
    assert stand.start(["bash", str(SCRIPTS[0])]).returncode == 0
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = [[stand.rank(rank)["environment"][name] for name in names] for rank in (0, 1)]
    # 20000 + (4711 * 7 + 0) % 6000 = 20000 + 32977 % 6000 = 22977
    assert found[0] == ["0", "0", "2", "1", "10.0.0.7", "22977"]
    assert found[1] == ["1", "0", "2", "1", "10.0.0.7", "22977"]
    assert "trainer.num_nodes=2" in stand.rank(1)["argv"]


@pytest.mark.parametrize(
    ("statuses", "restarts", "expected", "again"),
    [
        (("0", "0"), "0", 0, False),
        (("75", "75"), "0", 75, True),
        (("76", "137"), "0", 76, True),
        (("137", "1"), "0", 137, True),
        (("2", "137"), "0", 2, False),  # the first that failed decides
        (("1", "75"), "0", 1, False),
        (("75", "75"), "2", 75, True),
        (("75", "75"), "3", 75, False),  # MAX_REQUEUES
    ],
)
def test_only_what_may_go_on_is_queued_again(
    stand: Stand, statuses: tuple[str, str], restarts: str, expected: int, again: bool
) -> None:
    named = {f"STATUS_{rank}": status for rank, status in enumerate(statuses)}
    knobs = {"SLURM_RESTART_COUNT": restarts, "MAX_REQUEUES": "3"}
    done = stand.start(["bash", str(SCRIPTS[0])], **named, **knobs)
    assert done.returncode == expected
    assert stand.requeued.exists() == again
    if again:
        assert stand.requeued.read_text() == "4711\n"


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=Path(sys.prefix, "bin"))
    if program is None:
        pytest.skip("no shellcheck here")
    scripts = sorted(map(str, ROOT.glob("slurm/*.sh")))
    done = subprocess.run([program, "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# -- selfpref submit ------------------------------------------------------------------------------


def asked(folder: Path, *more: str) -> list[str]:
    (folder / "rows.jsonl").write_text("{}\n")
    return [
        *("submit", "--config-name", "sft", "--nodes", "2", "--gpus-per-node", "4"),
        *(f"data.train_path=[{folder}/rows.jsonl]", f"exp_manager.exp_dir={folder}/runs"),
        *("name=mine", "model.restore_from_path=somewhere", *more),
    ]


def test_a_written_script_passes_hostile_overrides_as_they_are(stand: Stand) -> None:
    script = job_script(
        JobScript(
            name="hostile",
            config_name="sft",
            overrides=HOSTILE,
            nodes=2,
            gpus_per_node=1,
            cpus_per_task=None,
            options={},
            engines=None,
            log=stand.folder / "%j.log",
            working_dir=stand.folder,
            environment={"CONTAINER_MOUNTS": "a'b $(touch PWNED)"},
        )
    )
    path = stand.folder / "job.sh"
    path.write_text(script)
    done = stand.start(["bash", str(path)])
    assert done.returncode == 0, done.stderr
    assert stand.rank(1)["argv"][-len(HOSTILE) :] == HOSTILE
    assert stand.rank(1)["environment"]["CONTAINER_MOUNTS"] == "a'b $(touch PWNED)"
    assert not list(stand.folder.rglob("PWNED"))
    # SLURM reads #SBATCH lines up to the first command, and the overrides stand after it.
    head = script[: script.index("set -euo")]
    assert all(line.startswith("#") for line in head.splitlines())


def test_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = asked(tmp_path, "--partition", "gpu", "--time", "1-00:00:00", "--dry-run")
    assert main(arguments) == 0
    script = capsys.readouterr().out
    wanted = ["nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu"]
    for line in [*wanted, "time=1-00:00:00", "signal=USR1@300", "requeue"]:
        assert f"#SBATCH --{line}\n" in script
    assert f"cd {shlex.quote(str(Path.cwd()))}\n" in script
    assert not (tmp_path / "runs").exists()


def test_engine_nodes_make_a_heterogeneous_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = asked(tmp_path, "--engine-nodes", "1", "--engine-gpus", "8", "--dry-run")
    assert main([a if a != "sft" else "osp" for a in arguments]) == 0
    first, second = capsys.readouterr().out.split("#SBATCH hetjob\n")
    assert "#SBATCH --nodes=2\n" in first and "#SBATCH --ntasks-per-node=4\n" in first
    assert "#SBATCH --nodes=1\n" in second and "#SBATCH --gpus-per-node=8\n" in second
    assert "#SBATCH --ntasks-per-node=1\n" in second


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["trainer.num_nodes=3"], "trainer.num_nodes=3, but the job has 2"),
        (["trainer.devices=8"], "trainer.devices=8, but the job has 4"),
        (["--partition", "gpu\n#SBATCH --wrap=x"], "--partition"),
        (["--account", "a b"], "--account"),
        (["--nodes", "0"], "--nodes 0: expected 1 or more"),
        (["model.nonsense=1"], "unknown setting 'model.nonsense'"),
        (["data.train_path=[gone.jsonl]"], "gone.jsonl does not exist"),
        (["exp_manager.resume_if_exists=false"], "could not go on"),
        (["--engine-nodes", "1"], "does nothing with sft"),
        (["data.system_prompt=$(touch PWNED)"], "mismatched input"),
        (["name=a b"], "name='a b'"),
    ],
)
def test_what_could_not_run_is_refused_before_it_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    assert main(asked(tmp_path, *more)) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_log_that_slurm_would_read_apart_is_refused(tmp_path: Path) -> None:
    job = JobScript("n", "sft", [], 1, 1, None, {}, None, tmp_path / 'a"b.log', tmp_path, {})
    with pytest.raises(ConfigError, match="log path"):
        job_script(job)
