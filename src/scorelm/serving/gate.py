"""The gate of the server: who may come in, what is counted, and what a browser is told of every answer."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress

from fastapi import Request
from sse_starlette.sse import SendTimeoutError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scorelm.config.serving import Serving
from scorelm.serving.metrics import Metrics
from scorelm.serving.requests import refuse
from scorelm.serving.worker import Refusal

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing but its own files."""
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
}  # fmt: skip


class Gate:
    """Lets requests in, or refuses them.

    Args:
        app: behind the gate.
        limits: whether a token is needed, which pages may come, how large a body may be and how long it may take.
        metrics: that count.
    """

    def __init__(self, app: ASGIApp, limits: Serving, metrics: Metrics) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(Request(scope))
        heard = careful(receive, self.limits)
        with suppress(SendTimeoutError):  # of a stream that the client does not read
            await (self.app if refusal is None else refuse(refusal))(scope, heard, told)
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(time.monotonic() - begin)

    def refusal(self, request: Request) -> Refusal | None:
        """Why a request may not come in, if it may not."""
        if self.limits.token is None:
            found = self.from_elsewhere(request)
            if found is not None:
                return found
        elif not self.has_token(request):
            return Refusal(401, "unauthorized", "send the header Authorization: Bearer TOKEN")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.limits.most_bytes:
            return Refusal(413, "invalid_request_error", too_large(self.limits))
        return None

    def has_token(self, request: Request) -> bool:
        """Whether a request has the token, or asks for what everybody may see: the page and its health."""
        path, given = request.url.path, request.headers.get("authorization", "").encode()
        if not path.startswith("/v1/") and path not in ("/metrics", "/openapi.json"):
            return True
        return hmac.compare_digest(given, f"Bearer {self.limits.token}".encode())

    def from_elsewhere(self, request: Request) -> Refusal | None:
        """Without a token, no page of another site may use the server.

        Neither under a name of its own that leads to this machine, nor by sending what browsers send without asking.
        """
        host, origin = request.headers.get("host", "").lower(), request.headers.get("origin", "").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.limits.local and name not in ("localhost", "127.0.0.1", "::1", self.limits.host.lower()):
            return Refusal(421, "invalid_request_error", "this server answers to localhost only")
        allowed = ("", f"http://{host}", f"https://{host}", *map(str.lower, self.limits.origin))
        if origin in allowed or "*" in self.limits.origin:
            return None
        return Refusal(403, "invalid_request_error", "pages of other sites may not use this server: see --origin")


def careful(receive: Receive, limits: Serving) -> Receive:
    """Receive the body of a request, as long as it is neither too large nor too slow; then what else comes.

    Raises:
        HTTPException: it is.
    """
    end, left, whole = time.monotonic() + limits.timeout, limits.most_bytes, False

    async def heard() -> Message:
        nonlocal left, whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), end - time.monotonic())
        except TimeoutError:
            raise HTTPException(408, "the body of the request did not come in time") from None
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, too_large(limits))
        whole = not message.get("more_body")
        return message

    return heard


def too_large(limits: Serving) -> str:
    """What is said of a body that is."""
    return f"the body is too large: this server allows {limits.most_bytes:,} bytes"
