"""The contract on the embedded engine."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("contract")

from contract import Contract, Reference, Subject  # noqa: E402
from contract_folder import SHAPE, make_embedded  # noqa: E402
from tiny import save_llama  # noqa: E402


class TestEmbedded(Contract):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Subject:
        folder: Path = save_llama(tmp_path_factory.mktemp("contract"), **SHAPE)
        return Subject(make_embedded(folder), Reference(folder), version=0)
