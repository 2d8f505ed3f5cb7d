"""OpenAI's interface, through OpenAI's own client."""

import openai
import pytest

from scorelm import price
from scorelm.evaluation.rows import CutTexts


@pytest.fixture(scope="module")
def api(client):
    return openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


def complete(api, **options):
    return api.completions.create(model="small", **({"prompt": "and god said", "seed": 4} | options))


def test_the_model_is_listed(api):
    assert [model.id for model in api.models.list()] == ["small"]


@pytest.mark.parametrize("path", ["bounded", "blocks:1", "uniform"])
def test_texts_are_those_of_the_library_without_the_prompt(api, lm, path):
    found = complete(api, n=3, temperature=0.8, extra_body={"path": path, "steps": 6})
    samples = lm.generate("and god said", 3, seed=4, temperature=0.8, path=path, steps=6)
    assert ["and god said" + choice.text for choice in found.choices] == [sample.text for sample in samples]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    ends = {choice.finish_reason == "stop" for choice in found.choices}
    assert ends == {sample.ids[-1] == lm.tokenizer.special.eos for sample in samples}
    prompt = 1 + len(lm.tokenizer.encode("and god said"))
    assert found.usage.prompt_tokens >= 3 * prompt
    assert found.usage.total_tokens == sum(len(sample.ids) for sample in samples)


def test_several_prompts_have_seeds_of_their_own(api, lm):
    found = complete(api, prompt=["and", "in the"], n=2)
    expected = [*lm.generate("and", 2, seed=4), *lm.generate("in the", 2, seed=6)]
    given = ["and", "and", "in the", "in the"]
    assert [p + choice.text for p, choice in zip(given, found.choices, strict=True)] == [s.text for s in expected]


@pytest.mark.parametrize("path", ["bounded", "blocks:1"])
def test_no_more_tokens_than_asked_for(api, lm, path):
    for most in (1, 3, 9):
        for choice in complete(api, n=8, max_tokens=most, extra_body={"path": path}).choices:
            assert len(lm.tokenizer.encode_inside(choice.text)) <= most


def test_a_suffix_follows(api, lm):
    found = complete(api, prompt="let there be ", suffix=" in the night", max_tokens=2)
    (sample,) = lm.infill("let there be ____ in the night", blank_tokens=2, seed=4)
    assert found.choices[0].text == sample.text[slice(*sample.spans[0])]
    assert found.usage.completion_tokens == 2
    assert complete(api, prompt="a ____ b ", suffix=" c", max_tokens=1).choices[0].text


def test_says_what_is_read_otherwise_than_it_was_typed(api):
    (said,) = complete(api, prompt="and GOD said", suffix=" in").notes
    assert said == "the model reads 'and  ⁇  said ____ in' for 'and GOD said____ in'"
    *_, last = complete(api, prompt="and GOD", stream=True, extra_body={"steps": 2})
    assert last.notes == ["the model reads 'and  ⁇' for 'and GOD'"]
    assert complete(api).notes == []


def test_another_seed_each_time_where_none_is_given(api):
    options = {"seed": None, "max_tokens": 12}
    assert len({complete(api, **options).choices[0].text for _ in range(6)}) > 1


@pytest.mark.parametrize("path", ["bounded", "blocks:1", "uniform", "remask:0.3"])
@pytest.mark.parametrize("prompt", ["and god said", "and god said ", ""])
def test_what_a_stream_commits_is_never_taken_back(api, path, prompt):
    options = {"prompt": prompt, "n": 2, "extra_body": {"path": path, "steps": 8}}
    whole, sent, drafts = complete(api, **options), ["", ""], set()
    for chunk in complete(api, stream=True, **options):
        for choice in chunk.choices:
            sent[choice.index] += choice.text
            if choice.finish_reason is None:
                drafts.add(sent[choice.index] + choice.draft)
    assert sent == [choice.text for choice in whole.choices]
    assert len(drafts) > 2


def paid(lm, path: str, steps: int, term: str) -> float:
    """Nats of the very tokens that the server writes with seed 4; read again, their text may have others."""
    (sample,) = lm.generate(path=path, steps=steps, seed=4, temperature=1, top_p=1)
    found = price(lm, CutTexts([sample.ids], [0], [len(sample.text)], [0]), path, steps=steps)
    return found.terms[term] * found.tokens


def test_log_probabilities_are_the_price(api, lm):
    """On exact paths those of the tokens sum to minus the price of the very sampler, the length apart."""
    found = complete(api, prompt="", logprobs=2, temperature=1, top_p=1, extra_body={"path": "bounded", "steps": 9})
    (choice,) = found.choices
    told = choice.logprobs
    assert choice.text == "".join(told.tokens).removeprefix(" ")
    assert -sum(told.token_logprobs) == pytest.approx(paid(lm, "bounded", 9, "reconstruction"), rel=1e-4)
    for value, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2 and max(top.values()) >= value - 1e-5
    assert told.text_offset[0] == 0 and sorted(told.text_offset) == told.text_offset
    streamed = list(
        complete(
            api, prompt="", logprobs=2, temperature=1, top_p=1, stream=True, extra_body={"path": "bounded", "steps": 9}
        )
    )
    parts = [part.choices[0].logprobs for part in streamed]
    assert [value for part in parts for value in part.token_logprobs] == pytest.approx(told.token_logprobs)


def test_log_probabilities_left_to_right(api, lm):
    asked = {"prompt": "", "logprobs": 0, "temperature": 1, "top_p": 1}
    found = complete(api, **asked).choices[0]
    for path in ("blocks:1", "blocks:1.0"):
        assert complete(api, **asked, extra_body={"path": path}).choices[0] == found
    assert -sum(found.logprobs.token_logprobs) == pytest.approx(paid(lm, "blocks:1", 1, "reconstruction"), rel=1e-4)
    assert found.logprobs.top_logprobs == [{}] * len(found.logprobs.tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra_body": {"path": "uniform"}, "logprobs": 1}, "no log-probability of their own on uniform"),
        ({"extra_body": {"stpes": 3}}, "no option 'stpes': did you mean steps?"),
        ({"stop": ["."]}, "no option 'stop'"),
        ({"best_of": 3}, "no option 'best_of'"),
        ({"prompt": []}, "ask for 1 to 64 texts, not 0"),
        ({"n": 10**15}, "ask for 1 to 64 texts"),
        ({"suffix": "x", "prompt": "\\"}, "a backslash at its end"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_is_not_offered_is_refused_in_words(api, options, words):
    with pytest.raises(openai.BadRequestError, match=words):
        complete(api, **options)


def test_another_model_is_not_found(api):
    with pytest.raises(openai.NotFoundError, match="only small"):
        api.completions.create(model="../../etc/passwd", prompt="")
