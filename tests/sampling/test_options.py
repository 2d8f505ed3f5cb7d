"""Options of a request: every one of them does something, says what it does, and is refused where it makes no sense."""

import inspect
import pydoc

import pytest

from scorelm.config.generation import Continuation, Generation, Infilling, Pricing
from scorelm.errors import InputError
from scorelm.evaluation.price import price
from scorelm.sampling.halting import CRITERIA, make_halting
from scorelm.sampling.paths import PATHS, make_path
from scorelm.sampling.request import Settings
from scorelm.sampling.solvers import SOLVERS, make_solver

# By option: a value that changes what is written, other options that both calls have, and values that are refused.
SHARED = {
    "steps": (3, {"path": "uniform"}, [0, -1, 1.5]),
    "path": ("blocks:1", {}, ["sideways", "uniform:1", "blocks:0", "blocks:inf"]),
    "nats_per_step": (9.0, {"path": "confidence"}, [0.0, -1.0, float("inf")]),
    "solver": ("renoise", {"path": "uniform"}, ["simpson", "ancestral:2", ""]),
    "temperature": (0.2, {}, [-1.0, float("nan")]),
    "top_k": (1, {}, [-1, 0.5]),
    "top_p": (0.1, {}, [0.0, 1.5]),
    "guidance": (4.0, {}, [-1.0, float("inf")]),
    "self_guidance": (4.0, {"path": "uniform"}, [-1.0]),
    "score_temperature": (5.0, {"path": "uniform", "solver": "heun"}, [0.0]),
    "halt": ("entropy:2.5", {"path": "uniform"}, ["boredom", "entropy:-1"]),
    "best_of": (3, {}, [0, -1]),
    "choose": ("vote", {"path": "uniform", "best_of": 4, "top_k": 2, "n": 16}, ["coin"]),
    "precision": ("bfloat16", {"path": "uniform"}, ["float8"]),
    "seed": (7, {}, [-1, 2**63, "x"]),
}
CONTINUATION = SHARED | {"length": (9, {}, [-1, 0, 1000]), "max_length": (7, {"path": "blocks:1"}, [0, -3])}
INFILLING = SHARED | {
    "choose": ("vote", {"path": "uniform", "best_of": 4, "top_k": 2, "n": 16, "blank_tokens": 5}, ["coin"]),
    "blank": (" ____", {}, [""]),
    "blank_tokens": (5, {}, [0, -1, 1000]),
    "blank_words": (2, {}, [0, -1, 1000]),
    "repair": (0.9, {}, [0.0, 1.0, -1]),
}


@pytest.fixture(scope="module")
def requests(lm):
    """What makes a request of each kind, and the cases of its options."""
    return {
        Continuation: (lambda **options: lm.generate(["the day"], **{"n": 2} | options), CONTINUATION),
        Infilling: (lambda **options: lm.infill("god ____ day", **{"n": 2} | options), INFILLING),
    }


def everything(call, **options):
    """Texts, evaluations and all that is shown on the way."""
    shown = []
    samples = call(**{"steps": 6} | options, watch=lambda record: shown.append(record.entropy_BL.tolist()))
    return [(one.ids, one.nfe, one.seed) for one in samples], shown


@pytest.mark.parametrize("kind", [Continuation, Infilling])
def test_every_option_changes_what_is_written_or_is_refused(requests, kind):
    call, cases = requests[kind]
    assert set(cases) == set(kind.model_fields)
    plain = {}
    for name, (value, others, bad) in cases.items():
        key = tuple(others.items())
        if key not in plain:
            plain[key] = everything(call, **others)
        assert everything(call, **others, **{name: value}) != plain[key], name
        for wrong in bad:
            with pytest.raises(InputError) as error:
                call(**others, **{name: wrong})
            assert "\n" not in str(error.value) and len(str(error.value)) < 240, (name, wrong)


def test_a_default_that_is_written_out_changes_nothing(requests):
    for kind, (call, cases) in requests.items():
        fields = kind.model_fields
        written = {name: fields[name].default for name in cases if name != "steps"}
        assert everything(call, **written) == everything(call)


