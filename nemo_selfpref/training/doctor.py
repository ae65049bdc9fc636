"""`selfpref doctor`: what of this machine and its packages is there, missing, broken or unsafe.

Only the standard library is imported here: it has to work where nothing else does.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.doctor_checks import CHECKS, Wants, python_version
from nemo_selfpref.training.doctor_devices import devices, vllm
from nemo_selfpref.training.doctor_packages import Finding, Status, packages

_SKEW_S = 1.0
"""Clocks further apart make logs, and times in reports of hung ranks, misleading."""
_WAIT_S = 300.0
"""How long the first rank waits for what the others found."""
_COLOURS = {"ok": "green", "missing": "yellow", "broken": "red", "unsafe": "red"}


def doctor(args: argparse.Namespace) -> int:
    """Look at everything; 1 where something that is required is not ok.

    Under a launcher every node looks, and the first rank shows what all of them found.

    Raises:
        ConfigError: overrides without a configuration.
    """
    if args.overrides and args.config_name is None:
        raise ConfigError(
            f"{args.overrides[0]} is an override of a configuration: name it with --config-name"
        )
    wants, found = _wanted(args)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        found += look(wants)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = _from_all_ranks(found)
    if int(os.environ.get("RANK", "0")) == 0:
        _show_json(found) if args.json else _show(found)
    return 1 if any(finding.bad for finding in found) else 0


def look(wants: Wants) -> list[Finding]:
    """Every finding on this machine."""
    of_packages, of_torch = packages(wants.packages)
    found = [python_version(), *of_packages, *devices(of_torch, wants), vllm(wants)]
    return [*found, *(finding for check in CHECKS for finding in check(wants))]


# -- what a configuration needs ----------------------------------------------------------------


def _wanted(args: argparse.Namespace) -> tuple[Wants, list[Finding]]:
    if args.config_name is None:
        return Wants(), []
    try:
        return wants_of(args.config_name, args.overrides, args.config_dir), []
    except ImportError as error:
        # What is broken of the packages follows in the report.
        note = f"cannot be read here: {error}"
        lost = Finding(
            "configuration",
            args.config_name,
            Status.BROKEN,
            "",
            note,
            "mend the packages below first",
        )
        return Wants(), [lost]


def wants_of(name: str, overrides: Sequence[str], config_dir: Path | None) -> Wants:
    """What a configuration needs of a machine.

    Raises:
        ConfigError: it cannot be read. ImportError: what reads it is missing or broken.
    """
    from omegaconf import OmegaConf

    from nemo_selfpref.algorithms.base import algorithms
    from nemo_selfpref.config.loader import load_config

    schemas = {name: algorithm.config_class for name, algorithm in algorithms().items()}
    cfg = load_config(name, overrides, schemas, config_dir, allow_missing=True)
    trainer, model, v = cfg.trainer, cfg.model, cfg.rollout.vllm
    fp8 = None if model.fp8_recipe is None else model.fp8_recipe.value
    wanted = {
        "transformer-engine": fp8 is not None or model.transformer_engine is True,
        "triton": model.logprob_backend.value == "triton",
        "tensorboard": cfg.exp_manager.create_tensorboard_logger,
    }
    files = {"model.restore_from_path": model.restore_from_path}
    files |= {"model.tokenizer.path": model.tokenizer.path}
    files |= {"model.tokenizer.chat_template": model.tokenizer.chat_template}
    given = [] if OmegaConf.is_missing(cfg.data, "train_path") else list(cfg.data.train_path)
    files |= {f"data.train_path[{n}]": path for n, path in enumerate(given)}
    flex = model.attention_backend.value == "flex"
    return Wants(
        configured=True,
        exp_dir=Path(cfg.exp_manager.exp_dir),
        devices=trainer.devices,
        nodes=trainer.num_nodes,
        gpu=trainer.accelerator.value == "gpu" or flex or wanted["triton"],
        bf16=trainer.precision.value == "bf16",
        fp8=fp8,
        vllm=cfg.rollout.engine.value == "vllm" and not v.urls,
        vllm_python=v.python,
        vllm_port=v.port,
        packages=frozenset(name for name, needed in wanted.items() if needed),
        paths={name: path for name, path in files.items() if path is not None},
    )


# -- several ranks -----------------------------------------------------------------------------


def _from_all_ranks(found: list[Finding]) -> list[Finding]:
    """On the first rank what every node found, with the clocks compared; elsewhere one's own."""
    try:
        from torch.distributed.rendezvous import rendezvous
    except ImportError as error:
        note, remedy = f"this node alone is shown: {error}", "mend torch first"
        return [*found, Finding("launcher", "ranks", Status.BROKEN, "", note, remedy)]
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=_WAIT_S)))
    store.set_timeout(timedelta(seconds=_WAIT_S))
    if rank != 0:
        host = socket.gethostname()
        store.set(f"doctor/found/{rank}", json.dumps([host, [asdict(f) for f in found]]))
        store.get(f"doctor/ask/{rank}")
        store.set(f"doctor/clock/{rank}", str(time.time()))
        return found
    others = list(range(1, size))
    reports = [json.loads(store.get(f"doctor/found/{other}")) for other in others]
    skews = [_skew(store, other) for other in others]
    mine = socket.gethostname()
    return [*found, *_of_others(reports, mine), clock(skews)]


