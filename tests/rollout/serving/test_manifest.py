from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.serving import manifest as module
from nemo_selfpref.rollout.serving.manifest import (
    MANIFEST,
    check_complete,
    check_digest,
    digest_of,
    facts_of_folder,
    read_manifest,
    read_tensor,
    verify_files,
    write_weights,
)
from nemo_selfpref.rollout.serving.weight_files import check_names, model_files
from nemo_selfpref.rollout.serving.wire import Manifest, Probe
from nemo_selfpref.types import WeightSet

Tensors = dict[str, Tensor]
FIRST = "weights-00000.safetensors"


@pytest.fixture
def tensors() -> Tensors:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(8, 4),
        "b.weight": torch.randn(3, 5).bfloat16(),
        "c.bias": torch.randn(6).half(),
        "d.scale": torch.tensor(2.5),
    }


def write(folder: Path, tensors: Tensors, version: int = 3, **more: Probe) -> Manifest:
    return write_weights(
        folder, tensors.items(), weight_set=WeightSet.POLICY, version=version, run="run", **more
    )


def facts(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], str]]:
    return {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()}


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_what_is_written_is_read(tmp_path: Path, tensors: Tensors) -> None:
    probe = Probe(token_ids=[5, 6], logprob=-1.25, tolerance=1e-3)
    made = write(tmp_path / "w", tensors, probe=probe)
    assert read_manifest(tmp_path / "w") == made
    assert (made.version, made.run, made.weight_set, made.probe) == (
        3,
        "run",
        WeightSet.POLICY,
        probe,
    )
    check_complete(made, facts(tensors))
    verify_files(tmp_path / "w", made)
    check_names(tmp_path / "w", tensors.keys())
    assert facts_of_folder(tmp_path / "w") == facts(tensors)
    for entry in made.tensors:
        found = read_tensor(tmp_path / "w", entry)
        assert found.dtype == tensors[entry.name].dtype and found.equal(tensors[entry.name])
    assert files_below(tmp_path) == ["w", f"w/{MANIFEST}", f"w/{FIRST}"]


