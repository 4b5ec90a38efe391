"""Attention over one chunk of keys after the other, by partials that are resumed or merged."""

import numpy as np
import pytest
from given import K, Q, V, refused, torch

import ringcore
from ringcore import DeviceError, DtypeError, KeywordError, Partial, ShapeError, UnsupportedError, ring_attention

CHUNKS = ((0, 2), (2, 3), (3, 6))


def chunk(start, stop, **keywords):
    return ring_attention(
        Q, K[:, :, start:stop], V[:, :, start:stop], causal=True, query_offset=-start, return_partial=True, **keywords
    )


def close(partial, **keywords):
    out, lse = ring_attention(Q, K, V, causal=True, return_lse=True, **keywords)
    np.testing.assert_allclose(partial.out, out, atol=1e-13)
    np.testing.assert_allclose(partial.lse, lse, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kernels", ["numpy", "reference"])
def test_chunks_in_turn_are_all_keys(kernels, size):
    partial = None
    for start, stop in CHUNKS:
        before = None if partial is None else [x.copy() for x in (partial.weighted, partial.maximum, partial.total)]
        following = chunk(start, stop, partial=partial, ring_size=size, kernels=kernels)
        if before is not None:
            for x, y in zip((partial.weighted, partial.maximum, partial.total), before, strict=True):
                assert (x == y).all()  # what is resumed stays as it is
        partial = following
    close(partial)


def test_chunks_in_any_order_merge():
    first, second, third = (chunk(*ends) for ends in CHUNKS)
    close(ringcore.merge(third, ringcore.merge(first, second)))


def test_sinks_count_in_the_call_that_is_given_them():
    sinks = np.array([0.3, -1.0, 2.0, 0.0])
    close(chunk(3, 6, partial=chunk(0, 3, sinks=sinks)), sinks=sinks)
    close(chunk(3, 6, partial=chunk(0, 3), sinks=sinks), sinks=sinks)


def test_a_partial_of_a_kernel_is_resumed():
    out, lse = ring_attention(Q, K[:, :, :3], V[:, :, :3], causal=True, return_lse=True)
    close(chunk(3, 6, partial=Partial.from_lse(out, lse)))
    half = [x.astype("float16") for x in (Q, K, V)]
    first = Partial.from_lse(out.astype("float16"), lse.astype("float32"))
    came = ring_attention(half[0], half[1][:, :, 3:], half[2][:, :, 3:], causal=True, query_offset=-3, partial=first)
    np.testing.assert_allclose(came.astype(float), ring_attention(Q, K, V, causal=True), atol=1e-2)


def test_the_last_chunk_gives_out_in_the_axes_of_the_call():
    first = chunk(0, 3)
    swapped = [np.swapaxes(x, 1, 2) for x in (Q, K[:, :, 3:], V[:, :, 3:])]
    out, lse = ring_attention(
        *swapped, axes="bshd", causal=True, query_offset=-3, partial=first, return_lse=True, ring_size=2
    )
    due, due_lse = ring_attention(Q, K, V, causal=True, return_lse=True)
    np.testing.assert_allclose(np.swapaxes(out, 1, 2), due, atol=1e-13)
    np.testing.assert_allclose(lse, due_lse, atol=1e-13)


def test_another_scale_or_softcap_is_refused():
    first = chunk(0, 3, scale=0.7)
    for other in ({"scale": 0.25}, {"scale": 0.7, "softcap": 2.0}, {}):
        refused(lambda other=other: chunk(3, 6, partial=first, **other), KeywordError, ["scale 0.7 and softcap None"])
        refused(
            lambda other=other: ringcore.merge(first, chunk(3, 6, **other)), KeywordError, ["of different softmaxes"]
        )
    assert ringcore.merge(first, chunk(3, 6, scale=0.7)).score.scale == 0.7
    assert ringcore.merge(first, Partial(first.weighted, first.maximum, first.total)).score is first.score


def test_partials_of_other_queries_are_refused():
    first = chunk(0, 3)
    others = ring_attention(Q[:, :, :4], K, V, return_partial=True)
    refused(
        lambda: chunk(3, 6, partial=others), ShapeError, ["weighted of partial has shape (2, 4, 4, 3)", "(2, 4, 6, 3)"]
    )
    refused(lambda: ringcore.merge(first, others), ShapeError, ["Merge partials of the same queries"])
    narrow = Partial(*(x.astype("float32") for x in (first.weighted, first.maximum, first.total)))
    refused(lambda: chunk(3, 6, partial=narrow), DtypeError, ["maximum of partial holds float32", "must be float64"])
    refused(lambda: chunk(3, 6, partial=(first.weighted,)), KeywordError, ["partial is a tuple"])
    t = torch()
    foreign = Partial(*(t.from_numpy(x) for x in (first.weighted, first.maximum, first.total)))
    refused(lambda: chunk(3, 6, partial=foreign), DeviceError, ["weighted of partial is an array of torch"])


def test_what_cannot_be_given_together_is_refused():
    refused(lambda: ring_attention(Q, K, V, return_partial="yes"), KeywordError, ["return_partial is 'yes'"])
    refused(lambda: ring_attention(Q, K, V, return_partial=True, return_lse=True), KeywordError, ["part.lse"])


def test_torch_gives_partials_without_gradients():
    t = torch()
    q, k, v = (t.from_numpy(x) for x in (Q, K, V))
    first = ring_attention(q, k[:, :, :3], v[:, :, :3], causal=True, return_partial=True)
    out = ring_attention(q, k[:, :, 3:], v[:, :, 3:], causal=True, query_offset=-3, partial=first)
    np.testing.assert_allclose(out.numpy(), ring_attention(Q, K, V, causal=True), atol=1e-13)
    q.requires_grad_()
    refused(lambda: ring_attention(q, k, v, return_partial=True), UnsupportedError, ["q requires grad"])
