"""What `selfpref doctor` finds on machines with something missing, broken or unsafe."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training import doctor as doctor_module
from nemo_selfpref.training import doctor_checks, doctor_devices, doctor_packages
from nemo_selfpref.training.doctor import clock, wants_of
from nemo_selfpref.training.doctor_checks import Wants
from nemo_selfpref.training.doctor_packages import Finding, Status, import_all, judged
from nemo_selfpref.training.launch import _free_port

ROOT = Path(__file__).parents[2]
H100 = {
    "cuda_build": "12.8",
    "available": True,
    "devices": [["H100", [9, 0], 80 << 30]] * 2,
    "bf16": True,
    "nccl": "2.27.5",
}


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemo_selfpref.cli", "doctor", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def named(findings: Iterator[Finding] | list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


# -- the command -------------------------------------------------------------------------------


def test_this_machine_is_in_order_but_for_what_fp8_and_vllm_need(tmp_path: Path) -> None:
    """One command without a configuration would say no less: everything is looked at."""
    done = command(
        *("--json", "--config-name", "dpo", "rollout=vllm", f"exp_manager.exp_dir={tmp_path}"),
        *("trainer.precision=bf16", "model.fp8_recipe=tensorwise", "data.train_path=[/absent]"),
        f"rollout.vllm.python={tmp_path}/python",
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    lines = {(line["group"], line["what"]): line for line in report["findings"]}
    assert not report["ok"]
    assert lines["packages", "torch"]["status"] == "ok"
    assert lines["packages", "megatron-core"]["status"] == "ok"
    bad = {what for (_, what), f in lines.items() if f["required"] and f["status"] != "ok"}
    assert bad - {"transformer-engine"} == {"CUDA", "interpreter", "data.train_path[0]"}
    engine = lines["packages", "transformer-engine"]
    assert engine["required"] and "no FP8" in (engine["note"] or "no FP8")
    assert not lines["packages", "apex"]["required"]
    assert list(tmp_path.iterdir()) == []


def broken_package(folder: Path, name: str, text: str) -> str:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)
    return str(folder)


@pytest.mark.slow
def test_broken_packages_are_told_apart_and_do_not_end_the_report(tmp_path: Path) -> None:
    """rich cannot be imported, so the table is plain; tenacity kills the importing process."""
    path = broken_package(tmp_path, "rich", "raise ImportError('no libtable.so')")
    broken_package(tmp_path, "tenacity", "import os; os.abort()")
    done = command(PYTHONPATH=path)
    assert done.returncode == 1, done.stderr
    text = done.stdout
    assert "broken  packages  rich  " in text and "ImportError: no libtable.so" in text
    lines = {line.split()[2]: line for line in text.splitlines()}
    assert "the import ended python with status -6" in lines["tenacity"]
    assert lines["scipy"].startswith("ok ") and lines["jinja2"].startswith("ok ")
    last = text.splitlines()[-1]
    # What imports rich in its turn is of no use either.
    assert last.startswith("required, and not in order: ")
    assert {"rich", "tenacity"} <= set(last.split(": ")[1].split(", "))


def test_overrides_need_a_configuration() -> None:
    done = command("trainer.devices=2")
    assert done.returncode == 2
    assert "trainer.devices=2 is an override of a configuration" in done.stderr


@pytest.mark.slow
def test_ranks_tell_the_first_one_what_they_found() -> None:
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "nemo_selfpref.cli", "doctor", "--json"],
            env={**os.environ, **ranks, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0] and second == ""
    clocks = next(f for f in json.loads(first)["findings"] if f["what"] == "clocks")
    assert clocks["status"] == "ok" and "between 2 ranks" in clocks["found"]


# -- packages ----------------------------------------------------------------------------------


def test_imports_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = broken_package(tmp_path, "bad_link", "raise OSError('libx.so.1: cannot open')")
    broken_package(tmp_path, "bad_death", "import os; print('x'); os._exit(3)")
    broken_package(tmp_path, "bad_need", "import absent_need")
    monkeypatch.setenv("PYTHONPATH", path)
    names = ["bad_link", "absent_one.part", "bad_death", "json", "bad_need"]
    errors, devices = import_all(names)
    assert errors == {
        "bad_link": "OSError: libx.so.1: cannot open",
        "absent_one.part": "missing",
        "bad_death": "the import ended python with status 3",
        "json": None,
        "bad_need": "ModuleNotFoundError: No module named 'absent_need'",
    }
    assert devices == {}


def test_an_import_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = broken_package(tmp_path, "bad_wait", "import threading; threading.Event().wait()")
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(doctor_packages, "_IMPORT_S", 2.0)
    errors, _ = import_all(["bad_wait"])
    assert errors["bad_wait"] is not None and errors["bad_wait"].endswith("did not end within 2 s")


@pytest.mark.parametrize(
    ("name", "found", "allowed", "status", "note"),
    [
        ("jinja2", "3.1.6", ">=3.1.6", Status.OK, ""),
        ("jinja2", "3.1.5", "", Status.UNSAFE, "CVE-2025-27516"),
        ("vllm", "0.14.0", "", Status.UNSAFE, "CVE-2026-22778"),
        ("megatron-core", "0.16.1", "==0.16.1", Status.OK, "never called here"),
        ("torch", "2.7.1+cu126", ">=2.8", Status.BROKEN, "setup.py allows >=2.8"),
        ("torch", "2.13.0+cpu", ">=2.8", Status.OK, ""),
    ],
)
def test_versions(name: str, found: str, allowed: str, status: Status, note: str) -> None:
    finding = judged(name, found, allowed)
    assert finding.status is status and note in finding.note
    assert finding.bad == (status is not Status.OK) == bool(finding.remedy)


def test_pins_are_those_of_setup_py() -> None:
    pins = doctor_packages.pins()
    assert pins["torch"] == ">=2.8" and "megatron-core" in pins
    assert "pytest" not in pins  # an extra


def test_versions_beside_those_tested(tmp_path: Path) -> None:
    have = doctor_packages.version_of("torch")
    (tmp_path / "cpu.txt").write_text(f"# x==1\ntorch=={have}\nrich==0.0.1\nabsent==1\n")
    (found,) = doctor_packages.tested_versions(tmp_path / "cpu.txt", ["torch", "rich"])
    assert found.found == "1 of 2 as tested" and found.note.endswith("(tested 0.0.1)")
    assert list(doctor_packages.tested_versions(tmp_path / "none.txt", ["torch"])) == []


# -- devices -----------------------------------------------------------------------------------


def test_devices() -> None:
    two = Wants(devices=2, gpu=True, bf16=True, fp8="blockwise")
    assert not any(f.bad for f in doctor_devices.devices(H100, two))
    four = list(doctor_devices.devices(H100, replace(two, devices=4)))
    assert named(four, "CUDA").bad and "trainer.devices=4" in named(four, "CUDA").note
    ada = {**H100, "devices": [["L40", [8, 9], 48 << 30]], "bf16": False}
    found = list(doctor_devices.devices(ada, replace(two, devices=1)))
    assert {f.what for f in found if f.bad} == {"bf16", "FP8"}
    found = list(doctor_devices.devices(ada, Wants(fp8="tensorwise")))
    assert named(found, "FP8").status is Status.OK


def test_no_device_matters_where_one_is_asked_for() -> None:
    none = {"cuda_build": None, "devices": [], "available": False}
    assert not named(doctor_devices.devices(none, Wants()), "CUDA").bad
    assert named(doctor_devices.devices(none, Wants(gpu=True)), "CUDA").bad
    assert named(doctor_devices.devices({"error": "no driver"}, Wants(gpu=True)), "torch").bad


# -- vLLM --------------------------------------------------------------------------------------


def test_vllm_is_asked_in_its_own_interpreter(tmp_path: Path) -> None:
    here = Wants(vllm_python=sys.executable)
    found = doctor_devices.vllm(here)
    assert found.status is Status.MISSING and "has no vLLM" in found.note and not found.bad
    assert doctor_devices.vllm(replace(here, vllm=True)).bad
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 4\n")
    script.chmod(0o700)
    found = doctor_devices.vllm(Wants(vllm=True, vllm_python=str(script)))
    assert found.status is Status.BROKEN and found.bad and "no such library" in found.note


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".venv-rollout/bin/python").exists(), reason="needs .venv-rollout")
def test_the_real_vllm_is_imported_where_it_is_needed() -> None:
    found = doctor_devices.vllm(Wants(vllm=True, vllm_python=f"{ROOT}/.venv-rollout/bin/python"))
    assert found.status is Status.OK and found.found and found.group == "vLLM"


# -- disks, limits, network, launcher ----------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wants = Wants(exp_dir=tmp_path / "not" / "yet")
    assert not any(f.bad for f in doctor_checks.disks(wants))
    assert list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(doctor_checks, "write_bytes", full)
    found = named(doctor_checks.disks(wants), "write, fsync, rename")
    assert found.bad and "Read-only file system" in found.note


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "_DISK_GIB", 1e9)
    monkeypatch.setattr(doctor_checks, "_SHARED_GIB", 1e9)
    found = list(doctor_checks.disks(Wants(exp_dir=tmp_path)))
    assert [f.what for f in found if f.bad] == ["exp_dir"]
    found = list(doctor_checks.disks(Wants(exp_dir=tmp_path, vllm=True)))
    assert [f.what for f in found if f.bad] == ["exp_dir", "/dev/shm"]


def test_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, soft), hard))
    try:
        found = named(doctor_checks.limits(Wants()), "open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.status is Status.BROKEN and not found.bad and "ulimit" in found.remedy


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def status(value: str | None, devices: int = 1) -> Status:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if value is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", value)
        return named(doctor_checks.limits(Wants(devices=devices)), "OMP_NUM_THREADS").status

    cores = os.cpu_count() or 1
    monkeypatch.delenv("RANK", raising=False)
    assert status(None) is status("1") is status(str(cores)) is Status.OK
    assert status(str(cores + 1)) is status(str(cores), cores + 1) is status("x") is Status.BROKEN
    monkeypatch.setenv("RANK", "0")
    assert status(None) is Status.BROKEN


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wants = Wants(vllm=True, vllm_port=taken.getsockname()[1])
        found = named(doctor_checks.network(wants), "listening")
    assert found.bad and str(wants.vllm_port) in found.found
    assert not named(doctor_checks.network(Wants(vllm=True)), "listening").bad


def test_a_host_that_others_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert not named(doctor_checks.network(Wants()), "hostname").bad
    found = named(doctor_checks.network(Wants(nodes=2)), "hostname")
    assert found.bad and "loopback" in found.note
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    found = named(doctor_checks.network(Wants(nodes=2)), "hostname")
    assert found.bad and found.status is Status.BROKEN


def test_an_allocation_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    wants = Wants(configured=True, nodes=2, devices=8, gpu=True)

    def bad(wants: Wants) -> list[str]:
        return [f.what for f in doctor_checks.launcher(wants) if f.bad]

    assert bad(wants) == bad(Wants()) == []
    assert bad(replace(wants, nodes=4)) == ["SLURM_JOB_NUM_NODES"]
    assert bad(replace(wants, nodes=1, devices=16)) == ["SLURM_GPUS_ON_NODE"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert bad(wants) == ["WORLD_SIZE"]


def test_clocks() -> None:
    assert clock([0.01, 0.3]).status is Status.OK
    assert clock([0.01, 3.0]).status is Status.BROKEN


# -- what a configuration needs ----------------------------------------------------------------


def test_needs_follow_the_configuration() -> None:
    plain = wants_of("dpo", [], None)
    assert not (plain.vllm or plain.gpu or plain.bf16 or plain.fp8 or plain.several)
    assert plain.configured and plain.packages == {"tensorboard"} and plain.paths == {}
    given = ["trainer.devices=4", "trainer.num_nodes=2", "trainer.accelerator=gpu"]
    given += ["trainer.precision=bf16", "model.fp8_recipe=blockwise", "data.train_path=[a,b]"]
    given += ["rollout=vllm", "rollout.vllm.port=8123", "model.logprob_backend=triton"]
    given += ["exp_manager.create_tensorboard_logger=false", "exp_manager.exp_dir=/x"]
    wants = wants_of("dpo", given, None)
    assert wants.packages == {"transformer-engine", "triton"}
    assert (wants.devices, wants.nodes, wants.gpu, wants.bf16) == (4, 2, True, True)
    assert (wants.fp8, wants.vllm, wants.vllm_port) == ("blockwise", True, 8123)
    assert wants.paths == {"data.train_path[0]": "a", "data.train_path[1]": "b"}
    assert wants.exp_dir == Path("/x")
    remote = wants_of("dpo", ["rollout=vllm", "rollout.vllm.urls=[http://a:1]"], None)
    assert not remote.vllm


def test_a_wrong_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        wants_of("dpo", ["trainer.device=2"], None)


def test_other_hosts_are_named() -> None:
    bad = Finding("disks", "exp_dir", Status.BROKEN, "full")
    good = Finding("disks", "exp_dir", Status.OK)
    report = [{**vars(f)} for f in (bad, good)]
    (found,) = doctor_module._of_others([("node2", report), ("here", report)], "here")
    assert found.what == "node2: exp_dir" and found.bad