def test_every_option_of_a_price_changes_it_or_is_refused(lm):
    cases = {
        "path": ("ordered", {}, ["sideways", "remask:0.1", "blocks:0"]),
        "steps": (3, {}, [0, -1]),
        "draws": (2, {}, [0]),
        "seed": (7, {}, [-1, 2**63]),
        "precision": ("bfloat16", {}, ["float8"]),
    }
    assert {*cases, "lossy"} == set(Pricing.model_fields)  # lossy: tests/evaluation/test_lossy.py

    def nats(**options):
        return price(lm, ["the light", "day"], **{"draws": 3} | options).nats_per_token

    for name, (value, others, bad) in cases.items():
        assert nats(**others, **{name: value}) != nats(**others), name
        for wrong in bad:
            with pytest.raises(InputError):
                nats(**others, **{name: wrong})


@pytest.mark.parametrize(
    "options",
    [
        {"path": "uniform", "nats_per_step": 1.0},
        {"path": "bounded", "solver": "posterior", "score_temperature": 2.0},
        {"path": "uniform", "max_length": 99},
        {"path": "blocks:2", "guidance": 2.0, "max_length": 99},
        {"path": "blocks:40", "max_length": 99},
        {"n": -1},
    ],
)
def test_options_that_do_not_go_together_are_refused(lm, options):
    with pytest.raises(InputError) as error:
        lm.generate(["the"], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("tempreature", "temperature"), ("step", "steps"), ("topk", "top_k"), ("self_guidence", "self_guidance"),
     ("max_lenght", "max_length")],
)  # fmt: skip
def test_an_unknown_option_is_refused_with_the_nearest_right_name(lm, wrong, right):
    with pytest.raises(InputError, match=f"no option '{wrong}': did you mean {right}\\?"):
        lm.generate(["the"], **{wrong: 1})


def test_an_option_that_is_like_no_other_is_refused_with_all_of_them(lm):
    with pytest.raises(InputError, match="choose steps, path") as error:
        lm.infill("the ____", zzz=1)
    assert "\n" not in str(error.value) and "repair" in str(error.value)
    with pytest.raises(InputError, match="blank_tokens"):
        lm.generate(["the"], blank_tokens=2)  # of another request


@pytest.mark.parametrize("kind", [Continuation, Infilling, Pricing])
def test_help_shows_every_option_with_its_meaning(lm, kind):
    function = {Continuation: lm.generate, Infilling: lm.infill, Pricing: price}[kind]
    parameters, shown = inspect.signature(function).parameters, pydoc.render_doc(function)
    for name, field in kind.model_fields.items():
        meaning = " ".join(field.description.split())
        assert meaning.endswith(".") and f"{name}: {meaning}" in function.__doc__ and meaning in " ".join(shown.split())
        assert name in parameters and parameters[name].default == field.default
        assert parameters[name].annotation is not inspect.Parameter.empty
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(("registry", "make"), [(PATHS, make_path), (SOLVERS, make_solver), (CRITERIA, make_halting)])
def test_everything_that_can_be_named_says_what_it_is(registry, make):
    """The first line of its docstring is its help; its numbers can be left out."""
    for name, entry in registry.items():
        first, *rest = inspect.getdoc(entry).splitlines()
        assert first.endswith(".") and len(first) < 120 and (not rest or not rest[0]), name
        assert all(p.default is not p.empty for p in inspect.signature(entry).parameters.values()), name
        assert make(name) is not None
        with pytest.raises(InputError, match=name):
            make(f"{name}:1,2,3,4,5")


def test_a_request_is_read_before_there_is_a_model():
    settings = Settings.of(Infilling.of(path="ramp:0.5", solver="heun", steps=7, halt="kl:0.1"))
    assert (str(settings.path), settings.solver.name, settings.halting.name) == ("ramp:0.5", "heun", "kl:0.1")
    assert settings.path_steps == 4 and settings.repair is None and settings.window == 0
    assert str(Settings.of(Generation.of(), "blocks:1").path) == "blocks:1"
    with pytest.raises(InputError):
        Settings.of(Generation.of(path="sideways"))
