"""Where positions stand: numbers of blocks, and the rule of who sees whom, each against a loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.model.layout import CLEAN, NOISY, Layout, number_blocks, visibility

NAMES = ("segment_BL", "position_BL", "block_BL", "stream_BL")

cell = st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 3), st.integers(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 10).flatmap(lambda n: st.lists(st.lists(cell, min_size=n, max_size=n), min_size=1, max_size=2))
)
def test_visibility_against_a_loop(rows):
    segment, position, block, stream = torch.tensor(rows).unbind(-1)
    found = visibility(Layout(segment, position, block, stream))
    assert found.dtype == torch.bool
    expected = [[[sees(query, key) for key in cells] for query in cells] for cells in rows]
    assert found.tolist() == expected


def sees(query, key):
    (q_segment, _, q_block, q_stream), (k_segment, _, k_block, k_stream) = query, key
    if q_segment != k_segment:
        return False
    if q_stream == k_stream and q_block == k_block:
        return True
    return k_stream == CLEAN and k_block < q_block


document = st.tuples(st.integers(1, 9), st.booleans(), st.sampled_from([0, 1, 2, 3, 8, 100]))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(document, min_size=0, max_size=3), min_size=1, max_size=3))
def test_number_blocks_against_a_loop(rows):
    """Documents of (length, whether it begins with <s>, block size), packed and padded."""
    width = max(1, max(sum(length for length, _, _ in row) for row in rows)) + 1
    position, start, size = (torch.zeros(len(rows), width).long() for _ in range(3))
    expected = torch.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        column = 0
        for length, begins, block_size in row:
            block, filled = 1 + begins, 0
            for place in range(length):
                position[r, column], start[r, column], size[r, column] = place, begins, block_size
                if place == 0 and begins:
                    expected[r, column] = 0
                else:
                    if block_size and filled == block_size:
                        block, filled = 1 + place, 0
                    expected[r, column] = block
                    filled += 1
                column += 1
    found = number_blocks(position, start, size)
    real = expected >= 0
    assert torch.equal(found[real], expected[real])
    assert torch.equal((found == 0) & real, (position == 0) & (start == 1) & real)


def test_number_blocks_broadcasts_and_takes_one_size():
    position = torch.arange(7).expand(2, 7)
    found = number_blocks(position, torch.tensor([[1], [0]]), 3)
    assert found.tolist() == [[0, 2, 2, 2, 5, 5, 5], [1, 1, 1, 4, 4, 4, 7]]
    assert number_blocks(position, torch.tensor([[1], [0]]), 0).tolist() == [[0, *[2] * 6], [1] * 7]


def test_layouts_of_one_and_two_streams_and_of_a_causal_model():
    segment, position = torch.tensor([[1, 1, 1, 2, 2, 0]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    block = torch.tensor([[0, 2, 3, 1, 1, 0]])
    one = Layout.one_stream(segment, position, block)
    assert one.stream_BL.tolist() == [[CLEAN, NOISY, NOISY, NOISY, NOISY, CLEAN]]
    two = Layout.two_streams(segment, position, block)
    for name in NAMES[:2]:
        assert getattr(two, name).tolist() == [2 * getattr(one, name)[0].tolist()]
    assert two.block_BL.tolist() == [[0, 2, 3, 1, 2, 0, 0, 2, 3, 1, 1, 0]]
    assert two.stream_BL.tolist() == [[CLEAN] * 6 + [NOISY] * 6]
    causal = visibility(Layout.causal(segment, position))[0]
    assert torch.equal(causal, (segment[0] == segment.T) & (position[0] <= position.T))


def test_a_layout_on_another_device():
    layout = Layout(*torch.zeros(4, 1, 12).long())
    moved = layout.to(torch.device("meta"))
    for name in NAMES:
        assert getattr(moved, name).is_meta and getattr(moved, name).shape == getattr(layout, name).shape
