"""A checkpoint as a Hugging Face folder, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_selfpref.checkpoint.hf_config import write_config
from nemo_selfpref.checkpoint.hf_weights import megatron_shapes, to_huggingface
from nemo_selfpref.checkpoint.seal import seal
from nemo_selfpref.checkpoint.sharded import TensorSource
from nemo_selfpref.checkpoint.training_state import architecture_of, merged_weights_of
from nemo_selfpref.config.model_schema import ArchitectureConfig, TokenizerConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_selfpref.files import new_folder, read_json, write_json

_FILE_BYTES = 4 * 2**30


def export_checkpoint(checkpoint: Path, target: Path) -> None:
    """Write `checkpoint` to `target` as safetensors, config, generation config and tokenizer.

    Adapters are merged into the weights they belong to.
    The folder appears whole or not at all; an existing one is replaced. Memory holds at most one
    output file's tensors.

    Raises:
        CheckpointError: the checkpoint is damaged or incomplete.
    """
    arch = architecture_of(checkpoint)
    reader = merged_weights_of(checkpoint)
    tokenizer = load_tokenizer(TokenizerConfig(), str(checkpoint / "tokenizer"))
    write_hf_folder(target, _tensors(reader, arch), arch, tokenizer)


def write_hf_folder(
    target: Path,
    tensors: Iterable[tuple[str, Tensor]],
    arch: ArchitectureConfig,
    tokenizer: ChatTokenizer,
    durable: bool = True,
) -> None:
    """Write a model to `target` as export_checkpoint does; `tensors` are all of its weights.

    Args:
        durable: flush it to the disk, and write the sums of all files to manifest.json.
    """
    with new_folder(target, durable) as folder:
        dtype = _write_weights(folder, tensors)
        tokenizer.save_pretrained(str(folder))
        _write_template_twice(folder)
        config = write_config(arch, dtype, None, tokenizer.eos_id, tokenizer.pad_id)
        write_json(folder / "config.json", config)
        generation = {
            "eos_token_id": sorted(tokenizer.stop_ids),
            "pad_token_id": tokenizer.pad_id,
            "do_sample": False,
        }
        write_json(folder / "generation_config.json", generation)
        for path in folder.iterdir():
            path.chmod(0o644)
        if durable:
            seal(folder)


def _write_template_twice(folder: Path) -> None:
    """The chat template in its own file and in tokenizer_config.json: readers know one or other."""
    config, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(config)
    inline = settings.get("chat_template")
    if own.exists():
        write_json(config, {**settings, "chat_template": own.read_bytes().decode("utf-8")})
    elif isinstance(inline, str):
        own.write_bytes(inline.encode("utf-8"))


def _tensors(reader: TensorSource, arch: ArchitectureConfig) -> Iterator[tuple[str, Tensor]]:
    for key, shape in megatron_shapes(arch).items():
        yield from to_huggingface(key, reader.read(key, (0,) * len(shape), shape), arch)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Write the weights in files of at most _FILE_BYTES; returns their dtype's name."""
    weight_map: dict[str, int] = {}
    total = used = 0
    dtype = torch.float32
    pending: dict[str, Tensor] = {}
    written: list[Path] = []
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and used + size > _FILE_BYTES:
            written.append(_write_file(folder, len(written), pending))
            pending, used = {}, 0
        pending[name] = tensor.detach().cpu().contiguous()
        weight_map[name] = len(written)
        used, total, dtype = used + size, total + size, tensor.dtype
    written.append(_write_file(folder, len(written), pending))
    _name_files(folder, written, weight_map, total)
    return str(dtype).removeprefix("torch.")


def _write_file(folder: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    path = folder / f"part-{number:05d}"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _name_files(folder: Path, written: list[Path], weight_map: dict[str, int], total: int) -> None:
    if len(written) == 1:
        written[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(written):05d}.safetensors" for i in range(len(written))]
    for path, name in zip(written, names, strict=True):
        path.rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: names[number] for key, number in weight_map.items()},
    }
    write_json(folder / "model.safetensors.index.json", index)
