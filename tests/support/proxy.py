"""A TCP proxy that makes a network what a test needs: slow, silent, or cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_BLOCK_BYTES = 64 << 10


class Proxy:
    """Hands on connections to a port of 127.0.0.1; its attributes may be changed at any time.

    `latency_s`: how long each answer's first block is held back. `block_s`: the same for each block
    of 64 KiB. `is_silent`: nothing that the server says is handed on. `silent_connections`: the
    same for so many connections yet to come. `cut_after_bytes`: each connection ends there.
    `is_down`: connections are ended at once.
    """

    def __init__(self, target: int) -> None:
        self.latency_s = 0.0
        self.block_s = 0.0
        self.is_down = False
        self.is_silent = False
        self.silent_connections = 0
        self.cut_after_bytes: int | None = None
        self.connections = 0
        self.forwarded = threading.Event()
        self._target = target
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End every connection, and listen no longer."""
        for one in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_down:
                client.close()
                continue
            self.connections += 1
            is_silent = self.silent_connections > 0
            self.silent_connections -= is_silent
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            for run in (self._ask, self._answer):
                threading.Thread(target=run, args=(client, server, is_silent), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket, is_silent: bool) -> None:
        with contextlib.suppress(OSError):
            while block := client.recv(_BLOCK_BYTES):
                time.sleep(self.latency_s)
                server.sendall(block)
        _end(client, server)

    def _answer(self, client: socket.socket, server: socket.socket, is_silent: bool) -> None:
        total = 0
        with contextlib.suppress(OSError):
            while block := server.recv(_BLOCK_BYTES):
                while is_silent or self.is_silent:
                    time.sleep(0.01)
                    if client.fileno() < 0:
                        return
                time.sleep(self.block_s)
                if self.cut_after_bytes is not None and total + len(block) > self.cut_after_bytes:
                    break
                client.sendall(block)
                total += len(block)
                if total > _BLOCK_BYTES:
                    self.forwarded.set()
        _end(client, server)


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
