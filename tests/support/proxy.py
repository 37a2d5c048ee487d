"""A TCP proxy in front of a server, that a test cuts, or lets hang, and mends."""

import contextlib
import socket
import threading


class Proxy:
    """Listens on a loopback port of its own and passes bytes on, while it is `open`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._open, self._hanging = True, False
        self._pairs: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, *, hang: bool = False) -> None:
        """Close what is open, and refuse new connections; or take them and say nothing."""
        self._open, self._hanging = False, hang
        self._drop()

    def mend(self) -> None:
        """Pass bytes on again."""
        self._open, self._hanging = True, False
        self._drop()

    def close(self) -> None:
        """Stop for good."""
        self.cut()
        self._listener.close()

    def _drop(self) -> None:
        with self._lock:
            dropped, self._pairs = self._pairs, set()
        for one in dropped:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._hanging:
                with self._lock:
                    self._pairs.add(client)
            elif self._open:
                self._connect(client)
            else:
                client.close()

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target, timeout=5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._pairs |= {client, server}
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with self._lock:
            gone = {source, sink} & self._pairs
            self._pairs -= gone
        for one in gone:
            one.close()
