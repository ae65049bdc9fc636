"""trainer.nonfinite and trainer.max_nonfinite_steps."""

from __future__ import annotations

import pytest

from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.schema import DataConfig, NonFinite, RunConfig, TrainerConfig
from nemo_selfpref.errors import ConfigError


def check(nonfinite: NonFinite, most: int) -> None:
    trainer = TrainerConfig(nonfinite=nonfinite, max_nonfinite_steps=most)
    data = DataConfig(train_path=["rows.jsonl"])
    check_config(RunConfig(name="test", data=data, trainer=trainer))


@pytest.mark.parametrize("most", [1, 3, 100])
def test_steps_may_be_skipped(most: int) -> None:
    check(NonFinite.skip, most)


def test_halting_needs_no_count() -> None:
    check(NonFinite.halt, 3)


@pytest.mark.parametrize("most", [0, -1])
@pytest.mark.parametrize("nonfinite", list(NonFinite))
def test_at_least_one(nonfinite: NonFinite, most: int) -> None:
    with pytest.raises(ConfigError, match=r"expected 1 or more.*trainer\.nonfinite=halt"):
        check(nonfinite, most)


def test_a_count_that_would_do_nothing() -> None:
    with pytest.raises(ConfigError, match="max_nonfinite_steps=5 does nothing with"):
        check(NonFinite.halt, 5)
