"""The contract on vLLM in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from backends import FOLDER
from contract import Reference
from contract_served import ServedContract, ServedSubject

from nemo_selfpref.rollout.serving.local_client import BackendEngine
from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend


class TestInProcess(ServedContract):
    @pytest.fixture(scope="class")
    def subject(
        self, backend: VLLMBackend, reference: Callable[[float], Reference]
    ) -> ServedSubject:
        return ServedSubject(
            BackendEngine(backend),
            reference(1.0),
            version=-1,
            running=lambda: backend.health().running,
            embedded_greedy=(FOLDER / "greedy.json").read_text(),
        )
