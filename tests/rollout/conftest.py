from __future__ import annotations

from collections.abc import Iterator

import pytest
from chat_server import Endpoint


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.released.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()
