"""Child processes: their start, their end, and what they leave behind (nothing)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_selfpref.errors import RolloutCancelled, RolloutError, RolloutTimeout
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.launcher import (
    ChildProcess,
    engine_command,
    engine_environment,
)

READY = """
import json, os, sys
def ready(port=4711):
    with open(sys.argv[1] + ".new", "w") as handle:
        json.dump({"port": port, "pid": os.getpid()}, handle)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
"""
WAITS = READY + "ready()\nsys.stdin.read()\n"
DEAF = READY + "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
DEAF += "ready()\nwhile True: time.sleep(0.1)\n"
TERMS = READY + "import time\nready()\nwhile True: time.sleep(0.1)\n"


def start(folder: Path, code: str) -> ChildProcess:
    ready = folder / "ready.json"
    command = [sys.executable, "-c", code, str(ready)]
    return ChildProcess(command, ready_file=ready, log=folder / "log", env=engine_environment())


def gone(pid: int) -> bool:
    """No such process, or one that has ended and waits for its parent."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def eventually(reached: Callable[[], bool], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.02)


def test_it_answers_on_the_port_that_the_child_says(tmp_path: Path) -> None:
    (tmp_path / "ready.json").write_text('{"port": 1, "pid": 1}')  # Of an earlier child.
    with start(tmp_path, WAITS) as child:
        assert child.wait_ready(Until.within(20)) == 4711
        assert child.alive and child.exit_status is None
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
    assert child.exit_status == 0 and gone(child.pid)
    assert not (tmp_path / "ready.json").exists()


def test_a_child_that_ends_first_shows_the_end_of_its_log(tmp_path: Path) -> None:
    code = "import sys; print('x' * 9000); sys.exit('no such model')"
    with start(tmp_path, code) as child:
        with pytest.raises(RolloutError, match=r"ended with status 1 .*(?s:.*)no such model") as e:
            child.wait_ready(Until.within(20))
        assert len(str(e.value)) < 4000 and str(tmp_path / "log") in str(e.value)
        assert not child.alive


def test_a_child_that_is_late_is_named_with_its_log(tmp_path: Path) -> None:
    with start(tmp_path, "import sys; sys.stdin.read()") as child:
        with pytest.raises(RolloutTimeout, match=rf"within 0\.[2-9] s; see {tmp_path}/log"):
            child.wait_ready(Until.within(0.2))
        with pytest.raises(RolloutCancelled):
            child.wait_ready(Until(cancelled=lambda: True))
        assert child.alive


def test_a_damaged_ready_file_is_refused(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w').write('{}'); sys.stdin.read()"
    with start(tmp_path, code) as child, pytest.raises(RolloutError, match="is damaged"):
        child.wait_ready(Until.within(20))


@pytest.mark.parametrize(("code", "status"), [(WAITS, 0), (TERMS, -15), (DEAF, -9)])
def test_stop_goes_as_far_as_it_must(tmp_path: Path, code: str, status: int) -> None:
    child = start(tmp_path, code)
    child.wait_ready(Until.within(20))
    child.stop(grace_s=10.0 if code is WAITS else 0.2)
    assert child.exit_status == status and not child.alive and gone(child.pid)
    child.stop()  # Again is nothing.


def test_a_killed_child_is_seen_and_its_own_children_end_with_stop(tmp_path: Path) -> None:
    more = "import subprocess\nother = subprocess.Popen([sys.executable, '-c', "
    more += "'import time; time.sleep(600)'])\nready(other.pid)\nsys.stdin.read()\n"
    child = start(tmp_path, READY + more)
    other = child.wait_ready(Until.within(20))
    os.kill(child.pid, 9)
    eventually(lambda: not child.alive)
    assert child.exit_status == -9 and not gone(other)
    child.stop(grace_s=0.2)
    eventually(lambda: gone(other))
    assert child.exit_status == -9


def test_a_stopped_child_can_be_ended(tmp_path: Path) -> None:
    child = start(tmp_path, WAITS)
    child.wait_ready(Until.within(20))
    os.kill(child.pid, 19)
    child.stop(grace_s=0.2)
    assert child.exit_status == -9


def test_a_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    parent = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_launcher import WAITS, start
from nemo_selfpref.rollout.engine import Until
child = start(Path({str(tmp_path)!r}), WAITS)
child.wait_ready(Until.within(20))
print(child.pid, flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdin is not None
    pid = int(process.stdout.readline())
    assert not gone(pid)
    process.kill()
    process.wait()
    eventually(lambda: gone(pid))
    process.stdin.close()
    process.stdout.close()


def test_a_missing_interpreter_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match=r"rollout\.vllm\.python"):
        ChildProcess(
            engine_command(str(tmp_path / "python"), tmp_path / "spec.json"),
            ready_file=tmp_path / "ready.json",
            log=tmp_path / "log",
            env=engine_environment(),
        )


def test_the_command_runs_the_engine_module(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    module = "nemo_selfpref.rollout.serving.engine_process"
    assert engine_command("/v/bin/python", spec) == ["/v/bin/python", "-m", module, str(spec)]


def test_the_environment_leaves_out_the_trainers_process_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("OF_THE_USER", "kept")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    made = engine_environment("3")
    assert made["OF_THE_USER"] == "kept" and made["CUDA_VISIBLE_DEVICES"] == "3"
    assert not [n for n in made if "RANK" in n or "MASTER" in n or "TORCHELASTIC" in n]
    assert not {"PYTHONPATH", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"} & {*made}
    assert engine_environment()["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert engine_environment("")["CUDA_VISIBLE_DEVICES"] == ""
