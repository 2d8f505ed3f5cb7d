"""`scorelm.Pipeline`: called as the pipelines of diffusers are, and writing what `ScoreLM.generate` writes."""

import inspect

import pytest
import torch

from scorelm import Pipeline
from scorelm.config.generation import Continuation
from scorelm.errors import InputError
from scorelm.model.directory import EMBEDDED


@pytest.fixture(scope="module")
def pipe(make_lm):
    return Pipeline(make_lm())


def test_it_writes_what_generate_writes(pipe):
    found = pipe(["the day", "and"], num_inference_steps=6, num_texts_per_prompt=2, seed=5, path="uniform")
    assert found.samples == pipe.lm.generate(["the day", "and"], n=2, steps=6, seed=5, path="uniform")
    assert found.texts == [sample.text for sample in found.samples] and len(found.texts) == 4
    assert pipe("the day", seed=5).samples == pipe.lm.generate("the day", seed=5)
    assert pipe("the day", num_texts_per_prompt=0).texts == []


def test_a_generator_draws_the_seed_and_goes_on(pipe):
    generator = torch.Generator().manual_seed(3)
    once, again = (pipe("the", generator=generator).samples for _ in range(2))
    assert once != again
    assert once == pipe("the", generator=torch.Generator().manual_seed(3)).samples
    torch.manual_seed(3)
    assert pipe("the").samples == once
    assert pipe("the").samples == again


def test_the_callback_sees_every_step_and_can_stop(pipe):
    seen = []

    def look(given, step, level, tensors):
        assert given is pipe
        seen.append((step, level, tensors))
        return tensors

    def stop(given, step, level, tensors):
        given._interrupt = step == 2
        return {}

    options = {"path": "uniform", "seed": 5, "num_inference_steps": 6}
    whole = pipe("the day", callback_on_step_end=look, **options).samples[0]
    assert [step for step, *_ in seen] == list(range(6))
    levels = [level for _, level, _ in seen]
    assert levels[0] < 1 and levels == sorted(levels, reverse=True) and levels[-1] == 0
    last = seen[-1][2]
    assert (
        last["ids"].tolist() == [whole.ids] and not last["sigma"].any() and last["entropy"].shape == (1, len(whole.ids))
    )

    stopped = pipe("the day", callback_on_step_end=stop, **options).samples[0]
    assert stopped.nfe == 3 and stopped.ids == seen[2][2]["ids"][0].tolist() != whole.ids
    assert pipe("the day", **options).samples == [whole]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "steps: Input should be greater than 0"),
        ({"steps": 5}, "a pipeline calls steps num_inference_steps"),
        ({"guidance_scale": 2.0}, "no option 'guidance_scale': did you mean guidance?"),
        ({"seed": 1, "generator": torch.Generator()}, "either a seed or a generator"),
        ({"generator": [torch.Generator()]}, "one for all texts, not list"),
        ({"callback_on_step_end": lambda *_: None}, "returns the tensors that it was given"),
        (
            {"callback_on_step_end": lambda *given: {"ids": given[3]["ids"] + 0}},
            "returns the tensors that it was given",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused(pipe, options, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        pipe("the", **options)


def test_it_is_loaded_as_a_model_is_and_shows_its_options():
    pipe = Pipeline.from_pretrained(EMBEDDED)
    assert pipe.to("cpu") is pipe and pipe.lm.device.type == "cpu"
    parameters = inspect.signature(Pipeline.__call__).parameters
    assert parameters["num_inference_steps"].default == Continuation().steps and "top_p" in parameters
    with pytest.raises(InputError, match="nowhere"):
        Pipeline.from_pretrained("nowhere")
