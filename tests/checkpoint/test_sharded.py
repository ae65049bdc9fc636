from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saving import save_state
from torch import Tensor

from nemo_selfpref.checkpoint.sharded import (
    ShardReader,
    ShardWriter,
    _decode,
    _is_main_replica,
    encode,
    load_state,
    read_common,
    write_index,
)
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import sha256_of, write_json
from nemo_selfpref.megatron.policy import Policy

WHOLE = torch.arange(24.0).reshape(6, 4)


def written(folder: Path, *writers: ShardWriter) -> Path:
    """What these ranks hold, as a folder."""
    files = [path for path in (writer.write(folder) for writer in writers) if path is not None]
    entries = [entry for writer in writers for entry in writer.entries]
    write_index(folder, entries, {path.name: sha256_of(path) for path in files})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """WHOLE in three parts on two ranks: rows 0-3, and of rows 4-5 the left and right halves."""
    first, second = ShardWriter(0), ShardWriter(1)
    first.add("w", WHOLE[:4], (0, 0), (6, 4))
    second.add("w", WHOLE[4:, :2], (4, 0), (6, 4))
    second.add("w", WHOLE[4:, 2:], (4, 2), (6, 4))
    second.add("scalar", torch.tensor(3.5), (), ())
    return written(tmp_path, first, second)


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((0, 0), (6, 4)), ((3, 1), (2, 2)), ((5, 3), (1, 1)), ((4, 0), (2, 4)), ((0, 3), (6, 1))],
)
def test_any_part_is_put_together(
    folder: Path, offset: tuple[int, int], shape: tuple[int, int]
) -> None:
    rows, columns = (slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    got = ShardReader(folder).read("w", offset, shape)
    assert torch.equal(got, WHOLE[rows, columns])


def test_beyond_the_end_there_are_zeros(folder: Path) -> None:
    # A vocabulary padded from 6 to 8 rows: ranks hold rows 0-3 and 4-7.
    got = ShardReader(folder).read("w", (4, 0), (4, 4))
    assert torch.equal(got[:2], WHOLE[4:])
    assert got[2:].eq(0).all()


def test_scalars(folder: Path) -> None:
    reader = ShardReader(folder)
    assert reader.read("scalar", (), ()).item() == 3.5
    assert reader.names() == ["scalar", "w"]
    assert reader.global_shape("w") == (6, 4) and reader.global_shape("scalar") == ()


def test_a_missing_tensor(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tensor v: is it of another model"):
        ShardReader(folder).read("v", (0,), (1,))


def test_parts_that_do_not_cover(tmp_path: Path) -> None:
    writer = ShardWriter()
    writer.add("w", WHOLE[:4], (0, 0), (6, 4))
    written(tmp_path, writer)
    reader = ShardReader(tmp_path)
    assert torch.equal(reader.read("w", (1, 0), (3, 4)), WHOLE[1:4])
    with pytest.raises(CheckpointError, match="the parts of w cover 16 of 24 elements"):
        reader.read("w", (0, 0), (6, 4))


def test_damage_is_found_and_the_file_named(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-00001\.safetensors is damaged: SHA-256"):
        ShardReader(folder).read("w", (0, 0), (6, 4))
    assert torch.equal(ShardReader(folder).read("w", (0, 0), (4, 4)), WHOLE[:4])
    ShardReader(folder, verify=False).read("w", (0, 0), (6, 4))


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors is missing"):
        ShardReader(folder, verify=False)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json is missing"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    writer = ShardWriter()
    writer.add("w", WHOLE.to(dtype).t(), (0, 0), (4, 6))  # not contiguous
    written(tmp_path, writer)
    got = ShardReader(tmp_path).read("w", (0, 0), (4, 6))
    assert got.dtype == dtype and torch.equal(got, WHOLE.to(dtype).t())


def test_a_rank_without_parts_writes_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(3)
    assert writer.write(tmp_path / "x") is None and writer.entries == []
    assert not list((tmp_path / "x").iterdir())


def test_what_is_kept_does_not_change_with_the_model(tmp_path: Path) -> None:
    weight, writer = WHOLE.clone(), ShardWriter()
    writer.add("w", weight, (0, 0), (6, 4))
    weight.zero_()
    assert torch.equal(ShardReader(written(tmp_path, writer)).read("w", (0, 0), (6, 4)), WHOLE)


def test_what_is_not_finite_is_named() -> None:
    writer = ShardWriter()
    writer.add("good", WHOLE, (0, 0), (6, 4))
    writer.add("bad", torch.tensor([1.0, float("nan")]), (0,), (2,))
    writer.add("far", torch.tensor(float("inf")), (), ())
    assert writer.nonfinite() == ["bad@0", "far@"]


def test_plain_state_survives_json(tmp_path: Path) -> None:
    state = {
        "step": torch.tensor(7, dtype=torch.int64),
        "scale": torch.tensor(0.5, dtype=torch.float64),
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "name": None}],
    }
    write_json(tmp_path / "common.json", encode(state))
    back = read_common(tmp_path)
    assert back["step"].dtype == torch.int64 and back["step"].item() == 7
    assert back["scale"].dtype == torch.float64 and back["scale"].item() == 0.5
    assert back["groups"] == [{"lr": 1e-3, "betas": [0.9, 0.95], "name": None}]


def test_a_whole_tensor_is_not_plain_state() -> None:
    with pytest.raises(CheckpointError, match=r"a tensor of shape \(2,\) is not in any shard"):
        encode({"a": [torch.zeros(2)]})


def test_decode_leaves_other_dicts_alone() -> None:
    assert _decode({"scalar": 1, "dtype": "int64", "more": 2})["scalar"] == 1


def test_one_replica_writes() -> None:
    assert _is_main_replica(0) and _is_main_replica((0, 0, 0))
    assert not _is_main_replica(1) and not _is_main_replica((0, 0, 1))


class Constant:
    """A source of global tensors that are all of one value."""

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, 0.25)


def test_state_of_a_policy_is_filled_from_a_source(policy: Policy) -> None:
    loaded = load_state(Constant(), policy.sharded_state_dict())
    policy.module.load_state_dict(loaded)
    assert all(p.eq(0.25).all() for p in policy.module.parameters())


def test_state_of_a_policy_is_saved_whole(policy: Policy, tmp_path: Path) -> None:
    save_state(tmp_path, policy.sharded_state_dict())
    reader = ShardReader(tmp_path)
    for name, parameter in policy.module.named_parameters():
        key = {
            "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
            "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
        }
        for plain, fused in key.items():
            name = name.replace(plain, fused)
        shape = tuple(parameter.shape)
        got = reader.read(name, (0,) * len(shape), shape)
        assert torch.equal(got, parameter.detach()), name
    assert len(reader.names()) == len(list(policy.module.parameters()))
