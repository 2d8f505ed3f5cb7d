"""What a user holds and what a user imports: moving a model, calling it, pricing a text, and what there is."""

import pytest
import torch

import scorelm
from scorelm import Price, price
from scorelm.errors import InputError


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm()


@pytest.mark.parametrize(
    "convert",
    [
        lambda lm: lm.half(),
        lambda lm: lm.bfloat16(),
        lambda lm: lm.to(torch.bfloat16),
        lambda lm: lm.to("cpu", torch.float16),
        lambda lm: lm.to(device="cpu", dtype=torch.half),
        lambda lm: lm.to(torch.zeros(1, dtype=torch.bfloat16)),
    ],
    ids=["half", "bfloat16", "to-dtype", "to-device-dtype", "to-keywords", "to-tensor"],
)
def test_weights_of_16_bits_are_refused_and_the_error_says_what_to_do(lm, convert):
    before = {name: t.clone() for name, t in lm.state_dict().items()}
    with pytest.raises(InputError, match="precision='bfloat16'"):
        convert(lm)
    assert all(torch.equal(t, before[name]) for name, t in lm.state_dict().items())  # not one of them is converted


@pytest.mark.parametrize("inputs", [(), ("a text",), (torch.zeros(1, 4).long(),)])
def test_calling_a_model_says_what_to_call(lm, inputs):
    with pytest.raises(InputError, match=r"lm\.generate.*lm\.infill.*scorelm\.price"):
        lm(*inputs)


@pytest.mark.parametrize("where", [("cpu",), (torch.device("cpu"),), (torch.float32,), ("cpu", torch.float32)])
def test_a_model_moves_and_is_the_same_model(lm, where):
    before = lm.generate(["the"], steps=3, seed=5)
    assert lm.to(*where) is lm and lm.device.type == "cpu"
    assert lm.generate(["the"], steps=3, seed=5) == before


def test_bfloat16_is_an_option_of_what_is_asked(lm):
    one = price(lm, "and god said let there be light", path="ordered")
    other = price(lm, "and god said let there be light", path="ordered", precision="bfloat16")
    assert one.nats_per_token == pytest.approx(other.nats_per_token, rel=0.05)
    assert one.nats_per_token != other.nats_per_token
    (sample,) = lm.generate(["the"], steps=3, precision="bfloat16")
    assert sample.nfe <= 3


def test_one_text_is_priced_as_a_list_of_one(lm):
    text = "and god said let there be light"
    one, other = price(lm, text), price(lm, [text])
    assert isinstance(one, Price) and one.to_json() == other.to_json()
    assert one.tokens == len(lm.tokenizer.encode(text)) + 2


def test_one_prompt_and_one_text_with_blanks_are_lists_of_one(lm):
    assert lm.generate("the", steps=3) == lm.generate(["the"], steps=3)
    assert lm.infill("god ____ light", steps=3) == lm.infill(["god ____ light"], steps=3)


def test_tab_completion_shows_what_there_is():
    assert dir(scorelm) == ["Pipeline", "Price", "Sample", "ScoreLM", "Tokenizer", "__version__", "price", "train"]
    for name in dir(scorelm):
        assert getattr(scorelm, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        scorelm.nothing  # noqa: B018
