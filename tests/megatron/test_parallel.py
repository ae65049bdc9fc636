from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import MakePolicy

from nemo_selfpref.config.schema import Accelerator, RunConfig, TrainerConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.parallel import Layout, all_gather_json
from nemo_selfpref.megatron.platform import select_platform


def initialize(devices: int = 1) -> Layout:
    cfg = RunConfig(name="test", trainer=TrainerConfig(devices=devices))
    return parallel.initialize(cfg, select_platform(Accelerator.auto))


def test_layout_places() -> None:
    layout = Layout(5, 8, 1, 2, 0, 2, 1, 2)
    assert layout.describe() == "TP=2 PP=2 DP=2"
    assert layout.is_first_stage and not layout.is_last_stage and not layout.is_main
    alone = Layout(0, 1, 0, 1, 0, 1, 0, 1)
    assert alone.is_first_stage and alone.is_last_stage and alone.is_main


def test_one_process_is_a_world_of_its_own() -> None:
    assert initialize() == initialize() == Layout(0, 1, 0, 1, 0, 1, 0, 1)
    assert parallel.world_group().size() == 1
    parallel.barrier()


def test_a_world_of_another_size_is_refused() -> None:
    initialize()
    with pytest.raises(ConfigError, match=r"devices=4 x .*num_nodes=1 asks for 4 .* started 1\."):
        initialize(devices=4)


def test_gathering_in_a_world_of_one() -> None:
    initialize()
    value = {"a": [1, 2.5, None, "x"]}
    assert all_gather_json(value, parallel.world_group(), torch.device("cpu")) == [value]


def test_leaving_twice_and_joining_again(make_policy: MakePolicy, llama_folder: Path) -> None:
    initialize()
    parallel.shutdown()
    parallel.shutdown()
    assert not dist.is_initialized()
    with pytest.raises(AssertionError, match="not been joined"):
        parallel.world_group()
    assert make_policy(llama_folder).score([((5,), (6,))]).lengths.tolist() == [1]
