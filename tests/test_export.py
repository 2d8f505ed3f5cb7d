"""`scorelm export`: a directory that transformers loads, with the very texts that scorelm writes."""

import json
import pickle
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, TextDiffusionStreamer, TextIteratorStreamer

from scorelm import ScoreLM
from scorelm.cli import main
from scorelm.config.generation import Continuation
from scorelm.config.recipe import Recipe, TrainingConfig
from scorelm.errors import InputError
from scorelm.model.directory import EMBEDDED, Provenance
from scorelm.text.huggingface import HuggingFaceTokenizer
from scorelm.text.normalization import normalizing
from scorelm.training.initial import describe_model, read_initial

from .families import bert, gpt2, llama

TEXTS = ["the light", "and", "", "<s> is </s> text", " twice  spaced ", "Größe 12"]
REMOTE = {"trust_remote_code": True}


def scorelm(*words: object) -> tuple[int, str, str]:
    with StringIO() as out, StringIO() as err:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(list(map(str, words)))
        return int(ended.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def models(make_lm) -> dict[str, ScoreLM]:
    """A model for each kind of tokenizer; the one with bytes reads lower case only."""
    lm = make_lm()
    found = {"sentencepiece": lm}
    for family in (gpt2, bert, llama):
        steps = ("lower",) if family is gpt2 else ()
        tokenizer = normalizing(HuggingFaceTokenizer(family().to_str().encode()), steps)
        made = ScoreLM(lm.config, tokenizer, lm.schedule, lm.lengths, Provenance(normalize=steps))
        torch.nn.init.normal_(made.denoiser.context.weight, std=0.5)
        found[family.__name__] = made.eval()
    return found


@pytest.fixture
def lm(models) -> ScoreLM:
    return models["sentencepiece"]


@pytest.fixture
def place(lm, tmp_path, own_modules) -> Path:
    """The directory of an exported model."""
    lm.save_pretrained(tmp_path / "model")
    assert scorelm("export", tmp_path / "model", tmp_path / "out")[:2] == (0, f"{tmp_path / 'out'}\n")
    return tmp_path / "out"


@pytest.fixture
def model(place):
    return AutoModel.from_pretrained(place, **REMOTE)


@pytest.fixture
def tokenizer(place):
    return AutoTokenizer.from_pretrained(place, **REMOTE)


def encoded(tokenizer, *texts: str):
    return tokenizer(list(texts), return_tensors="pt", padding=True)


def new(output, prompts) -> list[list[int]]:
    """The ids behind the prompts, up to what fills rows up."""
    assert torch.equal(output[:, : prompts.shape[1]], prompts)
    return [[token for token in row if token != 2] for row in output[:, prompts.shape[1] :].tolist()]


@pytest.mark.parametrize("place", ["new", "empty", "link", "."])
def test_an_export_that_is_interrupted_leaves_what_there_was(place, lm, tmp_path, monkeypatch) -> None:
    """And the next one writes there, also into the current directory or through a link."""

    def interrupted(lm: ScoreLM) -> None:
        raise KeyboardInterrupt

    model, empty = tmp_path / "model", tmp_path / "empty"
    lm.save_pretrained(model)
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(empty if place == "." else tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("scorelm.transformers.export.tokenizer_config_of", interrupted)
        assert scorelm("export", model, place) == (130, "", "scorelm: interrupted\n")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert scorelm("export", model, place)[0] == 0
    assert (tmp_path / place if place == "new" else empty).joinpath("tokenizer_config.json").is_file()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2", "bert", "llama"])
def test_transformers_writes_and_reads_what_scorelm_does(kind, models, tmp_path, own_modules) -> None:
    lm = models[kind]
    lm.save_pretrained(tmp_path / "model")
    assert scorelm("export", tmp_path / "model", tmp_path / "one")[0] == 0
    for name, then in (("one", "two"), ("two", "three")):  # what save_pretrained writes is loaded in its turn
        model, tokenizer = (auto.from_pretrained(tmp_path / name, **REMOTE) for auto in (AutoModel, AutoTokenizer))
        special = lm.tokenizer.special
        for text in TEXTS:
            ids = tokenizer(text)["input_ids"]
            assert ids == [special.bos, *lm.tokenizer.encode(text)]
            assert tokenizer.decode(ids, skip_special_tokens=True) == lm.tokenizer.decode(ids)
        assert tokenizer.special_tokens_map == {
            f"{role}_token": lm.tokenizer.pieces([token])[0] for role, token in special._asdict().items()
        }
        assert (len(tokenizer), tokenizer.model_max_length) == (lm.tokenizer.vocab_size, lm.max_length)
        inputs = tokenizer("the light", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=0.9, num_steps=9, seed=4)
        most = inputs["input_ids"].shape[1] + 12
        (sample,) = lm.generate("the light", temperature=0.9, steps=9, seed=4, max_length=most)
        assert output.tolist() == [sample.ids]
        assert tokenizer.decode(output[0], skip_special_tokens=True) == sample.text
        assert ScoreLM.from_pretrained(tmp_path / name).generate("the", seed=4) == lm.generate("the", seed=4)
        model.save_pretrained(tmp_path / then)
        tokenizer.save_pretrained(tmp_path / then)
    model.config.save_pretrained(tmp_path / "config")
    assert AutoConfig.from_pretrained(tmp_path / "config", **REMOTE).scorelm == lm.manifest.model_dump(mode="json")


def test_rows_of_unequal_length_are_filled_up_and_each_has_its_new_tokens(lm, model, tokenizer) -> None:
    prompts = encoded(tokenizer, "the light of the day", "and", "")
    assert prompts["attention_mask"][1].tolist()[0] == 0  # on the left
    output = model.generate(**prompts, num_return_sequences=2, seed=7)
    texts = [sample.text for sample in lm.generate(["the light of the day", "and", ""], n=2, seed=7)]
    assert tokenizer.batch_decode(output, skip_special_tokens=True) == texts
    assert torch.equal(model.generate(prompts["input_ids"], num_return_sequences=2, seed=7), output)  # <pad> says it

    for most, longest in ((5, 16), (38, 49)):  # the latter is beyond what the model was trained on, for one of them
        options = {"path": "blocks:1", "num_steps": 1, "max_new_tokens": most}  # no level in between to round
        prompts = encoded(tokenizer, *(texts := ["", "and", "the light of the day"]))
        output = model.generate(**prompts, **options, seed=0)
        alone = [model.generate(**encoded(tokenizer, text), **options, seed=k) for k, text in enumerate(texts)]
        assert [[token for token in row if token != 2] for row in output.tolist()] == [row[0].tolist() for row in alone]
        written = new(output, prompts["input_ids"])
        assert max(map(len, written)) == most and output.shape[1] == longest
        assert len(written[2]) == most
    assert model.generate(**prompts, num_return_sequences=0).tolist() == []


def test_prompts_stay_the_ids_that_they_are(model, tokenizer) -> None:
    ids = torch.tensor([[0, 16, 4, 3, 28]])  # with <unk>, and cut otherwise than the tokenizer would
    output = model.generate(ids, seed=1)
    assert torch.equal(output[:, :5], ids)
    assert torch.equal(model.generate(ids[:, 1:], seed=1), output[:, 1:])  # <s> is there in any case
    assert model.generate(seed=1)[0, 0] == 0
    assert model.lm.plan([ids[0, 1:].tolist()], 1, Continuation()).templates[0][:5] == ids[0].tolist()


def test_seeds_come_from_the_call_a_generator_or_torch(model, tokenizer) -> None:
    prompts = encoded(tokenizer, "the")

    def drawn(**options):
        return model.generate(**prompts, **options).tolist()

    made = torch.Generator().manual_seed(1)
    assert (first := drawn(generator=made)) != drawn(generator=made)
    torch.manual_seed(1)
    assert drawn() == first != drawn()
    assert drawn(do_sample=False, length=9, seed=1) == drawn(do_sample=False, length=9, seed=2)


class Collector:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ended = False

    def put(self, value) -> None:
        assert not self.ended and value.device.type == "cpu"
        self.told += value.tolist()

    def end(self) -> None:
        self.ended = True


class DraftCollector(Collector):
    """One that is shown drafts too."""

    def __init__(self) -> None:
        super().__init__()
        self.drafts: list[list[int]] = []

    def put_draft(self, value) -> None:
        self.drafts.append([*chain(*self.told), *value[0].tolist()])


@pytest.mark.parametrize("path", ["bounded", "uniform", "remask", "blocks:1", "blocks:8"])
def test_a_streamer_is_told_every_token_once_and_shown_drafts(path, model, tokenizer) -> None:
    prompts = encoded(tokenizer, "the light")
    for kind in (Collector, DraftCollector):
        streamer = kind()
        output = model.generate(**prompts, path=path, num_steps=40, length=30, seed=3, streamer=streamer)
        assert streamer.told[0] == prompts["input_ids"][0].tolist() and streamer.ended
        assert list(chain(*streamer.told)) == output[0].tolist()
        if path == "blocks:1":
            assert [len(ids) for ids in streamer.told[1:]] == [1] * 25 + [2]  # with </s>, which was given
        elif path in ("remask", "uniform"):
            assert len(streamer.told) <= 3  # nothing is final before the end
    drafts = streamer.drafts
    assert all(draft[: prompts["input_ids"].shape[1]] == streamer.told[0] for draft in drafts)
    written = [sum(a == b for a, b in zip(draft, output[0].tolist(), strict=False)) for draft in drafts]
    assert len(drafts) > 3 and written[-1] > written[0]


def test_streamers_of_transformers_follow(model, tokenizer, capsys) -> None:
    prompts = encoded(tokenizer, "the light")
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True, skip_prompt=True)
    output = model.generate(**prompts, path="blocks:1", seed=3, streamer=streamer)
    begin = prompts["input_ids"].shape[1]
    assert "".join(streamer) == tokenizer.decode(output[0, begin:], skip_special_tokens=True)
    streamer = TextDiffusionStreamer(tokenizer, skip_special_tokens=True)
    output = model.generate(**prompts, seed=3, streamer=streamer)
    shown = capsys.readouterr().out
    assert "\033[33m" in shown
    final = re.sub(r"\x1b7\x1b\[33m.*?\x1b\[0m\x1b8\x1b\[J", "", shown, flags=re.DOTALL)
    assert final == tokenizer.decode(output[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "no option 'num_beams'"),
        ({"stopping_criteria": [1]}, "no option 'stopping_criteria'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 1 or more, got 0"),
        ({"max_new_tokens": 5, "max_length": 9}, "either max_new_tokens or max_length"),
        ({"max_new_tokens": 500, "path": "bounded"}, "trained on at most 44 tokens"),
        ({"num_steps": 5, "steps": 5}, "either num_steps or steps"),
        ({"seed": 5, "generator": torch.Generator()}, "either a seed or a generator"),
        ({"do_sample": False, "temperature": 1.0}, "leave temperature out"),
        ({"input_ids": torch.tensor([1, 2])}, "one row for each prompt"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "one row for each prompt"),
        ({"input_ids": torch.tensor([[0.5]])}, "one row for each prompt"),
        ({"input_ids": torch.tensor([[0, 50]])}, "token id 50 is outside the vocabulary of 50"),
        ({"input_ids": torch.tensor([[0, 5, 1]])}, "neither </s> nor <pad> in it"),
        ({"attention_mask": torch.ones(1, 9)}, "attention_mask has the shape"),
        ({"streamer": Collector(), "num_return_sequences": 2}, "a streamer follows one text only"),
        ({"streamer": Collector(), "best_of": 2}, "a streamer follows one text only"),
        ({"num_return_sequences": -1}, "n must be 0 or more"),
    ],
)
def test_what_cannot_be_followed_is_refused(options, message, model) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(**{"input_ids": torch.tensor([[0, 5]])} | options)


