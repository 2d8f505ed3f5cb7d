"""Continuations priced given their context, and the models of this library in lm-eval."""

import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from scorelm import ScoreLM, price
from scorelm.errors import InputError
from scorelm.evaluation import harness
from scorelm.evaluation.harness import Harness, windows
from scorelm.evaluation.likelihood import bound, left_to_right, random_order, right_to_left
from scorelm.evaluation.rows import CutTexts, batches
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.evaluator import Network
from scorelm.sampling.paths import make_path

from ..conftest import SPECIAL
from .exact import EVERYTHING, F64, SCHEDULE, Exact, make_law, total

# --- what is given has no price ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def law():
    """Texts of two or three tokens out of three."""
    return make_law(tokens=3, lengths=(2, 3))


@pytest.fixture(scope="module")
def split(law):
    """Every text of the law, cut at every place: the batch, its rows' texts, and how many tokens of them are given."""
    pairs = [(m, k) for m, text in enumerate(law.texts) for k in range(1, len(text) - 1)]
    rows, given = [law.texts[m] for m, _ in pairs], [k for _, k in pairs]
    (batch,) = batches(rows, torch.device("cpu"), SPECIAL, EVERYTHING, given)
    return batch, [pairs[i] for i in batch.index]


def nats_given(law, pairs, closed):
    """-log p of the rest of each text given its beginning and, if it is closed, its length: [B]."""
    found = []
    for m, k in pairs:
        alike = [
            float(p)
            for text, p in zip(law.texts, law.p_M, strict=True)
            if text[:k] == law.texts[m][:k] and (len(text) == len(law.texts[m]) or not closed)
        ]
        found.append(-math.log(float(law.p_M[m]) / sum(alike)))
    return torch.tensor(found, dtype=F64)


@pytest.mark.parametrize("way", ["ordered", "reverse", "bounded", "surest"])
def test_a_continuation_costs_what_its_law_says_given_the_context(law, split, way, cost, no_grad):
    batch, pairs = split
    network = Network(Exact(law), SPECIAL)
    match way:
        case "ordered":
            priced = left_to_right(OBJECTIVES["score"], network, batch)
        case "reverse":
            priced = right_to_left(network, batch, 1)
        case _:
            priced = cost(network.denoiser, batch, way, 9)
    expected_B = nats_given(law, pairs, closed=way != "ordered")
    torch.testing.assert_close(total(priced), expected_B, atol=2e-5, rtol=0)
    assert torch.equal(batch.free(True).sum(1), torch.tensor([len(law.texts[m]) - 1 - k for m, k in pairs]))


@pytest.mark.parametrize("way", ["random", pytest.param("uniform", marks=pytest.mark.thorough)])
def test_a_bound_of_a_continuation_is_one_given_the_context(law, split, way, no_grad):
    """By the law's own posterior an order costs what it must on average, and the bound a little more at most."""
    batch, pairs = split
    network, expected_B = Network(Exact(law), SPECIAL), nats_given(law, pairs, closed=True)
    if way == "random":
        priced, most = random_order(network, batch, 100, 0, 1), 0.03
    else:
        priced, most = bound(network, SCHEDULE, batch, make_path(way), 400, 0, 1), 0.1
    weight_B = law.p_M[torch.tensor([m for m, _ in pairs])]
    more = float(((total(priced) - expected_B) * weight_B).sum() / weight_B.sum())
    assert -0.03 < more < most


def test_every_token_of_a_continuation_is_priced_once_behind_half_a_row():
    for length, given, most in ((9, 1, 10), (10, 4, 10), (30, 1, 10), (30, 25, 10), (31, 12, 7), (12, 11, 10)):
        ids, priced = list(range(length)), []
        for row, known in windows(ids, given, most):
            assert len(row) <= most and 0 < known < len(row) and row == ids[row[0] : row[-1] + 1]
            assert row[0] == 0 or known >= most // 2
            priced += row[known:]
        assert priced == ids[given:]


# --- lm-eval ----------------------------------------------------------------------------------------------------------

CONTEXT, RIGHT, WRONG = "and the earth was", " without form and void", " the darkness"


