"""Packing: every document once an epoch and whole, honest segments and positions, exact resume, disjoint shards."""

import json
from collections import Counter
from functools import partial
from itertools import chain, islice

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.errors import InputError
from scorelm.text.corpus import Corpus, tokenise
from scorelm.text.fit import best_fit, fill_rows
from scorelm.text.packing import pack, packed_rows, packing_efficiency
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
from scorelm.text.windows import Windows

BOS, EOS, PAD, _ = Tokenizer.special
KEYS = {"ids", "segment", "position"}


def documents(lengths):
    """Documents of the given lengths, each with contents of its own: consecutive numbers."""
    starts = np.cumsum([10, *lengths])
    return [{"ids": list(range(start, start + length))} for start, length in zip(starts, lengths, strict=False)]


packed = partial(packed_rows, pad=PAD)


def segments(batches):
    """Contents of every segment of every row, after checking that the rows are well formed."""
    for batch in batches:
        assert set(batch) == KEYS and all(part.dtype == np.int64 for part in batch.values())
        for ids, segment, position in zip(batch["ids"], batch["segment"], batch["position"], strict=True):
            used = int((segment > 0).sum())
            assert (segment[used:] == 0).all() and (ids[used:] == PAD).all() and (position[used:] == 0).all()
            assert set(np.diff(segment[:used], prepend=0)) <= {0, 1}
            for number in range(1, segment.max() + 1):
                (at,) = np.nonzero(segment == number)
                assert position[at].tolist() == list(range(len(at)))
                yield tuple(ids[at].tolist())


def same(first, second):
    return all(np.array_equal(first[key], second[key]) for key in KEYS)


LENGTHS = [2, 3, 5, 7, 9, 11, 13, 16] * 40


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_document_appears_once_whole_and_in_order(lengths, rows, seed):
    batches = list(packed(documents(lengths), max_length=12, rows=rows, seed=seed, epochs=1))
    assert all(part.shape == (rows, 12) for batch in batches for part in batch.values())
    assert Counter(segments(batches)) == Counter(tuple(document["ids"]) for document in documents(lengths))


def slow_best_fit(lengths, width):
    """The row of each piece, by looking at every row: an obvious program for what ours does in another way."""
    room, row_of = [], {}
    for number in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        fitting = [row for row in range(len(room)) if room[row] >= lengths[number]]
        if not fitting:
            fitting = [len(room)]
            room.append(width)
        row_of[number] = min(fitting, key=lambda row: room[row])
        room[row_of[number]] -= lengths[number]
    return room, [row_of[number] for number in range(len(lengths))]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=200), more=st.integers(0, 100))
def test_rows_are_as_full_as_an_obvious_packer_makes_them(lengths, more):
    """Which of equally full rows a piece goes into makes no difference to the rooms that are left."""
    width = max(lengths) + more
    left, _ = slow_best_fit(lengths, width)
    row_of = best_fit(np.array(lengths), width)
    used = np.bincount(row_of, lengths)
    assert sorted(width - used) == sorted(left) and len(row_of) == len(lengths)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=60).filter(any),
    width=st.integers(1, 40),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_any_windows_in_any_order_are_in_the_rows_once(lengths, width, seed, data):
    """Of documents in several pieces of Arrow, some of them without a token."""
    plain = documents(lengths)
    cut = data.draw(st.integers(0, len(plain)))
    features = datasets.Features({"ids": datasets.List(datasets.Value("int32"))})
    tables = [datasets.Dataset.from_list(part, features) for part in (plain[:cut], plain[cut:]) if part]
    windows, random = Windows(datasets.concatenate_datasets(tables), width), np.random.default_rng(seed)
    number, start, length = windows.cut(random.permutation(len(windows)), windows.draw_shifts(random))
    expected = [tuple(plain[n]["ids"][s : s + k]) for n, s, k in zip(number, start, length, strict=True)]
    rows = fill_rows(windows.tokens, (number, start, length), width, PAD, random)
    assert Counter(segments([rows])) == Counter(expected)
    assert sorted(chain.from_iterable(expected)) == list(chain.from_iterable(one["ids"] for one in plain))
    assert rows["ids"].shape[1] == width


def test_two_epochs_have_every_document_twice_in_another_order():
    found = list(segments(packed(documents(LENGTHS), max_length=16, rows=4, seed=0, epochs=2)))
    assert set(Counter(found).values()) == {2} and len(found) == 2 * len(LENGTHS)
    one = list(segments(packed(documents(LENGTHS), max_length=16, rows=4, seed=0, epochs=1)))
    other = list(segments(packed(documents(LENGTHS), max_length=16, rows=4, seed=1, epochs=1)))
    assert one != other and sorted(one) == sorted(other)


