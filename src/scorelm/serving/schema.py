"""What a request may say: the options of `scorelm.config.generation`, and what only a request over the network has."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, PositiveInt

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


class Trouble(BaseModel):
    """What went wrong."""

    message: str
    """In a sentence, for people."""
    type: str
    """In a word, for programs."""


class Problem(BaseModel):
    """The answer to a request that could not be answered."""

    error: Trouble


ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {
        "model": Problem,
        "description": "400: a value is wrong. 401: a token is needed. 403: another site. 404: no such model. "
        "408: the request came too slowly. 413: it is too large. 429 and 503: come back after Retry-After seconds. "
        "504: it took too long. 500: a fault of the server.",
    }
}
"""What can go wrong on a route that runs the model."""