@pytest.fixture(scope="module")
def saved(make_lm, tmp_path_factory):
    """Directories of a small model of each kind."""
    pytest.importorskip("lm_eval")
    found = {}
    for objective in OBJECTIVES:
        found[objective] = tmp_path_factory.mktemp("models") / objective
        make_lm(objective).save_pretrained(found[objective])
    return found


def ask(*args):
    return SimpleNamespace(args=args)


def nats(lm, ids):
    """What a row of tokens costs left to right."""
    return float(price(lm, CutTexts([ids], [0], [1], [0]), "ordered").by_text[0])


@pytest.mark.parametrize("objective", ["score", "autoregressive"])
def test_left_to_right_it_is_the_difference_of_two_prices(saved, objective):
    model = Harness(saved[objective], device="cpu")
    tokenizer = model.lm.tokenizer
    before, whole = ([0, *tokenizer.encode(text)] for text in (CONTEXT, CONTEXT + RIGHT))
    assert whole[: len(before)] == before
    expected = nats(model.lm, before) - nats(model.lm, whole)
    found = model.loglikelihood([ask(CONTEXT, RIGHT), ask(CONTEXT + " ", RIGHT[1:]), ask("", CONTEXT)])
    assert [one for one, _ in found] == pytest.approx([expected, expected, -nats(model.lm, before)], abs=1e-4)
    assert model.loglikelihood([ask(CONTEXT, WRONG)])[0][0] != pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("objective", "path"), [("score", "bounded"), ("score", "uniform"), ("masked", None), ("masked", "bounded")]
)
def test_on_another_path_only_the_continuation_is_priced(saved, objective, path):
    """All but the context being given, a context costs nothing, and what is more costs more."""
    model = Harness(saved[objective], path=path, device="cpu", draws=4)
    texts = [ask(CONTEXT, RIGHT), ask(CONTEXT + RIGHT[:13], RIGHT[13:]), ask(CONTEXT * 9, RIGHT)]
    whole, end, long = (cost for cost, _ in model.loglikelihood(texts))
    assert whole < end < 0 and long < 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_of_all_continuations_one_is_written_greedily(saved, objective):
    model = Harness(saved[objective], device="cpu")
    if objective == "masked":  # it knows where the text ends, however much it would like to end it
        model.lm.denoiser.prior.data[SPECIAL.eos] = 20.0
    before = [0, *model.lm.tokenizer.encode(CONTEXT)]
    tokens = range(2, model.lm.tokenizer.vocab_size)  # none of them ends the text
    rows = [[*before, a, b] for a in tokens for b in tokens]
    (batch,) = batches(rows, torch.device("cpu"), SPECIAL, EVERYTHING, [len(before)] * len(rows))
    with torch.inference_mode():
        (one,) = batch.ids_BL[model._are_likeliest(batch)]
    if objective != "masked":  # whose text is as long as it is said to be
        (written,) = model.generate_until([ask(CONTEXT, {"max_gen_toks": 2})])
        assert model.lm.tokenizer.decode(one.tolist()) == CONTEXT + written


def test_a_whole_text_costs_what_its_price_is(saved):
    texts = [CONTEXT, RIGHT.strip(), " ".join([CONTEXT + RIGHT] * 4)]
    for path in ("ordered", "uniform", "bounded"):
        model = Harness(saved["score"], path=path, device="cpu", draws=3, seed=5)
        expected = price(model.lm, texts, path, draws=3, seed=5).by_text
        assert model.loglikelihood_rolling([ask(text) for text in texts]) == pytest.approx((-expected).tolist())