def test_two_epochs_are_shuffled_and_shared():
    shards = [
        list(segments(packed(documents(LENGTHS), max_length=16, rows=4, seed=0, rank=rank, world=2, epochs=2)))
        for rank in range(2)
    ]
    found = list(chain.from_iterable(shards))
    assert Counter(found) == Counter({tuple(document["ids"]): 2 for document in documents(LENGTHS)})
    assert shards[0] != sorted(shards[0]) and shards[0] != shards[1]


def test_without_epochs_it_never_ends():
    batches = islice(packed(documents([5, 6, 7]), max_length=16, rows=4, seed=0), 200)
    counts = Counter(segments(batches))
    assert len(counts) == 3 and min(counts.values()) > 150


def test_arrow_and_lists_pack_alike():
    plain = documents(LENGTHS)
    table = datasets.Dataset.from_list(plain)
    parts = datasets.concatenate_datasets([table.select(range(100)), table.select(range(100, len(plain)))])
    backwards = table.select(range(len(plain) - 1, -1, -1))
    expected = list(packed(plain, max_length=16, rows=4, seed=3, epochs=1))
    for arrow in (table, parts):
        batches = list(packed(arrow, max_length=16, rows=4, seed=3, epochs=1))
        assert all(same(*pair) for pair in zip(batches, expected, strict=True))
    found = segments(packed(backwards, max_length=16, rows=4, seed=3, epochs=1))
    assert sorted(found) == sorted(tuple(document["ids"]) for document in plain)


@pytest.mark.parametrize(("steps", "epochs"), [(0, None), (7, None), (93, None), (1, 20), (40, 20), (93, 20)])
def test_resuming_repeats_exactly(steps, epochs):
    def rows():
        lengths = [*LENGTHS, 40, 50]
        return iter(packed(documents(lengths), max_length=16, rows=16, seed=5, rank=1, world=2, epochs=epochs))

    original = rows()
    for _ in range(steps):
        next(original)
    state = json.loads(json.dumps(original.get_state()))
    rest = list(islice(original, 20))
    resumed = rows()
    next(resumed)
    resumed.set_state(state)
    again = list(islice(resumed, 20))
    assert rest and all(same(*pair) for pair in zip(rest, again, strict=True))
    original.set_state(state)
    assert same(next(original), rest[0])


def test_a_state_is_small_and_nothing_is_lost_between_chunks(monkeypatch):
    """A batch may have rows of several chunks, and its state is that of the last one."""
    monkeypatch.setattr("scorelm.text.packing._POSITIONS_AT_A_TIME", 1)
    monkeypatch.setattr("scorelm.text.packing._LEAST_ROWS", 3)
    rows = packed(documents(LENGTHS), max_length=16, rows=10, seed=1, epochs=2)
    batches, states, iterator = [], [], iter(rows)
    for batch in iterator:
        batches.append(batch)
        states.append(json.dumps(iterator.get_state()))
    assert Counter(segments(batches)) == Counter({tuple(document["ids"]): 2 for document in documents(LENGTHS)})
    assert max(map(len, states)) < 50 and json.loads(states[0])["chunk"] > 1
    for after, state in enumerate(states, 1):
        again = iter(rows)
        again.set_state(json.loads(state))
        assert all(same(*pair) for pair in zip(again, batches[after:], strict=True))


def test_rows_of_long_documents_do_not_come_first():
    """Though the longest are packed first."""
    batches = list(packed(documents(LENGTHS), max_length=16, rows=20, seed=0, epochs=1))
    longest = [batch["position"].max(axis=1).mean() for batch in batches[:-1]]
    assert len(longest) > 5 and max(longest) < 1.4 * min(longest)


class Numbers:
    """An endless stream: every text is a number, as often as it says."""

    def __iter__(self):
        self = Numbers()
        self.at = 0
        return self

    def __next__(self):
        self.at += 1
        return {"ids": [self.at] * (1 + self.at % 7)}

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


