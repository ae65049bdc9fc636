"""Folders of models are read as data: a pickle in any place, under any name, is never opened, and
code beside a model never imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from payloads import Canary, gadget
from tiny import MakePolicy

from nemo_selfpref.checkpoint.folders import is_checkpoint
from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.data.tokenizer import load_tokenizer
from nemo_selfpref.errors import CheckpointError, DataError, SelfPrefError
from nemo_selfpref.training.convert import import_hf

UNREAD = {"generation_config.json", "special_tokens_map.json", "README.md"}
"""Files of a model's folder that nothing is read from."""


def every_file(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def refused(folder: Path, make_policy: MakePolicy, name: str, bomb: bytes) -> bool:
    """Whether the folder is refused with a bomb in the place of one of its files."""
    path = folder / name
    good = path.read_bytes()
    path.write_bytes(bomb)
    try:
        make_policy(folder)
        return False
    except SelfPrefError as error:
        assert str(error)
        return True
    finally:
        path.write_bytes(good)


def test_a_pickle_in_place_of_a_file_of_a_hugging_face_folder(
    llama_folder: Path, bomb: bytes, tmp_path: Path, make_policy: MakePolicy
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    names = every_file(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*names}
    wrong = {name for name in names if not refused(folder, make_policy, name, bomb)}
    assert wrong <= UNREAD


def test_a_pickle_in_place_of_a_file_of_a_checkpoint(
    llama_folder: Path, bomb: bytes, tmp_path: Path, make_policy: MakePolicy
) -> None:
    folder = tmp_path / "checkpoint"
    import_hf(llama_folder, folder)
    names = every_file(folder)
    assert {"checkpoint.json", "weights/index.json", "tokenizer/tokenizer.json"} <= {*names}
    wrong = {name for name in names if not refused(folder, make_policy, name, bomb)}
    assert {Path(name).name for name in wrong} <= UNREAD | {"common.json"}


def test_pickled_weights_are_not_an_alternative(
    llama_folder: Path, bomb: bytes, tmp_path: Path, make_policy: MakePolicy
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"pickled \.bin weights are not read"):
        make_policy(folder)


def test_pickles_beside_the_weights_are_left_alone(
    llama_folder: Path, bomb: bytes, tmp_path: Path, make_policy: MakePolicy
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    for name in (
        *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"),
        *("rng_state.pth", "tokenizer.pkl", "vocab.pkl", "vocab.bin", "model.nemo", "model.ckpt"),
    ):
        (folder / name).write_bytes(bomb)
    assert make_policy(folder).arch.num_layers == 4


def test_an_index_cannot_name_a_pickle(
    llama_folder: Path, bomb: bytes, tmp_path: Path, make_policy: MakePolicy
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    outside = tmp_path / "outside.bin"
    outside.write_bytes(bomb)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        names = list(handle.keys())
    for named in ("pytorch_model.bin", "../outside.bin", str(outside)):
        (folder / "pytorch_model.bin").write_bytes(bomb)
        index = {"weight_map": dict.fromkeys(names, named)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError):
            make_policy(folder)


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "importlib.import_module"])
def test_a_gadget_in_the_files_of_a_model(
    canary: Canary, name: str, llama_folder: Path, tmp_path: Path, make_policy: MakePolicy
) -> None:
    """Keys that nobody reads, and values where something else belongs."""
    made = gadget(canary, name)
    model, checkpoint = shutil.copytree(llama_folder, tmp_path / "m"), tmp_path / "c"
    import_hf(llama_folder, checkpoint)
    files = (
        *(model / "config.json", model / "tokenizer_config.json"),
        *(checkpoint / "checkpoint.json", checkpoint / "tokenizer" / "tokenizer_config.json"),
    )
    for path in files:
        good = json.loads(path.read_text())
        keys = ("hidden_size", "architecture", "eos_token", "model_type")
        keys = [key for key in keys if key in good]
        for content in ({**good, **made, "extra": made}, *({**good, key: made} for key in keys)):
            path.write_text(json.dumps(content))
            folder = checkpoint if is_checkpoint(path.parent) else path.parent
            try:
                make_policy(checkpoint if checkpoint in path.parents else folder)
            except SelfPrefError:
                continue
            finally:
                canary.check_silent()
        path.write_text(json.dumps(good))


# -- code beside a model --------------------------------------------------------------------------


def test_code_beside_a_model_is_not_imported(
    canary: Canary, llama_folder: Path, tmp_path: Path, make_policy: MakePolicy
) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    code = f"import os\nos.makedirs({str(canary.made)!r}, exist_ok=True)\n"
    classes = "class Mine:\n    pass\n"
    for name in ("modeling_mine", "configuration_mine", "tokenization_mine"):
        (folder / f"{name}.py").write_text(code + classes)
    named = {
        "AutoConfig": "configuration_mine.Mine",
        "AutoModelForCausalLM": "modeling_mine.Mine",
        "AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "auto_map": named}))
    saved = tmp_path / "saved"
    try:
        make_policy(folder)
        load_tokenizer(TokenizerConfig(path=str(folder))).save_pretrained(saved)
        assert "auto_map" not in json.loads((saved / "tokenizer_config.json").read_text())
    except DataError as error:
        assert "trust_remote_code" in str(error) or "custom code" in str(error)
    canary.check_silent()


def test_the_code_beside_a_model_would_run(
    canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With trust_remote_code=True it does: the test above can fail."""
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"import os\nos.makedirs({str(canary.made)!r}, exist_ok=True)\n"
    body = "from transformers import LlamaConfig\nclass Mine(LlamaConfig):\n    model_type='m'\n"
    (tmp_path / "configuration_mine.py").write_text(code + body)
    settings = {"model_type": "m", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    AutoConfig.from_pretrained(str(tmp_path), trust_remote_code=True)  # the danger itself
    assert canary.sang
