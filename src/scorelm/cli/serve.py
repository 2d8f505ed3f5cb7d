"""``scorelm serve``."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from types import FrameType
from typing import Annotated, ClassVar

from tyro.conf import arg

from scorelm.cli.model import Device, Model, open_model
from scorelm.cli.printing import tell
from scorelm.cli.verb import Verb
from scorelm.config.serving import Serving
from scorelm.errors import InputError

TOKEN = "SCORELM_TOKEN"
"""Variable of the environment that has the token."""


class ServeVerb(Verb):
    """Options of ``scorelm serve``.

    The page at the address that it prints shows every token condense out of noise. Programs use /v1/generate,
    /v1/infill and /v1/score, described at /openapi.json, or OpenAI's clients with /v1/completions. Ctrl-C ends it: what
    is under way is answered first, and a second Ctrl-C ends it at once.
    """

    less_memory: ClassVar[str] = "use a smaller model"

    model: Model = None
    name: str | None = None
    """Name of the model, as clients see it; by default that of its directory."""
    device: Device = "auto"
    where: Annotated[Serving, arg(name="")] = Serving()

    def run(self) -> int:
        """Serve until stopped."""
        try:
            import uvicorn

            from scorelm.serving.app import make_app
        except ModuleNotFoundError as error:
            raise InputError(f"{error.name} is not installed: pip install 'scorelm[serve]'") from None
        token = os.environ.get(TOKEN) if self.where.token is None else self.where.token
        where = self.where.model_copy(update={"token": token})
        where.check()
        lm = open_model(self.model, self.device)
        name = self.name or ("scorelm-kjv" if self.model is None else self.model.resolve().name)
        app = make_app(lm, where, name)
        listener = listen(where.host, where.port)

        class Server(uvicorn.Server):
            """Tells the worker, too, that the end is near."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                app.state.worker.drain()
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            app, log_level="warning", server_header=False, timeout_graceful_shutdown=int(where.timeout) + 5
        )
        host, port = listener.getsockname()[:2]
        tell(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}   (Ctrl-C ends it)")
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises what it was sent once more at its end
        with suppress(KeyboardInterrupt):
            Server(config).run(sockets=[listener])
        return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: no such address, or the port is taken or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except socket.gaierror as error:
        raise InputError(f"cannot listen on {host}: {error.strerror}") from None
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port}: {os.strerror(error.errno or 0)}") from None
