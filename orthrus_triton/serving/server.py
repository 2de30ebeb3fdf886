"""uvicorn in front of a Scheduler: when it is told to stop, running requests hear so instead of holding it up."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from orthrus_triton.serving.scheduler import Scheduler

MOST_CONNECTIONS = 1024
KEEP_ALIVE_SECONDS = 15
GRACE_SECONDS = 5  # for what a client still has to receive


class Server(uvicorn.Server):
    """Serves one application; closes its scheduler before it waits for open connections.

    Args:
        app: of `create_app`.
        scheduler: the one behind it; closed when the server stops.
        host, port: where to listen.
    """

    def __init__(self, app: FastAPI, scheduler: Scheduler, host: str = "127.0.0.1", port: int = 8000) -> None:
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", lifespan="off", timeout_keep_alive=KEEP_ALIVE_SECONDS,
            limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after Ctrl-C, a SIGTERM or `should_exit = True`."""
        await asyncio.to_thread(self._scheduler.close)
        await super().shutdown(sockets)
