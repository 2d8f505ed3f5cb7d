"""What the visibility rule promises about logits: no leak between documents, blocks or streams."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from scorelm.model.attention import Attention, AttentionInputs, attention_inputs
from scorelm.model.layout import CLEAN, NOISY, Layout, Past, visibility

from .denoisers import E, V, logits, trained_like

INF = float("inf")


def packed(lengths, width, block=None):
    """A row of documents of the given lengths, each one block unless `block` says how many positions one has."""
    segment, position, blocks = torch.zeros(width).long(), torch.zeros(width).long(), torch.zeros(width).long()
    at, size = 0, block or width
    for number, length in enumerate(lengths, start=1):
        place = torch.arange(length)
        segment[at : at + length], position[at : at + length] = number, place
        blocks[at : at + length] = torch.where(place == 0, 0, 2 + (place - 1) // size * size)
        at += length
    stream = torch.where(blocks == 0, CLEAN, NOISY)
    return Layout(segment[None], position[None], blocks[None], torch.where(segment > 0, stream, NOISY)[None])


NAMES = ("segment_BL", "position_BL", "block_BL", "stream_BL")


def stacked(*layouts):
    return Layout(*(torch.cat([getattr(x, name) for x in layouts]) for name in NAMES))


def noisy_row(denoiser, layout, seed, clean=0.0):
    """(ids, sigma, x): <s> given, other tokens at levels of their own, a share `clean` of them given."""
    gen = torch.Generator().manual_seed(seed)
    shape = layout.segment_BL.shape
    ids = torch.randint(4, V, shape, generator=gen)
    sigma = 0.5 + 8 * torch.rand(shape, generator=gen)
    sigma[torch.rand(shape, generator=gen) < clean] = 0
    sigma[layout.block_BL == 0] = 0
    x = denoiser.embedding(ids).detach() + sigma[..., None] * torch.randn(*shape, E, generator=gen)
    return ids, sigma, x


# --- one layer --------------------------------------------------------------------------------------------------------


def test_inputs_are_computed_once_for_each_use():
    layout = packed([4, 5], 12)
    inputs = attention_inputs(layout, 4, True)
    assert attention_inputs(layout, 4, True) is inputs
    assert attention_inputs(layout, 8, True) is not inputs
    with torch.inference_mode():  # tensors made here cannot be saved for a gradient
        assert attention_inputs(layout, 4, True) is not inputs
    assert attention_inputs(layout.map(torch.clone), 4, True) is not inputs


@pytest.mark.parametrize("short", [0, 256], ids=["fused", "batched products"])
def test_attention_is_softmax_attention_over_what_is_visible(short, monkeypatch):
    """Two heads against the textbook formula with loops, in float64, positions and normalisation included."""
    monkeypatch.setattr("scorelm.model.attention.SHORT", short)
    torch.manual_seed(3)
    attention = Attention(8, 2).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    layout = packed([3, 4], 8, block=2)
    h = torch.randn(1, 8, 8, dtype=torch.float64)
    found = attention(h, AttentionInputs(layout, 4, False))[0]
    visible = visibility(layout)[0]
    q, k, v = (part.view(8, 2, 4) for part in (h[0] @ attention.qkv.weight.T).split(8, dim=-1))

    def turn(vector, position):
        vector = vector / vector.pow(2).mean().sqrt()
        pairs = []
        for pair, frequency in zip(vector.view(2, 2), (1.0, 10_000 ** (-2 / 4)), strict=True):
            angle = position * torch.tensor(frequency, dtype=torch.float64)
            matrix = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
            pairs.append(matrix @ pair)
        return torch.cat(pairs)

    for query in range(8):
        mixed = []
        for head in range(2):
            q_vector = turn(q[query, head], layout.position_BL[0, query])
            keys = [key for key in range(8) if visible[query, key]]
            products = [q_vector @ turn(k[key, head], layout.position_BL[0, key]) for key in keys]
            weight = (torch.stack(products) / 2).softmax(0)
            mixed.append(sum(w * v[key, head] for w, key in zip(weight, keys, strict=True)))
        torch.testing.assert_close(found[query], attention.out.weight @ torch.cat(mixed), rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention on a CPU is compiled with g++")
@pytest.mark.parametrize("reach", [None, 20])
def test_flex_attention_is_the_same_function(monkeypatch, reach):
    """Through its CPU backend, which computes no gradients: packed documents, two streams, rows that are not of 128."""
    layout = stacked(packed([70, 3, 60, 200], 400, block=4), packed([350], 400))
    layout = two_streams(layout)
    q, k, v = torch.randn(3, 2, 800, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = AttentionInputs(layout, 16, True, reach=reach).attend(q, k, v)
    monkeypatch.setattr("scorelm.model.attention.FLEX", ("cpu",))
    assert attention_inputs(layout, 16, False, reach=reach).blocks is None  # its graph would read beyond the mask
    inputs = attention_inputs(layout, 16, True, reach=reach)
    with torch.no_grad():
        found = inputs.attend(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert int(inputs.blocks.kv_num_blocks[0].sum()) < 49 / 2  # of 7 x 7 blocks, those with a pair that sees


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["none", "film"])
def test_packed_is_unpacked(conditioning):
    denoiser, lengths = trained_like(conditioning), [7, 3, 7, 4]
    layout = packed(lengths, 24)
    _, sigma, x = noisy_row(denoiser, layout, seed=1, clean=0.3)
    together, at = logits(denoiser, x, sigma, layout)[0], 0
    for length in lengths:
        part = slice(at, at + length)
        alone = logits(denoiser, x[:, part], sigma[:, part], packed([length], length))[0]
        torch.testing.assert_close(together[part], alone, rtol=1e-4, atol=1e-4)
        at += length


@pytest.mark.parametrize("conditioning", ["none", "film"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_documents_of_equal_length_do_not_leak(conditioning, changed):
    """The failure that packing is feared for: not one bit of a document may depend on its neighbour."""
    denoiser = trained_like(conditioning)
    layout = packed([6, 6, 6], 20)
    _, sigma, x = noisy_row(denoiser, layout, seed=1)
    _, other_sigma, other_x = noisy_row(denoiser, layout, seed=2)
    part = slice(6 * changed, 6 * changed + 6)
    x2, sigma2 = x.clone(), sigma.clone()
    x2[:, part], sigma2[:, part] = 100 * other_x[:, part], other_sigma[:, part]
    x2[:, part.start] = denoiser.embedding(torch.tensor([9])).detach()  # its first token, given, is another one too
    sigma2[:, part.start + 1] = INF
    before, after = logits(denoiser, x, sigma, layout)[0], logits(denoiser, x2, sigma2, layout)[0]
    inside = torch.zeros(20, dtype=torch.bool)
    inside[part] = True
    assert torch.equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside])[1:].any(-1).all()  # all but its given <s>


def test_padding_and_other_rows_do_not_leak():
    denoiser = trained_like()
    layout = stacked(packed([6, 6], 16), packed([9], 16))
    _, sigma, x = noisy_row(denoiser, layout, seed=1)
    x2, sigma2 = x.clone(), sigma.clone()
    pad = layout.segment_BL == 0
    x2[pad], sigma2[pad] = 1e3 * torch.randn(int(pad.sum()), E), torch.rand(int(pad.sum())) * 50
    x2[1], sigma2[1, 1:9] = 7 * x2[1], 0.3 + sigma[1, 1:9]
    before, after = logits(denoiser, x, sigma, layout), logits(denoiser, x2, sigma2, layout)
    assert torch.equal(before[0, :12], after[0, :12])
    assert torch.isfinite(after).all()


def test_no_gradient_flows_between_documents():
    denoiser = trained_like()
    layout = packed([6, 6], 14)
    _, sigma, x = noisy_row(denoiser, layout, seed=1)
    x.requires_grad_()
    logits(denoiser, x, sigma, layout)[0, 6:12].square().sum().backward()
    assert (x.grad[0, :6] == 0).all() and (x.grad[0, 12:] == 0).all()
    assert (x.grad[0, 7:12].abs().sum(-1) > 0).all()


def test_inside_a_block_everything_influences_everything():
    denoiser = trained_like()
    layout = packed([8], 8)
    _, sigma, x = noisy_row(denoiser, layout, seed=1)
    before = logits(denoiser, x, sigma, layout)[0]
    for column in range(1, 8):
        x2 = x.clone()
        x2[0, column] += 1.0
        after = logits(denoiser, x2, sigma, layout)[0]
        assert (before[1:] != after[1:]).any(-1).all()


# --- positions --------------------------------------------------------------------------------------------------------


def test_only_relative_positions_matter():
    denoiser = trained_like()
    layout = packed([10], 10)
    _, sigma, x = noisy_row(denoiser, layout, seed=1)
    expected = logits(denoiser, x, sigma, layout)

    def at(position_BL):
        return logits(denoiser, x, sigma, Layout(layout.segment_BL, position_BL, layout.block_BL, layout.stream_BL))

    torch.testing.assert_close(at(layout.position_BL + 37), expected, rtol=1e-4, atol=1e-4)
    assert (at(2 * layout.position_BL) - expected).abs().max() > 5e-3
    assert (at(9 - layout.position_BL) - expected).abs().max() > 5e-3
    assert (at(0 * layout.position_BL) - expected).abs().max() > 5e-3


# --- blocks and streams -----------------------------------------------------------------------------------------------


def two_streams(layout):
    return Layout.two_streams(layout.segment_BL, layout.position_BL, layout.block_BL)


def two_stream_inputs(denoiser, layout, seed):
    ids, sigma, x = noisy_row(denoiser, layout, seed)
    return ids, torch.cat([0 * sigma, sigma], 1), torch.cat([denoiser.embedding(ids).detach(), x], 1)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[9], [7, 7]])
def test_a_noisy_block_sees_itself_and_the_clean_blocks_before_it(size, lengths):
    """Every (block, column) pair: which columns may change a noisy block's logits, to the bit."""
    denoiser = trained_like()
    single = packed(lengths, sum(lengths), size)
    layout = two_streams(single)
    ids, sigma, x = two_stream_inputs(denoiser, single, seed=1)
    length = sum(lengths)
    before = logits(denoiser, x, sigma, layout)[0]
    segment, block = layout.segment_BL[0], layout.block_BL[0]
    for column in range(2 * length):
        x2, sigma2 = x.clone(), sigma.clone()
        if column < length or block[column] == 0:  # given: another token
            x2[0, column] = denoiser.embedding((ids[0, column % length] + 1) % V).detach()
        else:
            x2[0, column] += 3.0
            sigma2[0, column] *= 1.5
        after = logits(denoiser, x2, sigma2, layout)[0]
        for query in range(length, 2 * length):
            if block[query] == 0:
                continue
            clean_before = column < length and block[column] < block[query]
            same_block = column >= length and block[column] == block[query]
            visible = bool(segment[column] == segment[query]) and bool(clean_before or same_block)
            assert bool((before[query] != after[query]).any()) == visible