def test_unset_options_are_none(model) -> None:
    ids = torch.tensor([[0, 5]])
    assert torch.equal(model.generate(ids, seed=2, num_beams=None, logits_processor=None), model.generate(ids, seed=2))


def test_a_streamer_that_asks_for_logits_is_refused(model, tokenizer) -> None:
    streamer = TextDiffusionStreamer(tokenizer)
    streamer._takes_logits = True
    with pytest.raises(InputError, match="asks for logits"):
        model.generate(torch.tensor([[0, 5]]), streamer=streamer)


def test_the_model_stays_in_float32_and_says_what_it_cannot_do(place, lm, model, tokenizer, tmp_path) -> None:
    ids = torch.tensor([[0, 5]])
    before = model.generate(ids, seed=2)
    for change in (model.half, model.bfloat16, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(InputError, match="stay in float32"):
            change()
    assert model.to("cpu") is model and torch.equal(model.generate(ids, seed=2), before) and not model.training
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert model.lm.infill("the ____ day", seed=2) == lm.infill("the ____ day", seed=2)
    with pytest.raises(InputError, match=r"call lm\.generate"):
        model(ids)
    with pytest.raises(InputError, match="loaded with from_pretrained"):
        AutoModel.from_config(model.config, **REMOTE)
    for options, message in (
        ({"dtype": "bfloat16"}, "stay in float32"),
        ({"torch_dtype": torch.float16}, "stay in float32"),
        ({"quantization_config": {"bits": 4}}, "does not know quantization_config"),
        ({"device_map": "nowhere"}, "no device 'nowhere'"),
    ):
        with pytest.raises(InputError, match=message):
            AutoModel.from_pretrained(place, **REMOTE, **options)
    assert AutoModel.from_pretrained(place, **REMOTE, dtype="auto", device_map="cpu").device.type == "cpu"
    direct = type(model).from_pretrained(place)
    assert torch.equal(direct.generate(ids, seed=2), before)
    with pytest.raises(InputError, match="does not know push_to_hub"):
        model.save_pretrained(tmp_path / "again", push_to_hub=True)


def test_the_tokenizer_names_specials_and_can_be_pickled(tokenizer) -> None:
    ids = tokenizer("the light")["input_ids"] + [1, 2]
    assert tokenizer.decode(ids) == "<s>the light</s><pad>"
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(range(50))) == list(range(50))
    assert tokenizer.convert_tokens_to_ids("no such token") == 3 and tokenizer.vocab_size == 50
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize("the light")) == "the light"
    assert tokenizer.decode(tokenizer("and , so")["input_ids"], True, clean_up_tokenization_spaces=True)
    assert pickle.loads(pickle.dumps(tokenizer.inner)).encode("the light") == ids[1:-2]