def test_what_follows_a_context_ends_at_the_first_stop_or_when_it_is_long_enough(saved):
    model = Harness(saved["score"], device="cpu")
    tokenizer = model.lm.tokenizer
    plain, short, spaced = model.generate_until(
        [ask(CONTEXT, {"until": [], "max_gen_toks": 12}), ask(CONTEXT, {"until": None, "max_gen_toks": 3}),
         ask(CONTEXT + " ", {"until": [], "max_gen_toks": 12})]
    )  # fmt: skip
    (sample,) = model.lm.generate(CONTEXT, path="blocks:1", steps=1, temperature=0, max_length=40)
    assert sample.text.startswith(CONTEXT + plain) and len(plain) > len(short) and plain.startswith(short)
    assert len(tokenizer.encode(CONTEXT + short)) <= len(tokenizer.encode(CONTEXT)) + 3 and spaced[:1] != " "
    stop = plain[4:6]
    both = {"until": ["nowhere", plain[6:8], stop], "max_gen_toks": 12}
    assert (
        model.generate_until([ask(CONTEXT, {"until": stop, "max_gen_toks": 12}), ask(CONTEXT, both)])
        == [plain.partition(stop)[0]] * 2
    )
    drawn = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    assert len(set(model.generate_until([ask(CONTEXT, drawn)] * 4))) > 1
    bounded = model.generate_until([ask(CONTEXT * 9, {"path": "bounded", "steps": 3, "max_gen_toks": 5})])
    assert len(tokenizer.encode_inside(bounded[0])) <= 6


def test_bad_input_is_one_line(saved, monkeypatch):
    model = Harness(saved["score"], device="cpu")
    for wrong in (
        lambda: Harness(saved["score"] / "none"),
        lambda: Harness(saved["score"], path="sideways"),
        lambda: Harness(saved["score"], steps=3),
        lambda: Harness(saved["masked"], path="ordered"),
        lambda: Harness(saved["score"], dtype="float16"),
        lambda: model.generate_until([ask(CONTEXT, {"repetition_penalty": 2})]),
    ):
        with pytest.raises(InputError) as error:
            wrong()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(harness, "LM", object)
    with pytest.raises(InputError, match="pip install"):
        Harness(saved["score"])


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
target_delimiter: " "
metric_list: [{metric: acc}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{begin}}"
metric_list: [{metric: bits_per_byte}]
""",
    "next": """
output_type: generate_until
doc_to_text: "{{begin}}"
doc_to_target: "{{ends[right]}}"
generation_kwargs: {until: ["."], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
""",
}
DOCUMENTS = [
    {"begin": "and god said let there be", "ends": ["light", "darkness"], "right": 0},
    {"begin": "in the beginning god created the", "ends": ["night", "heaven"], "right": 1},
    {"begin": "he called the light", "ends": ["day", "void"], "right": 0},
]


@pytest.fixture
def tasks(tmp_path):
    """A directory of tasks, and their data."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    for name, lines in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: scorelm_{name}\ntest_split: test\n{data}{lines}")
    return tmp_path


@pytest.mark.thorough
def test_lm_eval_runs_its_kinds_of_task(saved, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm = ScoreLM.from_pretrained(saved["score"])
    found = simple_evaluate(
        model="scorelm", model_args=f"pretrained={saved['score']}", device="cpu",
        tasks=[f"scorelm_{name}" for name in TASKS], task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )  # fmt: skip
    texts = [one["begin"] for one in DOCUMENTS]
    bits = float(price(lm, texts, "ordered").by_text.sum()) / math.log(2) / sum(map(len, texts))
    assert found["results"]["scorelm_whole"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)
    model = Harness(saved["score"], device="cpu")
    likeliest = [
        max(range(2), key=lambda k: model.loglikelihood([ask(one["begin"], f" {one['ends'][k]}")])[0][0])
        for one in DOCUMENTS
    ]
    right = sum(k == one["right"] for k, one in zip(likeliest, DOCUMENTS, strict=True)) / len(DOCUMENTS)
    assert found["results"]["scorelm_choice"]["acc,none"] == pytest.approx(right)
    told = [sample["resps"][0][0] for sample in found["samples"]["scorelm_next"]]
    assert told == model.generate_until([ask(text, {"until": ["."], "max_gen_toks": 5}) for text in texts])


@pytest.mark.thorough
def test_the_command_of_lm_eval_finds_the_model(saved, tasks):
    command = [
        sys.executable, "-m", "scorelm.evaluation.harness", "--model", "scorelm", "--device", "cpu",
        "--model_args", f"pretrained={saved['autoregressive']}", "--tasks", "scorelm_choice",
        "--include_path", str(tasks), "--output_path", str(tasks / "out"),
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert ended.returncode == 0, ended.stderr
    assert "scorelm_choice" in ended.stdout and "acc" in ended.stdout
    assert list((tasks / "out").rglob("results_*.json"))
