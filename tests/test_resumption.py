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
    refused(lambda: chunk(3, 6, partial=narrow), DtypeError, ["weighted of partial holds float32", "must be float64"])
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


@pytest.mark.parametrize("made", [
    lambda x: x.astype(complex), lambda x: x.astype(int), lambda x: x.astype("float16"), lambda x: np.ma.array(x),
    lambda x: None, lambda x: x.tolist(),
], ids=["complex", "int", "half", "masked", "none", "list"])  # fmt: skip
def test_what_is_no_sum_of_these_values_is_refused(made):
    first = chunk(0, 3)
    for name in ("weighted", "maximum", "total"):
        held = {each: getattr(first, each) for each in ("weighted", "maximum", "total")}
        wrong = Partial(**{**held, name: made(held[name])})
        with pytest.raises((DtypeError, UnsupportedError), match=f"{name} of partial"):
            chunk(3, 6, partial=wrong)


def test_a_half_type_of_a_kernel_is_resumed_by_calls_in_it_alone():
    q, k, v = (x.astype("float16") for x in (Q, K, V))
    held = ring_attention(q, k, v, return_partial=True)
    first = Partial(held.weighted.astype("float16"), held.maximum, held.total)
    ring_attention(q, k, v, partial=first)
    wide = [x.astype("float32") for x in (q, k, v)]
    refused(lambda: ring_attention(*wide, partial=first), DtypeError, ["weighted of partial holds float16", "float32"])


def test_only_partials_of_one_library_merge():
    first, t = chunk(0, 3), torch()
    foreign = Partial(*(t.from_numpy(x) for x in (first.weighted, first.maximum, first.total)))
    refused(lambda: ringcore.merge(first, None), KeywordError, ["second is a NoneType"])
    refused(lambda: ringcore.merge((1, 2), first), KeywordError, ["first is a tuple"])
    refused(lambda: ringcore.merge(first, foreign), DeviceError, ["arrays of one library"])
    out, lse = first.out, first.lse
    refused(
        lambda: Partial.from_lse(out, t.from_numpy(lse)), DeviceError, ["out and lse are not arrays of one library"]
    )
    refused(lambda: Partial.from_lse(out.tolist(), lse.tolist()), DeviceError, ["not arrays"])
    refused(lambda: Partial.from_lse(out.astype(int), lse), DtypeError, ["out holds int64"])


def test_nothing_that_requires_gradients_is_taken_where_none_are_made():
    t = torch()
    q, k, v = (t.from_numpy(x) for x in (Q, K, V))
    leaves = {"bias": t.zeros(6, 6), "sinks": t.zeros(4), "alibi": t.ones(4), "prefix": (k[:, :, :1], v[:, :, :1])}
    before = ring_attention(q, k, v, return_partial=True)
    for keywords in ({"return_partial": True}, {"partial": before}):
        for name, x in leaves.items():
            ring_attention(q, k, v, **{name: x}, **keywords)
            wanted = tuple(y.clone().requires_grad_() for y in x) if name == "prefix" else x.clone().requires_grad_()
            with pytest.raises(UnsupportedError, match=f"{name}(_k)? requires grad, but"):
                ring_attention(q, k, v, **{name: wanted}, **keywords)
            for off in (t.no_grad, t.inference_mode):
                with off():
                    found = ring_attention(q, k, v, **{name: wanted}, **keywords)
                assert not getattr(found, "weighted", found).requires_grad


def test_slopes_that_require_gradients_are_refused_by_a_call_that_is_remembered_too():
    t = torch()
    q, slopes = t.from_numpy(Q), t.ones(4)
    for _ in range(2):
        ringcore.ring_attention_vjp(q, q, q, alibi=slopes)
        with pytest.raises(UnsupportedError, match="alibi requires grad"):
            ringcore.ring_attention_vjp(q, q, q, alibi=slopes.clone().requires_grad_())


def test_positions_beyond_64_bits_are_refused_where_they_are_read():
    far, reads = 10**20, {"alibi": np.ones(4), "dropout": 0.1, "mask": lambda rows, columns: rows >= columns}
    for name, x in reads.items():
        keywords = {name: x, "dropout_seed": 1} if name == "dropout" else {name: x}
        refused(
            lambda given=keywords: ring_attention(Q, K, V, query_offset=far, **given),
            KeywordError,
            [
                "query_offset is [100000000000000000000, ",
                name,
                "62 bits at most",
            ],
        )