def _skew(store: Any, other: int) -> float:
    """How far a rank's clock is ahead of this one's, in seconds; at most the error of asking is
    taken off."""
    asked = time.time()
    store.set(f"doctor/ask/{other}", "")
    theirs = float(store.get(f"doctor/clock/{other}"))
    answered = time.time()
    apart = theirs - (asked + answered) / 2
    return max(0.0, abs(apart) - (answered - asked) / 2)


def clock(skews: Sequence[float]) -> Finding:
    """The verdict on the other ranks' clocks."""
    worst = max(skews)
    found = f"at most {worst:.3f} s between {len(skews) + 1} ranks"
    if worst <= _SKEW_S:
        return Finding("launcher", "clocks", Status.OK, found, required=False)
    note, remedy = "times in logs and reports of hung ranks mislead", "run an NTP client (chrony)"
    return Finding("launcher", "clocks", Status.BROKEN, found, note, remedy, False)


def _of_others(reports: Sequence[tuple[str, list[dict[str, Any]]]], own: str) -> Iterator[Finding]:
    """What is not ok on other nodes, the host's name before it."""
    for host, findings in reports:
        for kept in findings:
            finding = Finding(**{**kept, "status": Status(kept["status"])})
            if host != own and finding.status is not Status.OK:
                yield Finding(**{**asdict(finding), "what": f"{host}: {finding.what}"})


# -- showing it --------------------------------------------------------------------------------


def _show_json(found: Sequence[Finding]) -> None:
    report = {"ok": not any(f.bad for f in found), "findings": [asdict(f) for f in found]}
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _show(found: Sequence[Finding]) -> None:
    try:
        _show_table(found)
    except ImportError:  # rich itself is what is missing
        for f in found:
            parts = (f.status.value, f.group, f.what, f.found, f.note, f.remedy)
            sys.stdout.write("  ".join(part for part in parts if part) + "\n")
    wrong = [f.what for f in found if f.bad]
    text = f"required, and not in order: {', '.join(wrong)}" if wrong else "all that is required"
    sys.stdout.write(f"{text}\n" if wrong else f"{text} is in order\n")


def _show_table(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Doctor", title_justify="left")
    for column in ("", "what", "", "found", "why, and what to do"):
        table.add_column(column)
    group = ""
    for f in found:
        colour = _COLOURS[f.status.value]
        optional = "" if f.required or f.status is Status.OK else " (optional)"
        verdict = f"[{colour}]{f.status.value}{optional}[/{colour}]"
        why = "\n".join(part for part in (f.note, f.remedy and f"-> {f.remedy}") if part)
        shown = f.group if f.group != group else ""
        table.add_row(shown, escape(f.what), verdict, escape(f.found), escape(why))
        group = f.group
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, highlight=False, emoji=False, width=width).print(table)
