"""Parts that only some families have, under parallel layouts: split biases, norms of heads that
every rank has its own share of, many experts. Held against one process as test_layouts.py does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_layouts import (
    ONE,
    Pair,
    run,
    test_averaged_weights,
    test_every_gradient,
    test_gradient_norm_and_clipped_step,
    test_losses_and_metrics,
    test_scores_and_sampled_tokens,
)
from tiny_families import save_family

__all__ = [
    "test_averaged_weights",
    "test_every_gradient",
    "test_gradient_norm_and_clipped_step",
    "test_losses_and_metrics",
    "test_scores_and_sampled_tokens",
]
pytestmark = [pytest.mark.slow, pytest.mark.long]

SUITES = {
    "qwen2": ("tp=2", "tp=2,sp=1", "pp=2"),
    "qwen3": ("tp=2", "tp=2,sp=1", "pp=2"),
    "qwen3_moe": ("tp=2,sp=1", "ep=2"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Pair]:
    """Makes results when first asked; one process group serves all layouts of a model."""
    out = tmp_path_factory.mktemp("families")

    def get(name: str, layout: str) -> Pair:
        folder = out / name
        if not folder.exists():
            model = str(save_family(out / f"{name}-model", name))
            run(1, model, str(folder / "1"), ONE)
            run(2, model, str(folder / "2"), *SUITES[name])
        return folder / "1" / ONE, folder / "2" / layout

    return get


@pytest.fixture(
    params=[(name, layout) for name, layouts in SUITES.items() for layout in layouts],
    ids="-".join,
)
def pair(request: pytest.FixtureRequest, results: Callable[[str, str], Pair]) -> Pair:
    return results(*request.param)


def test_every_part_of_a_family_is_trained(pair: tuple[Path, Path]) -> None:
    """Biases and head norms get gradients that are not zero; the other tests compare them."""
    from nemo_selfpref.checkpoint.sharded import ShardReader

    reader = ShardReader(pair[1] / "grad-dpo")
    own = [n for n in reader.names() if n.endswith(("qkv.bias", "q_layernorm.weight"))]
    assert len(own) == 4
    for name in own:
        shape = reader.global_shape(name)
        assert float(reader.read(name, (0,), shape).abs().max()) > 1e-4, name
