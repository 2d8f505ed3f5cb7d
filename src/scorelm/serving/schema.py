"""What a request may say: the options of `scorelm.config.generation`, and what only a request over the network has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt

from scorelm.config.generation import Continuation, Infilling, Pricing

Candidates = Annotated[int, Field(ge=0, le=20)]
Texts = str | list[str]


class GenerateRequest(Continuation):
    """Texts that begin with a prompt, or with nothing."""

    prompt: Texts = ""
    """Words that a text begins with, or a list of such prompts."""
    n: PositiveInt = 1
    """Texts for each prompt."""
    stream: bool = False
    """Send the state after every step as a server-sent event."""
    candidates: Candidates = 0
    """In a stream, how many of the likeliest tokens to show for each position."""


class InfillRequest(Infilling):
    """Texts whose blanks are filled in."""

    text: Texts
    """A text with blanks, or a list of such texts."""
    n: PositiveInt = 1
    """Ways to fill in each text."""
    stream: bool = False
    """Send the state after every step as a server-sent event."""
    candidates: Candidates = 0
    """In a stream, how many of the likeliest tokens to show for each position."""


class ScoreRequest(Pricing):
    """Texts to be priced."""

    text: Texts
    """A text, or a list of texts that are priced one by one."""


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": meaning,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, meaning in {
        400: "A value is wrong; the message says which and why.",
        401: "A token is needed.",
        404: "No such model.",
        413: "The request is too large.",
        429: "Too many requests are waiting; Retry-After says when to try again.",
        500: "A fault of the server.",
        503: "The server is about to stop.",
        504: "The request took too long.",
    }.items()
}
"""What can go wrong on a route that runs the model."""