def test_one_block_of_two_streams_is_a_single_stream():
    denoiser = trained_like()
    single = packed([9, 6], 17)
    _, sigma, x = two_stream_inputs(denoiser, single, seed=1)
    double = logits(denoiser, x, sigma, two_streams(single))[:, 17:]
    alone = logits(denoiser, x[:, 17:], sigma[:, 17:], single)
    live = single.segment_BL > 0
    torch.testing.assert_close(double[live], alone[live], rtol=1e-5, atol=1e-5)


def test_blocks_of_one_token_are_a_causal_model():
    """Noisy logits of token i equal those of a plain sequence that ends at i, whatever follows."""
    denoiser = trained_like()
    single = packed([9], 9, block=1)
    _, sigma, x = two_stream_inputs(denoiser, single, seed=1)
    together = logits(denoiser, x, sigma, two_streams(single))[0, 9:]
    for i in range(1, 9):
        # The clean prefix, each token its own block, then token i, noisy.
        prefix_x = torch.cat([x[:, :i], x[:, 9 + i : 10 + i]], 1)
        prefix_sigma = torch.cat([torch.zeros(1, i), sigma[:, 9 + i : 10 + i]], 1)
        stream = torch.tensor([[CLEAN] * i + [NOISY]])
        place = torch.arange(i + 1)[None]
        alone = logits(denoiser, prefix_x, prefix_sigma, Layout(torch.ones_like(place), place, place, stream))[0, i]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