def test_a_stream_is_packed_in_its_order_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("scorelm.text.packing._POSITIONS_AT_A_TIME", 1)
    rows = pack(Numbers(), 8, 50, PAD, (0, 0))
    batches = list(islice(rows, 12))
    found = Counter(one[0] for one in segments(batches))
    assert set(found.values()) == {1} and sorted(found)[:1000] == list(range(1, 1001)) and len(found) < max(found) + 200
    assert all(set(one) == {one[0]} and len(one) == 1 + one[0] % 7 for one in segments(batches))
    assert not same(batches[0], next(iter(pack(Numbers(), 8, 50, PAD, (0, 1)))))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_every_document_in_each_epoch(world):
    whole = documents(LENGTHS[:-1])
    shards = [
        list(segments(packed(whole, max_length=16, rows=4, seed=0, rank=rank, world=world, epochs=1)))
        for rank in range(world)
    ]
    assert sorted(chain.from_iterable(shards)) == sorted(tuple(document["ids"]) for document in whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    twice = [
        list(segments(packed(whole, max_length=16, rows=4, seed=0, rank=rank, world=world, epochs=2)))
        for rank in range(world)
    ]
    assert set(Counter(chain.from_iterable(twice)).values()) == {2}
    assert set(twice[0]) > set(shards[0])


@pytest.mark.parametrize("length", [11, 20, 47, 100])
def test_every_epoch_has_all_of_a_long_document_in_as_few_windows_as_can_hold_it(length):
    epochs = list(segments(packed(documents([length]), max_length=10, rows=2, seed=0, epochs=60)))
    count = -(-length // 10)
    assert len(epochs) == 60 * count and max(map(len, epochs)) == 10
    assert Counter(chain.from_iterable(epochs)) == dict.fromkeys(range(10, 10 + length), 60)
    assert all(window == tuple(range(window[0], window[0] + len(window))) for window in epochs)
    starts = {window[0] - 10 for window in epochs}
    assert len(starts) == 1 + (count - 1) * min(10, count * 10 - length + 1)


def test_ranks_share_the_windows_of_a_long_document():
    shards = [
        list(segments(packed(documents([95]), max_length=10, rows=2, seed=0, rank=rank, world=3, epochs=1)))
        for rank in range(3)
    ]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert sorted(chain.from_iterable(chain.from_iterable(shards))) == list(range(10, 105))


def test_where_a_document_is_cut_depends_on_the_seed():
    def starts(seed):
        rows = packed(documents([12]), max_length=10, rows=1, seed=seed, epochs=80)
        return [found[0] - 10 for found in segments(rows)]

    assert set(starts(0)) == {0, *range(2, 11)}
    assert starts(0) == starts(0) != starts(1)


def test_padding_has_the_id_that_is_asked_for():
    (batch,) = packed_rows(documents([3]), max_length=8, rows=2, pad=7, seed=0, epochs=1)
    assert sorted(batch["ids"].tolist()) == [[7] * 8, [10, 11, 12, 7, 7, 7, 7, 7]]


def test_last_batch_is_filled_up_with_empty_rows():
    (batch,) = packed(documents([4, 4, 4]), max_length=8, rows=4, seed=0, epochs=1)
    assert sorted(batch["segment"].max(axis=1).tolist()) == [0, 0, 1, 2]
    assert (batch["ids"][2:] == PAD).all()
    assert packing_efficiency(batch) == 12 / 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, not 0"),
        ({"rows": -1}, "rows must be at least 1, not -1"),
        ({"world": 0}, "world must be at least 1, not 0"),
        ({"rank": 2, "world": 2}, "rank must be at least 0 and below world 2, not 2"),
        ({"world": 9}, "3 documents are too few to share among 9 ranks"),
    ],
)
def test_impossible_sizes(wrong, message):
    sizes = {"max_length": 8, "rows": 2, "seed": 0} | wrong
    with pytest.raises(InputError, match=message):
        packed(documents([4, 4, 4]), **sizes)


@pytest.mark.parametrize("width", [8, 512])
def test_no_documents(width):
    """As of the last records of a stream, when all are held out."""
    assert len(Windows([], width)) == 0
    with pytest.raises(InputError, match="0 documents are too few"):
        packed([], max_length=width, rows=2, seed=0)


@pytest.fixture(scope="module", params=[8, pytest.param(1, marks=pytest.mark.slow)])
def verses(request, kjv, tmp_path_factory):
    """Every eighth verse, or all."""
    side = kjv.train.select(range(0, len(kjv.train), request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        tokenizer = Tokenizer.train(side[:]["text"], 2048)
        return tokenise(Corpus("kjv", side, side.select([]), kjv.fingerprint), tokenizer, max_length=64).train


@pytest.mark.parametrize(("max_length", "least"), [(64, 0.94), (128, 0.98), (256, 0.99)])
def test_rows_of_the_embedded_corpus_are_full(verses, max_length, least):
    rows = 4096 // max_length
    batches = list(packed(verses, max_length=max_length, rows=rows, seed=0, epochs=1))
    assert np.mean([packing_efficiency(batch) for batch in batches[:-1]]) >= least
    if max_length == 256:
        found = list(segments(batches))
        assert len(found) == len(verses) and all(one[0] == BOS and one[-1] == EOS for one in found)
