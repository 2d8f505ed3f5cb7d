"""Options of the server."""

from __future__ import annotations

import ipaddress
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from scorelm.config import Options
from scorelm.errors import InputError


class Serving(Options):
    """Where to listen, and what a request may take."""

    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can reach the server; 0.0.0.0 opens it to the network."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes any free one."""
    token: str | None = None
    """Token that every request must bring (Authorization: Bearer TOKEN), by default none. Better set in the environment
    variable SCORELM_TOKEN, since others on this machine can read command lines."""
    insecure: bool = False
    """Listen beyond this machine without a token."""
    origin: tuple[str, ...] = ()
    """Origins of web pages that may send requests, such as https://example.org, by default none but the server's own
    page."""
    queue: PositiveInt = 256
    """Most requests that wait for their turn; further ones are told to come back later."""
    timeout: PositiveFloat = 120.0
    """Most seconds for a request, waiting included."""
    most_texts: PositiveInt = 64
    """Most texts of a request, candidates of --best-of included."""
    most_steps: PositiveInt = 1024
    """Most steps of a request."""
    most_length: PositiveInt = 2048
    """Most tokens in a text of a request."""
    most_bytes: PositiveInt = 1 << 18
    """Most bytes in the body of a request."""

    def check(self) -> None:
        """Refuse to open a server without a token to the network.

        Raises:
            InputError: it would.
        """
        if self.token == "":
            raise InputError("the token is empty: give one, or none")
        if self.local or self.token is not None or self.insecure:
            return
        raise InputError(
            f"{self.host} can be reached from other machines: set a token in SCORELM_TOKEN, or say --insecure"
        )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