def test_the_digest_is_of_the_contents_alone(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write(tmp_path / "one", tensors)
    turned = dict(reversed(tensors.items()))
    monkeypatch.setattr(module, "_FILE_BYTES", 40)
    assert write(tmp_path / "two", turned, version=9).digest == made.digest
    changed = {**tensors, "a.weight": tensors["a.weight"] + 1e-6}
    assert write(tmp_path / "three", changed).digest != made.digest
    reshaped = {**tensors, "a.weight": tensors["a.weight"].view(4, 8)}
    assert write(tmp_path / "four", reshaped).digest != made.digest


def test_tensors_over_several_files(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FILE_BYTES", 40)
    made = write(tmp_path / "w", tensors)
    # 128 bytes are more than a file's 40 and get one of their own; 30; 12 and 4.
    files = [(e.name, e.file[-17:-12]) for e in made.tensors]
    assert files == [
        ("a.weight", "00000"),
        ("b.weight", "00001"),
        ("c.bias", "00002"),
        ("d.scale", "00002"),
    ]
    verify_files(tmp_path / "w", made)
    check_names(tmp_path / "w", tensors.keys())
    assert facts_of_folder(tmp_path / "w") == facts(tensors)


def test_a_folder_is_replaced_whole(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path / "w", tensors)
    made = write(tmp_path / "w", {"a.weight": tensors["a.weight"]}, version=4)
    assert read_manifest(tmp_path / "w") == made
    verify_files(tmp_path / "w", made)
    assert files_below(tmp_path) == ["w", f"w/{MANIFEST}", f"w/{FIRST}"]


def test_tensors_that_share_their_memory(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(6, 2)
    tied = {"in": whole, "out": whole, "rows": whole[1:4], "turned": whole.t(), "rest": whole[4:]}
    made = write(tmp_path / "w", tied)
    verify_files(tmp_path / "w", made)
    found = load_file(tmp_path / "w" / FIRST)
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in tied.items()}


def copied(monkeypatch: pytest.MonkeyPatch, folder: Path, tensors: Tensors) -> list[str]:
    """Names of the tensors whose memory is copied before it is written."""
    names: list[str] = []
    saved: list[Tensors] = []

    def save(batch: Tensors, path: Path, metadata: dict[str, str]) -> None:
        saved.append(batch)
        save_file(batch, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", save)
    verify_files(folder, write(folder, tensors))
    for name, tensor in (item for batch in saved for item in batch.items()):
        names += [name] if tensor.data_ptr() != tensors[name].data_ptr() else []
    found = load_file(folder / FIRST)
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in tensors.items()}
    return names


def test_views_of_one_buffer_are_copied_only_where_they_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = torch.arange(24.0)
    apart = {"c": buffer[16:], "a": buffer[:8], "e": buffer[8:8], "b": buffer[8:16].view(4, 2)}
    assert copied(monkeypatch, tmp_path / "apart", apart) == []
    over = {
        "middle": buffer[8:16],
        "start": buffer[:9],  # one value of the middle
        "end": buffer[15:],  # another
        "inside": buffer[10:12],
        "around": buffer[4:20],
        "same": buffer[8:16],
        "before": buffer[:8],  # touches the middle, and meets `start`, which has been copied
        "after": buffer[16:],
    }
    want = ["start", "end", "inside", "around", "same"]
    assert copied(monkeypatch, tmp_path / "over", over) == want


def test_views_in_files_of_their_own_need_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.arange(12.0)
    monkeypatch.setattr(module, "_FILE_BYTES", 48)
    saved: list[Tensor] = []
    monkeypatch.setattr(module, "save_file", lambda batch, *_, **__: saved.extend(batch.values()))
    write(tmp_path / "w", {"in": whole, "out": whole})
    assert [tensor.data_ptr() for tensor in saved] == [whole.data_ptr()] * 2


def test_values_are_taken_out_of_the_graph_and_row_by_row(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    turned = write(tmp_path / "turned", {"w": parameter.t()})
    plain = write(tmp_path / "plain", {"w": parameter.detach().t().contiguous()})
    assert turned.digest == plain.digest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c.bias", "d.scale"])
def test_what_is_not_finite_is_not_written(
    tmp_path: Path, tensors: Tensors, name: str, value: float
) -> None:
    tensors[name].view(-1)[-1] = value
    with pytest.raises(WeightSyncError, match=f"{name} holds values that are not finite"):
        write(tmp_path / "w", tensors)
    assert files_below(tmp_path) == []


def test_a_sum_that_overflows_is_finite_still(tmp_path: Path) -> None:
    made = write(tmp_path / "w", {"w": torch.full((4,), 3e38)})
    verify_files(tmp_path / "w", made)


def test_a_name_comes_once(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = [*tensors.items(), ("a.weight", torch.zeros(1))]
    for size in (2**30, 40):
        monkeypatch.setattr(module, "_FILE_BYTES", size)
        with pytest.raises(WeightSyncError, match=r"a\.weight comes twice"):
            write_weights(tmp_path / "w", twice, weight_set=WeightSet.POLICY, version=0, run="run")
        assert files_below(tmp_path) == []


def test_a_type_that_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match=r"dtype: .*float32.*, got 'float64'"):
        write(tmp_path / "w", {"w": torch.zeros(2, dtype=torch.float64)})
    assert files_below(tmp_path) == []


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path, tensors: Tensors) -> None:
    write(tmp_path / "w", tensors)
    before = read_manifest(tmp_path / "w")

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a.weight", tensors["a.weight"]
        raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        write_weights(tmp_path / "w", broken(), weight_set=WeightSet.POLICY, version=4, run="run")
    assert files_below(tmp_path) == ["w", f"w/{MANIFEST}", f"w/{FIRST}"]
    assert read_manifest(tmp_path / "w") == before


@contextmanager
def no_file_larger_than(count: int) -> Iterator[None]:
    """The system itself refuses the write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 400, 2000])
def test_a_disk_that_is_full(tmp_path: Path, tensors: Tensors, limit: int) -> None:
    tensors["e.large"] = torch.zeros(1000)
    message = "of version 3 cannot be written to .*Nothing was handed over. Make room there"
    with no_file_larger_than(limit), pytest.raises(WeightSyncError, match=message):
        write(tmp_path / "w", tensors)
    assert files_below(tmp_path) == []
    write(tmp_path / "w", tensors)  # the space is there again


def test_no_room_for_the_manifest_is_no_weights(tmp_path: Path, tensors: Tensors) -> None:
    """The tensors fit into a file, their list does not."""
    many = {f"layer.{i}.a.rather.long.name": torch.zeros(1) for i in range(100)}
    whole = write(tmp_path / "w", many)
    size = (tmp_path / "w" / FIRST).stat().st_size
    assert (tmp_path / "w" / MANIFEST).stat().st_size > size + 100
    with no_file_larger_than(size + 100), pytest.raises(WeightSyncError, match="cannot be written"):
        write(tmp_path / "w", many, version=4)
    assert files_below(tmp_path) == ["w", f"w/{MANIFEST}", f"w/{FIRST}"]
    assert read_manifest(tmp_path / "w") == whole


def test_a_folder_that_cannot_be_made(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightSyncError, match="cannot be written to"):
        write(tmp_path / "file" / "w", tensors)


# -- reading ----------------------------------------------------------------------------------


def test_a_manifest_that_is_missing_or_damaged(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(WeightSyncError, match=r"manifest\.json cannot be read"):
        read_manifest(tmp_path / "w")
    write(tmp_path / "w", tensors)
    path = tmp_path / "w" / MANIFEST
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], whole[:-2], "", "[]", "\x80", "null"):
        path.write_text(text)
        with pytest.raises(WeightSyncError, match=r"manifest\.json is damaged"):
            read_manifest(tmp_path / "w")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(WeightSyncError, match="is damaged"):
        read_manifest(tmp_path / "w")


@pytest.mark.parametrize("change", ["tensor dropped", "name", "shape", "dtype", "sum", "digest"])
def test_a_digest_that_is_another(tmp_path: Path, tensors: Tensors, change: str) -> None:
    made = write(tmp_path / "w", tensors)
    path = tmp_path / "w" / MANIFEST
    said = json.loads(path.read_text())
    first = said["tensors"][0]
    if change == "tensor dropped":
        said["tensors"].pop()
    elif change == "digest":
        said["digest"] = "0" * 64
    else:
        key, value = {
            "name": ("name", "z"),
            "shape": ("shape", [4, 8]),
            "dtype": ("dtype", "float16"),
            "sum": ("sha256", "0" * 64),
        }[change]
        first[key] = value
    path.write_text(json.dumps(said))
    with pytest.raises(WeightSyncError, match="policy version 3 does not match its digest"):
        read_manifest(tmp_path / "w")
    check_digest(made)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (lambda f: {**f, "z": ((1,), "float32")}, "z is missing"),
        (lambda f: {k: v for k, v in f.items() if k != "c.bias"}, "c.bias is not one of"),
        (lambda f: {**f, "c.bias": ((7,), "float16")}, r"c\.bias is float16 \[6\], .*\[7\]"),
        (lambda f: {**f, "c.bias": ((6,), "float32")}, r"has float32 \[6\]"),
        (lambda f: {f"x{i}": ((1,), "float32") for i in range(9)}, "; .* and 9 more"),
    ],
    ids=["missing", "extra", "shape", "dtype", "many"],
)
def test_weights_of_another_model(
    tmp_path: Path, tensors: Tensors, expected: Callable[[dict], dict], message: str
) -> None:
    made = write(tmp_path / "w", tensors)
    with pytest.raises(WeightSyncError, match=f"policy version 3 is not this model: .*{message}"):
        check_complete(made, expected(facts(tensors)))


def test_a_tensor_listed_twice(tmp_path: Path, tensors: Tensors) -> None:
    made = write(tmp_path / "w", tensors)
    entries = [*made.tensors, made.tensors[0]]
    twice = made.model_copy(update={"tensors": entries, "digest": digest_of(entries)})
    with pytest.raises(WeightSyncError, match="a tensor is listed twice"):
        check_complete(twice, facts(tensors))


def changed(folder: Path, tensors: Tensors, **new: Tensor | None) -> None:
    """Write the file again with other tensors; None drops one."""
    both = {**tensors, **{k.replace("_", "."): v for k, v in new.items()}}
    save_file({k: v for k, v in both.items() if v is not None}, folder / FIRST)


def test_files_that_are_not_what_the_manifest_says(tmp_path: Path, tensors: Tensors) -> None:
    folder = tmp_path / "w"
    made = write(folder, tensors)
    weight = tensors["a.weight"]
    flipped, bad = weight.clone(), weight.clone()
    flipped.view(torch.int32)[7, 3] ^= 1
    bad[0, 0] = float("nan")
    for new, message in (
        (flipped, r"a\.weight is damaged: SHA-256"),
        (bad, "not finite"),
        (weight.t().contiguous(), r"a\.weight is float32 \[4, 8\], the manifest says float32 \[8"),
        (weight.half(), r"a\.weight is float16 \[8, 4\]"),
        (None, r"a\.weight cannot be read"),
    ):
        changed(folder, tensors, a_weight=new)
        with pytest.raises(WeightSyncError, match=message):
            verify_files(folder, made)
    changed(folder, tensors)
    verify_files(folder, made)


@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "header"])
def test_a_file_that_is_damaged(tmp_path: Path, tensors: Tensors, damage: str) -> None:
    folder = tmp_path / "w"
    made = write(folder, tensors)
    path = folder / FIRST
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        new = {"cut": data[:-3], "empty": b"", "header": b"\xff" * 8 + data[8:]}[damage]
        path.write_bytes(new)
    with pytest.raises(WeightSyncError, match="cannot be read"):
        verify_files(folder, made)


@pytest.mark.parametrize("name", ["../other/" + FIRST, "/etc/passwd", "", ".", "sub/" + FIRST])
def test_a_file_elsewhere_is_not_read(tmp_path: Path, tensors: Tensors, name: str) -> None:
    made = write(tmp_path / "w", tensors)
    write(tmp_path / "other", tensors)
    write(tmp_path / "w" / "sub", tensors)
    entries = [e.model_copy(update={"file": name}) for e in made.tensors]
    with pytest.raises(WeightSyncError, match="is not a file's name"):
        verify_files(tmp_path / "w", made.model_copy(update={"tensors": entries}))


def test_names_are_checked_without_reading_the_contents(tmp_path: Path, tensors: Tensors) -> None:
    folder = tmp_path / "w"
    write(folder, tensors)
    with pytest.raises(WeightSyncError, match="z is missing"):
        check_names(folder, {*tensors, "z"})
    with pytest.raises(WeightSyncError, match=r"a\.weight is not listed"):
        check_names(folder, tensors.keys() - {"a.weight"})
    save_file({"a.weight": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(WeightSyncError, match=r"a\.weight comes twice"):
        check_names(folder, tensors.keys())
    (folder / "other.safetensors").write_bytes(b"short")
    with pytest.raises(WeightSyncError, match="cannot be read"):
        check_names(folder, tensors.keys())
    with pytest.raises(WeightSyncError, match="is missing"):
        check_names(tmp_path / "nowhere", tensors.keys())


def test_a_model_beside_another_form_of_it(tmp_path: Path, tensors: Tensors) -> None:
    first, second = dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])
    save_file({"layers.0.w": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert facts_of_folder(tmp_path).keys() == {"layers.0.w"}
    save_file(tensors, tmp_path / "model.safetensors")
    assert facts_of_folder(tmp_path) == facts(tensors)
    assert [path.name for path in model_files(tmp_path)] == ["model.safetensors"]
    check_names(tmp_path, tensors.keys(), model_files(tmp_path))
    with pytest.raises(WeightSyncError, match=r"layers\.0\.w is not listed"):
        check_names(tmp_path, tensors.keys())
    # An index says which files count, whatever else is there.
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    places = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert [path.name[:11] for path in model_files(tmp_path)] == ["model-00001", "model-00002"]
    assert facts_of_folder(tmp_path) == facts(tensors)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightSyncError, match=r"00002-of-00002\.safetensors cannot be read"):
        facts_of_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_models_index_that_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightSyncError, match=r"index\.json cannot be read: .* a weight_map"):
        facts_of_folder(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="holds no safetensors files"):
        facts_of_folder(tmp_path)
