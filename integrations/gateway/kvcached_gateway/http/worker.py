"""One of the processes that serve HTTP: `kvcached_gateway.http.worker DESCRIPTOR HOST PORT`.

It has a socket to the controller's process and nothing else: no models, no files. When that closes,
because the gateway ends or died, it listens no more, finishes what is soon finished, and ends.
"""

import asyncio
import logging
import socket
import sys

import uvloop

from kvcached_gateway.http.app import build_app, build_runner
from kvcached_gateway.http.door import Door, allow_files
from kvcached_gateway.http.worker_link import WorkerLink

__all__ = ["LAST_SECONDS", "serve"]

LAST_SECONDS = 3.0  # for answers whose end is on its way


async def serve(connection: socket.socket, host: str, port: int) -> None:
    """Serve until the controller closes the connection.

    Args:
        connection: The socket to the controller.
        host: The address to listen on.
        port: The port, which other workers have, too.
    """
    loop = asyncio.get_running_loop()
    _, link = await loop.create_connection(WorkerLink, sock=connection)
    await link.rules_came.wait()
    front = link.front()
    runner = build_runner(build_app(front), last_seconds=LAST_SECONDS)
    await runner.setup()
    await Door(runner, front, host, port, is_shared=True).start()
    await link.has_ended.wait()
    await runner.cleanup()


def main() -> None:
    """Be a worker."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s worker %(message)s")
    allow_files()
    descriptor, host, port = sys.argv[1:]
    uvloop.run(serve(socket.socket(fileno=int(descriptor)), host, int(port)))


if __name__ == "__main__":
    main()
