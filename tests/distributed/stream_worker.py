"""Runs under torchrun (or alone): publishes weights under one layout after another, for
test_weight_stream_layouts.py to compare with a single process, and has things go wrong.

    stream_worker.py MODEL OUT LAYOUT [LAYOUT ...]     layouts as for worker.py, and "lora=1"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lora_worker import LORA, MovedAdapters
from worker import config, weights_kept

from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.schema import Accelerator
from nemo_selfpref.errors import CheckpointError, SelfPrefError, WeightSyncError
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.serving.wire import UpdateReport, WeightsCall
from nemo_selfpref.training.publish import WeightPublisher, write_model_folder
from nemo_selfpref.training.session import Start, build_policy, find_start
from nemo_selfpref.types import WeightSet

SETS = (WeightSet.POLICY, WeightSet.EMA, WeightSet.FROZEN)


def make_policy(layout: str, model: str) -> tuple[Policy, Start]:
    parts = layout.split(",")
    adapted = "lora=1" in parts
    cfg = config(",".join(part for part in parts if part != "lora=1"))
    cfg.model.restore_from_path, cfg.export.hf = model, False
    if adapted:
        cfg.model.lora = LORA
    start = find_start(cfg)
    policy = build_policy(cfg, start)[0]
    if adapted:
        fill_policy(policy, MovedAdapters(start))
    return policy, start


def accept(call: WeightsCall) -> UpdateReport:
    return UpdateReport(stamp=call.manifest.stamp, wait_s=0, verify_s=0, load_s=0, probe_s=0)


def refuse(call: WeightsCall) -> UpdateReport:
    raise WeightSyncError(f"refused at the server: {call.manifest.version}")


def message(act: object, kind: type[SelfPrefError] = WeightSyncError) -> str:
    """What a collective act that must fail says on this rank."""
    assert callable(act)
    try:
        act()
    except kind as error:
        return str(error)
    return "no error"


def exercise(policy: Policy, start: Start, out: Path) -> None:
    weights = WeightSets(policy)
    for name in (WeightSet.FROZEN, WeightSet.EMA):
        weights.take(name, WeightSet.POLICY)
    with torch.no_grad():
        # By a rule that no layout rounds differently.
        for parameter in policy.module.parameters():
            parameter.mul_(0.5 if parameter.requires_grad else 1)
    policy.weight_version = 3
    weights.average(0.25)
    publisher = WeightPublisher(policy, weights, folder=out / "weights", run="r", timeout_s=60)
    found: dict = {"stamps": {}, "errors": {}}
    for name in SETS:
        stamp = publisher.publish(name, accept)
        found["stamps"][name.value] = stamp.model_dump()
        assert publisher.stamp(name) == stamp and not publisher.needed(name)
    write_model_folder(policy, start.tokenizer, out / "model")
    found["errors"] = errors(policy, weights, publisher, out)
    # All is well again after every error: no rank was left behind.
    found["last"] = publisher.publish(WeightSet.POLICY, accept).model_dump()
    found["names"] = sorted(path.name for path in (out / "weights").iterdir())
    (out / f"found-{policy.layout.rank}.json").write_text(json.dumps(found))


def errors(
    policy: Policy, weights: WeightSets, publisher: WeightPublisher, out: Path
) -> dict[str, str]:
    """What every rank is told when rank 0 alone sees what is wrong."""
    found = {"refused": message(lambda: publisher.publish(WeightSet.POLICY, refuse))}
    (out / "file").write_text("")
    beside = WeightPublisher(policy, weights, folder=out / "file", run="r")
    found["unwritable"] = message(lambda: beside.publish(WeightSet.POLICY, accept))
    found["model"] = message(
        lambda: write_model_folder(policy, None, out / "file" / "model"),  # type: ignore[arg-type]
        CheckpointError,
    )
    with weights_kept(policy) as parameters, torch.no_grad():
        parameters[-1].view(-1)[0] = float("inf")
        found["not finite"] = message(lambda: publisher.publish(WeightSet.POLICY, accept))
    return found


def main() -> None:
    model, out, *layouts = sys.argv[1:]
    parallel.join(select_platform(Accelerator.auto))
    for text in layouts:
        folder = Path(out) / text
        folder.mkdir(parents=True, exist_ok=True)
        exercise(*make_policy(text, model), folder)
        parallel.leave_layout()
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