def test_tokens_that_read_alike_have_names_of_their_own() -> None:
    from scorelm.transformers.tokenizer import name_tokens

    class Doubles:
        vocab_size, special = 6, (4, 5)

        def pieces(self, ids):
            return ["a", "a", "<s>", "", "<s>", "</s>"]

    assert name_tokens(Doubles()) == ["a", "a#", "<s>#", "#", "<s>", "</s>"]


def test_a_run_starts_from_the_directory_as_from_the_model(place, lm) -> None:
    recipes = [describe_model(Recipe(), start) for start in (place, place.with_name("model"))]
    assert recipes[0].model == recipes[1].model == lm.config
    recipe = Recipe(training=TrainingConfig(init_from=place))
    assert read_initial(recipe, place)[1].weights.keys() == lm.denoiser.state_dict().keys()


def test_nothing_here_runs_code_of_the_directory(place, lm) -> None:
    for file in place.glob("*.py"):
        file.write_text("raise SystemExit('this ran')")
    assert ScoreLM.from_pretrained(place).generate("the", seed=1) == lm.generate("the", seed=1)
    assert scorelm("info", place)[0] == 0


@pytest.mark.parametrize("words", ["export", "export {model}", "export {model} {out} --format onnx"])
def test_words_that_make_no_sense_are_refused(words, tmp_path) -> None:
    code, out, err = scorelm(*words.format(model=EMBEDDED, out=tmp_path / "out").split())
    assert (code, out) == (2, "") and err and list(tmp_path.iterdir()) == []


