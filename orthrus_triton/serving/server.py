"""uvicorn in front of a Scheduler: when it is told to stop, running requests hear so instead of holding it up.
Connections that ask for nothing are closed, or enough of them would keep everybody else out."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from orthrus_triton.serving.scheduler import Scheduler

MOST_CONNECTIONS = 1024
KEEP_ALIVE_SECONDS = 15
HEAD_SECONDS = 30  # for the head of a request; later ones on a connection get up to twice that
GRACE_SECONDS = 5  # for what a client still has to receive


class ImpatientProtocol(AutoHTTPProtocol):
    """uvicorn's, which for itself waits for ever for a first request, and for the rest of a head that has begun."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self._next_look = self.loop.call_later(HEAD_SECONDS, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        """`before` is the request that the connection was at when it was looked at last."""
        if self.cycle is before and (before is None or before.response_complete):
            self.transport.close()
        else:
            self._next_look = self.loop.call_later(HEAD_SECONDS, self._look, self.cycle)


class Server(uvicorn.Server):
    """Serves one application; closes its scheduler before it waits for open connections.

    Args:
        app: of `create_app`.
        scheduler: the one behind it; closed when the server stops.
        host, port: where to listen.
    """

    def __init__(self, app: FastAPI, scheduler: Scheduler, host: str = "127.0.0.1", port: int = 8000) -> None:
        config = uvicorn.Config(
            app, host=host, port=port, http=ImpatientProtocol, log_level="warning", lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_SECONDS, limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._scheduler = scheduler

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn after Ctrl-C, a SIGTERM or `should_exit = True`."""
        await asyncio.to_thread(self._scheduler.close)
        await super().shutdown(sockets)
