"""``/v1/completions`` and ``/v1/models``, as clients of OpenAI's interface send and read them.

A diffusion model may write the end of a text before its beginning. So a stream commits a token only when all before it
are written; what stands behind that so far travels in the field ``draft`` of a choice, and may still change.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import ConfigDict, Field, PositiveInt
from sse_starlette import ServerSentEvent
from torch import Tensor

from scorelm.config import Options, unknown
from scorelm.config.generation import Continuation, Generation, Infilling, Temperature
from scorelm.errors import InputError
from scorelm.evaluation.price import is_exact
from scorelm.lm import ScoreLM
from scorelm.sampling.denoise import StepRecord
from scorelm.sampling.paths import make_path
from scorelm.sampling.plan import Plan
from scorelm.serving.requests import Desk, error_body, notes_on
from scorelm.serving.schema import ERRORS, Texts
from scorelm.serving.worker import Done, Event, Refusal
from scorelm.text.templates import Draft, Hole, prompt_text

BLANK = "\ue0f0"
"""Sign of the blank before a suffix, a private character of Unicode."""
FURTHER = set(Generation.model_fields) - {"best_of", "choose", "seed"}
"""Options of a generation that OpenAI's interface does not have, or has under the same name."""


class CompletionRequest(Options):
    """A request in OpenAI's form. Further fields are options of a generation, such as path, steps or solver."""

    model_config = ConfigDict(extra="allow")

    model: str
    """Name of the model, as ``/v1/models`` lists it."""
    prompt: Texts = ""
    """Words that a text begins with, or a list of such prompts."""
    suffix: str | None = None
    """Words that follow; what is written then stands between prompt and suffix."""
    max_tokens: PositiveInt | None = None
    """Most tokens to write; with a suffix, the number of tokens to write, by default one to three words."""
    n: PositiveInt = 1
    """Texts for each prompt."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """Seed of the first text; by default another one each time."""
    temperature: Temperature = Continuation.model_fields["temperature"].default
    """Divides the logits."""
    top_p: Annotated[float, Field(gt=0, le=1)] = Continuation.model_fields["top_p"].default
    """Draw from the likeliest tokens that together have this probability only."""
    stream: bool = False
    """Send tokens as server-sent events."""
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    """Give the log-probability of each token when it was drawn, and those of so many likely ones. Only on the paths
    whose prices are exact: bounded, surest, and blocks:1, which then takes one step for each token."""


class Completions:
    """Answers requests to a model in OpenAI's form.

    Args:
        lm: the model.
        name: under which clients know it.
        desk: knows the limits.
    """

    def __init__(self, lm: ScoreLM, name: str, desk: Desk) -> None:
        self.lm, self.name, self.desk = lm, name, desk

    def plan(self, asked: CompletionRequest) -> Plan:
        """The request made ready.

        Raises:
            Refusal: another model is asked for.
            InputError: a bad value, or what does not go together.
        """
        if asked.model != self.name:
            raise Refusal(404, "invalid_request_error", f"there is no such model here, only {self.name}")
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        if not 0 < len(prompts) * asked.n <= self.desk.limits.most_texts:
            raise InputError(f"ask for 1 to {self.desk.limits.most_texts:,} texts, not {len(prompts) * asked.n:,}")
        plans = [
            self.desk.plan(
                self.lm, self._text(asked, prompt), asked.n, self._request(asked, prompt, seed + i * asked.n)
            )
            for i, prompt in enumerate(prompts)
        ]
        joined = replace(
            plans[0], drafts=[d for plan in plans for d in plan.drafts], seeds=[s for plan in plans for s in plan.seeds]
        )
        return joined if asked.logprobs is None else joined.recording(max(1, asked.logprobs))

    def _text(self, asked: CompletionRequest, prompt: str) -> str:
        if asked.suffix is None:
            return prompt
        if BLANK in prompt + asked.suffix or prompt.endswith("\\"):
            raise InputError(
                f"with a suffix, no text may have the character U+{ord(BLANK):X}, or a backslash at its end"
            )
        return f"{prompt}{BLANK}{asked.suffix}"

    def notes(self, asked: CompletionRequest) -> list[str]:
        """What is read otherwise than it was typed."""
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        texts = [self._text(asked, prompt) for prompt in prompts]
        return notes_on(texts, self.lm.tokenizer, None if asked.suffix is None else BLANK)

    def _request(self, asked: CompletionRequest, prompt: str, seed: int) -> Continuation | Infilling:
        further = asked.model_extra or {}
        for option in further:
            if option not in FURTHER:
                raise InputError(unknown(option, sorted(FURTHER)))
        options = {"temperature": asked.temperature, "top_p": asked.top_p, **further, "seed": seed}
        request: Continuation | Infilling
        if asked.suffix is None:
            request = Continuation.of(**options)
        else:
            request = Infilling.of(blank=BLANK, blank_tokens=asked.max_tokens, **options)
        path = request.path or self.lm.default_path(request)
        in_order = make_path(path).block == 1
        if asked.logprobs is not None:
            if in_order:
                request = request.model_copy(update={"path": path, "steps": 1})
            elif not is_exact(path):
                raise InputError(f"tokens have no log-probability of their own on {path}: use bounded or blocks:1")
        if asked.suffix is None and asked.max_tokens is not None:
            given = 1 + len(self.lm.tokenizer.encode(prompt_text(prompt, self.lm.tokenizer)))
            most = min(given + asked.max_tokens + (not in_order), self.lm.max_length)
            request = request.model_copy(update={"max_length": most})
        return request

    def body(self, number: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An answer, or a part of one in a stream."""
        made = int(time.time())
        return {
            "id": number, "object": "text_completion", "created": made, "model": self.name, "choices": choices, **more,
        }  # fmt: skip

    def whole(self, number: str, texts: list[Text], notes: list[str]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        written = sum(text.stop - text.start for text in texts)
        given = sum(len(text.ids) for text in texts) - written
        usage = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
        choices = [text.choice(k, text.rest()) for k, text in enumerate(texts)]
        return self.body(number, choices, usage=usage, notes=notes)


class Text:
    """A text on its way to a client: what is committed of it, and the log-probabilities of its tokens.

    Args:
        lm: the model.
        draft: what was given.
        logprobs: how many likely tokens to name beside each token; None for no log-probabilities at all.
        held: whether nothing is committed before the end, since finished tokens may be taken back.
    """

    def __init__(self, lm: ScoreLM, draft: Draft, logprobs: int | None, held: bool) -> None:
        self.lm, self.logprobs = lm, logprobs
        self.held = held
        template = draft.template
        free = [k for k, token in enumerate(template) if not isinstance(token, int)]
        self.start = free[0] if free else len(template)
        self.stop = free[-1] + 1 if free else len(template)
        self.before = lm.tokenizer.decode([t for t in template[: self.start] if isinstance(t, int)])
        self.spaced = bool(free) and template[free[0]] in (Hole.SPACE, Hole.WORD)
        if draft.given and not draft.given[0]:
            self.spaced = False
        self.ids: list[int] = []
        self.done = self.start
        """Tokens before this place are finished, and so are all before them."""
        self.sent = 0
        self.told = self.start
        self.chosen: dict[int, tuple[float, dict[str, float]]] = {}

    def read(self, record: StepRecord, row: int) -> None:
        """Take in the state after a step."""
        length = int(record.length_B[row])
        self.ids = record.ids_BL[row, :length].tolist()
        finished = (record.sigma_BL[row, :length] == 0).tolist()
        self.stop = min(self.stop, length)
        while self.done < self.stop and finished[self.done] and not self.held:
            self.done += 1
        if record.candidates is not None:
            for k in range(self.start, self.stop):
                if finished[k] and k not in self.chosen:
                    self.chosen[k] = self._chosen(record, row, k)

    def _chosen(self, record: StepRecord, row: int, k: int) -> tuple[float, dict[str, float]]:
        found = record.candidates
        assert found is not None

        def values(t: Tensor) -> Any:
            return t[row, k].tolist()

        pairs = zip(values(found.ids_BLK), values(found.probability_BLK.log()), strict=True)
        named = {self._spell(token): value for token, value in pairs if value > -float("inf")}
        return values(found.logprob_BL), dict(list(named.items())[: self.logprobs])

    def _spell(self, token: int) -> str:
        return self.lm.tokenizer.pieces([token])[0].replace("▁", " ")

    def _decode(self, end: int) -> str:
        """What stands from the first free position to `end`."""
        text = self.lm.tokenizer.decode(self.ids[:end])[len(self.before) :]
        return text.removeprefix(" ") if self.spaced else text

    def more(self) -> str:
        """What has been committed since the last call; half a character is held back."""
        committed = self._decode(self.done)
        if committed.endswith("\ufffd") and self.done < self.stop:
            return ""
        new, self.sent = committed[self.sent :], len(committed)
        return new

    def rest(self) -> str:
        """All that has not been sent, at the end."""
        self.done = self.stop
        return self.more()

    def draft(self) -> str:
        """What stands behind the committed text so far."""
        return self._decode(self.stop)[self.sent :]

    def choice(self, index: int, new: str, finished: bool = True) -> dict[str, Any]:
        """A choice of an answer, or of a part of one."""
        ended = bool(self.ids) and self.ids[-1] == self.lm.tokenizer.special.eos
        return {
            "index": index,
            "text": new,
            "logprobs": None if self.logprobs is None else self._logprobs(),
            "finish_reason": None if not finished else "stop" if ended else "length",
        }

    def _logprobs(self) -> dict[str, Any]:
        """Of the tokens that were committed since the last call."""
        places = [k for k in range(self.told, self.done) if k in self.chosen]
        self.told = self.done
        return {
            "tokens": [self._spell(self.ids[k]) for k in places],
            "token_logprobs": [self.chosen[k][0] for k in places],
            "top_logprobs": [self.chosen[k][1] for k in places],
            "text_offset": [len(self._decode(k)) for k in places],
        }


def add(app: FastAPI, lm: ScoreLM, desk: Desk, name: str) -> None:
    """The routes of OpenAI's interface."""
    service = Completions(lm, name, desk)

    @app.post("/v1/completions", responses=ERRORS)
    async def complete(request: Request, asked: CompletionRequest) -> Any:
        """Write texts, as OpenAI's clients ask for them."""
        plan = await asyncio.to_thread(service.plan, asked)
        notes = await asyncio.to_thread(service.notes, asked)
        texts = [Text(lm, draft, asked.logprobs, plan.settings.path.forgets) for draft in plan.drafts]
        number = f"cmpl-{secrets.token_hex(12)}"

        def watch(record: StepRecord) -> None:
            for row, text in enumerate(texts):
                text.read(record, row)

        def tell(seen: Event) -> Iterator[ServerSentEvent]:
            choices: list[dict[str, Any]] = []
            more = {"notes": notes} if isinstance(seen, Done) else {}
            match seen:
                case StepRecord():
                    watch(seen)
                    for row, text in enumerate(texts):
                        choices.append(text.choice(row, text.more(), finished=False) | {"draft": text.draft()})
                case Done():
                    choices = [text.choice(row, text.rest()) for row, text in enumerate(texts)]
                case Refusal():
                    yield ServerSentEvent(json.dumps(error_body(str(seen), seen.kind)))
            if choices:
                yield ServerSentEvent(json.dumps(service.body(number, choices, **more), ensure_ascii=False))
            if isinstance(seen, Done):
                yield ServerSentEvent("[DONE]")

        if asked.stream:
            return desk.stream(plan, tell)
        await desk.answer(request, plan, watch)
        return service.whole(number, texts, notes)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "scorelm"}]}
