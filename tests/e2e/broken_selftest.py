"""Runs under torchrun: the self-test's checks with one weight of the last rank moved a little.

broken_selftest.py FOLDER [key=value ...]
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training import selftest_model
from nemo_selfpref.training.selftest import read_config, run_checks

build = selftest_model.build


def moved(*given: selftest_model.RunConfig) -> Policy:
    policy = build(*given)
    if dist.get_world_size() > 1 and dist.get_rank() == dist.get_world_size() - 1:
        weight = dict(policy.module.named_parameters())["decoder.layers.0.mlp.linear_fc2.weight"]
        with torch.no_grad():
            weight[0] += 0.05
    return policy


def main() -> None:
    folder, *overrides = sys.argv[1:]
    selftest_model.build = moved
    overrides = [f"exp_manager.exp_dir={folder}", *overrides]
    cfg = selftest_model.tiny_config(read_config("dpo", overrides, None))
    results = run_checks(cfg)
    if dist.get_rank() == 0:
        print("failed:", [result.check for result in results if result.verdict == "failed"])
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
