"""vLLM in this process. These tests need vLLM's environment and the folder of contract_folder.py:
test_contract_vllm.py makes it, names it in SELFPREF_CONTRACT and runs them; elsewhere they are not
collected. One vLLM engine must not be destroyed while another of the process goes on, so all of
them live as long as the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

collect_ignore_glob = [] if "SELFPREF_CONTRACT" in os.environ else ["test_*.py"]

if not collect_ignore_glob:
    import torch
    from backends import FOLDER, Sender, make_backend
    from contract import Reference

    from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend

    torch.set_num_threads(1)
    pytest.register_assert_rewrite("contract", "contract_served")

    @pytest.fixture(scope="session")
    def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("weights")

    @pytest.fixture(scope="session")
    def backend(weights_dir: Path) -> Iterator[VLLMBackend]:
        """An engine of the policy alone, on the folder's weights."""
        made = make_backend(FOLDER / "model", weights_dir, "policy")
        yield made
        made.close()

    @pytest.fixture(scope="session")
    def sender(weights_dir: Path) -> Sender:
        return Sender(FOLDER / "model", weights_dir)

    @pytest.fixture(scope="session")
    def reference() -> Callable[[float], Reference]:
        """The folder's model, its weights times a factor; each is made once."""
        made: dict[float, Reference] = {}

        def get(scale: float) -> Reference:
            if scale not in made:
                made[scale] = Reference(FOLDER / "model", scale)
            return made[scale]

        return get