def test_a_clean_token_sees_itself_and_those_before_it():
    """However long the blocks are; so nothing that is written later changes what is known of it."""
    single = packed([7, 4], 12, block=3)
    seen = visibility(two_streams(single))[0, :11]
    segment, place = single.segment_BL[0], torch.arange(12)
    causal = (segment == segment[:, None]) & (place <= place[:, None])
    assert torch.equal(seen, torch.cat([causal[:11], torch.zeros(11, 12).bool()], 1))


# --- keys and values that are computed already ------------------------------------------------------------------------


def test_a_past_gives_the_logits_of_one_pass_over_everything():
    """Two clean blocks, then a noisy one, with and without the keys and values of the first two from a pass before."""
    denoiser = trained_like()
    segment, position = torch.ones(2, 9, dtype=torch.long), torch.arange(9).expand(2, 9)
    block = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 3]).expand(2, 9)
    layout = Layout(segment, position, block, torch.where(block == 3, NOISY, CLEAN))
    gen = torch.Generator().manual_seed(0)
    sigma = torch.where(block == 3, 1.5, 0.0)
    e = denoiser.embedding(torch.randint(V, (2, 9), generator=gen))
    x = e + sigma[..., None] * torch.randn(e.shape, generator=gen)
    expected = logits(denoiser, x, sigma, layout)[:, 6:]

    layers, *size = denoiser.backbone.kv_shape
    nothing = layout.map(lambda t: t[:, :0])
    first = Past(nothing, [torch.zeros(2, 0, *size)] * layers, [torch.zeros(2, 0, *size)] * layers)
    clean = layout.map(lambda t: t[:, :6])
    denoiser.predict(x[:, :6], sigma[:, :6], replace(clean, past=first))
    past = Past(clean, [k for k, _ in first.new], [v for _, v in first.new])
    found = logits(denoiser, x[:, 6:], sigma[:, 6:], replace(layout.map(lambda t: t[:, 6:]), past=past))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    hidden = replace(clean, segment_BL=torch.zeros_like(clean.segment_BL))  # a past of other documents is not seen
    other = Past(hidden, past.keys, past.values)
    unseen = logits(denoiser, x[:, 6:], sigma[:, 6:], replace(layout.map(lambda t: t[:, 6:]), past=other))
    assert (unseen - expected).abs().max() > 1e-2
