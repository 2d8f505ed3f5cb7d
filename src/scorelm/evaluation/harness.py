"""Models of this library in lm-eval, the harness that public benchmarks of language models are run with.

lm-eval has no way to find models in other packages, so its command is started through this module; all of its options
are the same::

    python -m scorelm.evaluation.harness --model scorelm --model_args pretrained=runs/kjv --tasks lambada_openai
    python -m scorelm.evaluation.harness --model scorelm --model_args pretrained=runs/kjv,path=bounded --tasks arc_easy
    python -m scorelm.evaluation.harness --model scorelm --tasks mine --include_path tasks --gen_kwargs path=bounded

From Python, after this module is imported, ``lm_eval.simple_evaluate(model="scorelm", model_args="pretrained=runs/kjv",
tasks=[...])`` finds the model too; or ``model=Harness("runs/kjv")``.

What a continuation costs is conditional on its context: only its tokens are priced, and those of the context are given,
on any path. Left to right (the default) that is exact, the difference of the prices of two texts. On a path that knows
the length of a text, so many tokens are priced as there are, and no length term is added. A whole text
(``loglikelihood_rolling``) is priced as ``scorelm score`` does it, its end and its length included.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorelm.config.generation import Continuation, Pricing
from scorelm.device import pick_device
from scorelm.errors import InputError
from scorelm.evaluation.likelihood import are_likeliest
from scorelm.evaluation.price import price, pricing
from scorelm.evaluation.rows import RowBatch, batches, most_positions
from scorelm.lm import ScoreLM
from scorelm.sampling.request import Settings
from scorelm.text.templates import prompt_text

MOST_TOKENS = 256
"""Tokens that are written where a task does not say how many, as everywhere in lm-eval."""

try:
    LM: Any = import_module("lm_eval.api.model").LM
except ImportError:  # the module can be imported without the extra, like every other
    LM = object


class Harness(LM):  # type: ignore[misc]
    """A model as lm-eval asks for it.

    Args:
        pretrained: a model directory, the directory of a run, or a name on the hub; see `ScoreLM.from_pretrained`.
        path: what a text's likelihood is taken along, as for `scorelm.price`; by default ordered, or the path that a
            model is priced on which does not write left to right.
        device: where to compute; auto takes a GPU if there is one.
        batch_size: nothing; batches have as many rows as memory has room for.
        max_batch_size: nothing.
        **options: the other options of `scorelm.price`: steps, draws, seed, precision, lossy.

    Raises:
        InputError: lm-eval is not installed, no such model, or an option that it does not take.
    """

    def __init__(
        self,
        pretrained: str | Path | None = None,
        path: str | None = None,
        device: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        **options: Any,
    ) -> None:
        if LM is object:
            raise InputError("lm-eval is not installed: pip install 'scorelm[harness]'")
        super().__init__()
        self.lm = ScoreLM.from_pretrained(pretrained).to(pick_device(device or "auto"))
        objective, self.orders = self.lm.objective, True
        try:
            objective.allows_price("ordered", None)
        except InputError:
            self.orders = False
        self.writing = {"path": "blocks:1", "steps": 1} if self.orders else {"path": objective.default_path}
        path = path or ("ordered" if self.orders else objective.priced_path)
        self.pricing = Pricing.of(path=path, **options)
        self.method, _ = pricing(self.lm, path, self.pricing)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, and whether it is what would be written greedily.

        Args:
            requests: whose `args` are a context, which may be empty, and a continuation.
        """
        rows, given, owner = list[list[int]](), list[int](), list[int]()
        for number, request in enumerate(requests):
            for row, known in windows(*self._encode(*request.args), self.lm.max_length):
                rows.append(row)
                given.append(known)
                owner.append(number)
        lm, nats, greedy = self.lm, [0.0] * len(requests), [True] * len(requests)
        positions = most_positions(lm.tokenizer.vocab_size, lm.device)
        for batch in batches(rows, lm.device, lm.tokenizer.special, positions, given):
            with torch.inference_mode():
                nats_B = torch.stack(list(self.method(batch).terms.values())).sum(0)
                likeliest_B = self._are_likeliest(batch)
            for place, cost, likeliest in zip(batch.index, nats_B.tolist(), likeliest_B.tolist(), strict=True):
                nats[owner[place]] += cost
                greedy[owner[place]] &= likeliest
        return [(-cost, likeliest) for cost, likeliest in zip(nats, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text, its end included.

        Args:
            requests: whose `args` are a text.

        Raises:
            InputError: a text that the tokenizer cannot spell (unless lossy).
        """
        found = price(self.lm, [request.args[0] for request in requests], **self.pricing.model_dump())
        assert found.by_text is not None
        return [-nats for nats in found.by_text.tolist()]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What follows each context, up to the first of its stop strings, or to as many tokens as it asks for.

        Args:
            requests: whose `args` are a context, and a mapping with ``until`` (stop strings), ``max_gen_toks``,
                ``do_sample`` (without it the likeliest tokens are written) and any option of `ScoreLM.generate`.

        Raises:
            InputError: an option that there is not.
        """
        written: list[str] = [""] * len(requests)
        asked = sorted((json.dumps(request.args[1], sort_keys=True), k) for k, request in enumerate(requests))
        for how, group in groupby(asked, key=lambda pair: pair[0]):
            places = [k for _, k in group]
            texts = self._continue([requests[k].args[0] for k in places], json.loads(how))
            for place, text in zip(places, texts, strict=True):
                written[place] = text
        return written

    def _encode(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Token ids of both after ``<s>``, and how many of them are given.

        They are those of the whole text if these begin with those of the context; spaces at the end of the context
        belong to the continuation.
        """
        tokenizer, stripped = self.lm.tokenizer, context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        before, whole = tokenizer.encode(stripped), tokenizer.encode(stripped + continuation)
        if whole[: len(before)] != before or len(whole) == len(before):
            whole = before + tokenizer.encode_inside(continuation)
        return [tokenizer.special.bos, *whole], 1 + len(before)

    def _are_likeliest(self, batch: RowBatch) -> Tensor:
        """Whether each row has what would be written behind what is given at temperature 0, [B] bool."""
        lm, loop = self.lm, self.lm.loop(self.pricing.precision)
        if self.orders:
            return are_likeliest(lm.objective, loop.network, batch)
        how = Continuation.of(**self.writing, temperature=0, precision=self.pricing.precision)
        job = loop.join(batch.templates(closed=True), [0] * len(batch.index), lm.objective.allows(Settings.of(how)))
        job.state.rows.closed_B.fill_(True)  # it is known how long the row is
        while not job.finished:
            loop.step()
        return (job.state.ids_BL == batch.ids_BL).all(1)

    def _continue(self, contexts: Sequence[str], how: dict[str, Any]) -> list[str]:
        """What follows each context, all of them with the same options."""
        stops, most = how.pop("until", None) or [], how.pop("max_gen_toks", MOST_TOKENS)
        if not how.pop("do_sample", False):
            how["temperature"] = 0
        options = ({} if "path" in how else self.writing) | {"precision": self.pricing.precision, "top_p": 1} | how
        longest = None
        if not Settings.of(Continuation.of(**options)).path.block:  # no other path can go beyond the model's rows
            longest = self.lm.max_length
            contexts = [self._last(text, longest - min(most, longest // 2)) for text in contexts]
        heads = [self._head(text) for text in contexts]
        longest = longest or max(map(len, heads)) + most
        samples = self.lm.generate(contexts, max_length=longest, **options)
        texts = []
        for text, head, sample in zip(contexts, heads, samples, strict=True):
            behind = self.lm.tokenizer.decode(sample.ids[: len(head) + most])
            behind = behind[len(self.lm.tokenizer.decode(head)) :]
            behind = behind if prompt_text(text, self.lm.tokenizer) == text else behind.removeprefix(" ")
            texts.append(min((behind.partition(stop)[0] for stop in listed(stops) if stop), key=len, default=behind))
        return texts

    def _head(self, context: str) -> list[int]:
        """Token ids of a context as `ScoreLM.generate` begins a text with it."""
        return [self.lm.tokenizer.special.bos, *self.lm.tokenizer.encode(prompt_text(context, self.lm.tokenizer))]

    def _last(self, context: str, most: int) -> str:
        """The end of a context that takes less than so many tokens."""
        head = self._head(context)
        return context if len(head) < most else self.lm.tokenizer.decode(head[max(1, len(head) - most + 2) :])


def listed(stops: str | list[str]) -> list[str]:
    """One stop string or several, as a list."""
    return [stops] if isinstance(stops, str) else stops


def windows(ids: list[int], given: int, most: int) -> Iterator[tuple[list[int], int]]:
    """Rows in which every token from `given` on is priced once, and how many tokens of each row are given.

    Where not all fits in a row of `most` tokens, each row begins as early as it can: at least half of it is given.
    """
    begin = given
    while begin < len(ids):
        end = min(len(ids), max(most, begin + most // 2))
        start = max(0, end - most)
        yield ids[start:end], begin - start
        begin = end


if LM is not object:
    import_module("lm_eval.api.registry").register_model("scorelm")(Harness)

if __name__ == "__main__":
    if LM is object:
        sys.exit("scorelm: lm-eval is not installed: pip install 'scorelm[harness]'")
    import_module("lm_eval.__main__").cli_evaluate()
