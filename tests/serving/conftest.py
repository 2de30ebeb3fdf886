"""A server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serving.running import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    from tests.serving.running import Running

    server = Running(max_waiting=40)
    yield server
    server.close()
