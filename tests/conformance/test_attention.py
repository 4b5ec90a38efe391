"""Every combination of keywords, layouts, ring sizes and shapes against dense attention in float64."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from cases import Case, draw, layouts_for
from oracle import dense
from tolerances import GRADIENT, OUT, logit_factor


@lru_cache(maxsize=512)
def truth_of(case: Case):
    arrays, keywords = draw(case)
    return dense(*(arrays[name] for name in ("q", "k", "v")), keywords, arrays["dout"], arrays["dlse"])


def expected(case: Case):
    # Layout, ring size and axes must not matter, so they share one truth.
    return truth_of(Case(case.feature, "contiguous", 1, case.shape, case.dtype))


def check_out(case: Case, truth, out, lse) -> None:
    allowed = OUT[case.dtype] * logit_factor(truth.largest_logit)
    assert out.shape == truth.out.shape
    assert lse.shape == truth.lse.shape
    error = np.abs(out - truth.out)
    assert (error <= allowed * np.maximum(truth.row_scale, 1e-300)).all(), f"out is off by {error.max()}"
    seen = np.isfinite(truth.lse)
    assert (lse[~seen] == -np.inf).all()
    assert (out[~seen] == 0).all()
    scale = np.maximum(1.0, np.abs(truth.lse[seen]))
    assert (np.abs(lse[seen] - truth.lse[seen]) <= allowed * scale).all()


def test_out_and_lse_equal_dense_attention(attend, case):
    arrays, keywords = draw(case)
    kept = {name: x.copy() for name, x in arrays.items()}
    result = attend(arrays, keywords, layouts_for(case), case.size, case.axes)
    if result is None:
        return
    check_out(case, expected(case), *result[:2])
    for name, x in arrays.items():
        assert (x == kept[name]).all(), f"{name} was written to"


def test_gradients_equal_dense_attention(attend, case):
    arrays, keywords = draw(case)
    given = [name for name in ("bias", "sinks", "prefix_k", "prefix_v") if name.partition("_")[0] in keywords]
    wrt = ("q", "k", "v", *given)
    result = attend(arrays, keywords, layouts_for(case), case.size, case.axes, wrt)
    if result is None:
        return
    out, lse, gradients = result
    truth = expected(case)
    check_out(case, truth, out, lse)
    allowed = GRADIENT[case.dtype] * logit_factor(truth.largest_logit)
    for name in wrt:
        due, came = truth.gradients[name], gradients[name]
        assert came.shape == due.shape
        assert came.dtype.name == case.dtype
        error = np.abs(came - due).max(initial=0.0)
        assert error <= allowed * max(1.0, np.abs(due).max(initial=0.0)), f"d{name} is off by {error}"