def test_bad_places_are_refused_and_lose_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("kept")
    for model, place, message in (
        (EMBEDDED, tmp_path / "full", "is there already: choose a directory that is new, or empty"),
        (EMBEDDED, tmp_path / "file", "is there already"),
        (EMBEDDED, tmp_path / "file" / "below", "cannot write"),
        (tmp_path / "nowhere", tmp_path / "out", "nowhere"),
        (tmp_path / "full", tmp_path / "out", "is not a model directory"),
    ):
        code, out, err = scorelm("export", model, place)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "config.json").read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_the_card_says_how_to_load_it(place, own_modules, monkeypatch, capsys) -> None:
    card = (place / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"## In transformers.*?```python\n(.*?)```", card, re.DOTALL)
    exec(compile(source.replace("PATH", str(place)), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() and "pip install scorelm" in card and "lm.infill" in card


@pytest.mark.thorough
def test_without_the_package_transformers_says_what_is_missing(place, tmp_path) -> None:
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scorelm":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModel
AutoModel.from_pretrained({str(place)!r}, trust_remote_code=True)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "others"), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "Run `pip install scorelm`" in done.stderr


def test_config_says_what_transformers_needs(place, lm) -> None:
    config = json.loads((place / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_scorelm.ScoreLMModel"
    assert (config["model_type"], config["vocab_size"]) == ("scorelm", 50)
