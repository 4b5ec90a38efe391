"""Few queries over many keys in parts side by side: what kernels are given, and that the result is attention."""

from functools import reduce

import numpy as np
import pytest
from given import strict

import ringcore
from ringcore import Capabilities, Partial, empty_partial, merge
from ringcore.merge import fields, merge_stacked
from ringcore.tile import ReferenceKernels

RNG = np.random.default_rng(4)


class Splitting:
    """Fused kernels that want keys in parts, and note what they were given."""

    capabilities = Capabilities("splitting", fused=True, gradient=False)

    def __init__(self, count):
        self.count, self.given = count, []

    def splits(self, q, k):
        return self.count

    def forward(self, q, k, v, **keywords):
        assert q.shape[0] == k.shape[0] == v.shape[0]
        assert not np.isnan(k).any()
        self.given.append((k.shape[0], k.shape[2], np.shares_memory(k, k.base) if k.base is not None else False))
        part = ReferenceKernels().forward(q, k, v, **keywords)
        return Partial.from_lse(np.asarray(part.out), part.lse)

    def backward(self, *_, **keywords):
        raise NotImplementedError


def arrays(batch, rows, keys, room):
    q = RNG.standard_normal((batch, 4, rows, 8))
    k, v = (RNG.standard_normal((batch, 2, room, 8)) for _ in range(2))
    k[:, :, keys:] = v[:, :, keys:] = np.nan
    return q, k, v


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("keys", "due"), [(4096, [(4, 1024)]), (5000, [(4, 1152), (1, 392)]), (2100, [(2, 1024), (1, 52)])]
)
def test_parts_of_the_keys_are_entries_of_a_batch(batch, keys, due):
    kernels = Splitting(4)
    q, k, v = arrays(batch, 1, keys, 5100)
    out, lse = ringcore.decode_attention(q, k, v, key_lengths=[keys] * batch, kernels=kernels)
    expected = ringcore.decode_attention(q, k, v, key_lengths=[keys] * batch, kernels="reference")
    np.testing.assert_allclose(out, expected[0], atol=1e-13)
    np.testing.assert_allclose(lse, expected[1], atol=1e-13)
    tried = len(kernels.given) - batch * len(due)  # on small tiles, before they are trusted
    assert [given[:2] for given in kernels.given[tried:]] == due * batch
    assert all(view for *_, view in kernels.given[tried:])


@pytest.mark.parametrize("keywords", [{"window": (3000, 0)}, {}])
def test_what_is_banded_or_short_is_not_cut(keywords):
    kernels = Splitting(4 if keywords else 1)
    q, k, v = arrays(1, 2, 4096, 4096)
    out, _ = ringcore.decode_attention(q, k, v, kernels=kernels, **keywords)
    np.testing.assert_allclose(out, ringcore.decode_attention(q, k, v, kernels="reference", **keywords)[0], atol=1e-13)
    assert all(entries <= 2 for entries, *_ in kernels.given)


def test_bias_and_mask_are_not_cut():
    kernels = Splitting(4)
    q, k, v = arrays(1, 2, 4096, 4096)
    mask = RNG.random((2, 4096)) < 0.5
    out = ringcore.ring_attention(q, k, v, mask=mask, kernels=kernels)
    np.testing.assert_allclose(out, ringcore.ring_attention(q, k, v, mask=mask, kernels="reference"), atol=1e-13)


@pytest.mark.parametrize("library", ["numpy", "strict"])
def test_many_partials_at_once_are_merged_as_one_by_one(library):
    xp = np if library == "numpy" else strict()
    device = {} if library == "numpy" else {"device": strict().Device("device1")}
    weighted = RNG.standard_normal((5, 2, 3, 4, 6))
    maximum = 300 * RNG.standard_normal((5, 2, 3, 4))
    total = RNG.random((5, 2, 3, 4)) + 0.5
    # Rows that one, some or all saw nothing of, whatever they hold.
    for n, row in ((0, 0), (3, 0), *((n, 1) for n in range(5))):
        maximum[n, :, :, row], total[n, :, :, row], weighted[n, :, :, row] = -np.inf, np.nan, np.nan
    total[2, :, :, 2] = 0.0
    parts = [Partial(*(xp.asarray(x[n], **device) for x in (weighted, maximum, total))) for n in range(5)]
    due = reduce(merge, parts, empty_partial(parts[0].weighted, 6))
    came = merge_stacked(Partial(*(xp.stack(x) for x in zip(*map(fields, parts), strict=True))))
    for x, y in zip(fields(came), fields(due), strict=True):
        back = [np.asarray(z if library == "numpy" else z.to_device(strict().Device("CPU_DEVICE"))) for z in (x, y)]
        np.testing.assert_allclose(*back, rtol=1e-13)
