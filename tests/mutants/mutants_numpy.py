"""Wrong NumPy kernels: the lazy rescale, the edges of bands, poison, and their gradients."""

from __future__ import annotations

from mutant import KERNELS, RING, Mutant

FORWARD = "adapters/ringcore_numpy/forward.py"
BACKWARD = "adapters/ringcore_numpy/backward.py"
TILES = "adapters/ringcore_numpy/tiles.py"

_EDGES = """\
        for part, hidden in _edges(self.band, rows, columns, _staircases(self._size)):
            np.copyto(scores[:, part], -np.inf, where=hidden)
"""
_MASK = "np.copyto(scores, -np.inf, where=~cut(self.mask, at, rows, columns))"
_FINISH = """\
        self._careful.finish(scores, at, span, columns, scratch)
        visible = None
        if not np.isfinite(np.sum(v)):
            visible = self._careful.visible(scores.shape, at, span, columns)
        old = np.where(rows.top == -np.inf, -np.inf, rows.reference)
        new = np.maximum(old, np.maximum.reduce(scores, axis=1))
"""
_BIAS = """\
        if bias is not None:
            bias.add(rows.head, rows.span, columns, slopes)
"""
_SLOPE = """\
        if slope is not None:
            slopes *= slope
            np.copyto(slopes, 0, where=hidden)
"""

MUTANTS = (
    Mutant(
        "no rescale on a new maximum: lazy",
        FORWARD,
        "            _shrink(rows, np.exp(-np.maximum(move, 0)))\n",
        "",
        KERNELS,
        "references_move",
    ),
    Mutant(
        "no rescale on a new maximum: careful",
        FORWARD,
        "        _shrink(rows, np.exp(old - base))\n",
        "",
        KERNELS,
        "test_bias",
    ),
    Mutant(
        "no rescale on a new maximum: at the end",
        FORWARD,
        "        _shrink(rows, factor)\n",
        "",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "chunk output scaled by exp(-maximum) only: careful",
        FORWARD,
        "_shrink(rows, np.exp(old - base))",
        "_shrink(rows, np.exp(-base))",
        KERNELS,
        "test_bias",
    ),
    Mutant(
        "overflow of exp without a maximum: lazy",
        FORWARD,
        "_SLACK = 8.0 ",
        "_SLACK = 1e9 ",
        KERNELS,
        "large_logits",
    ),
    Mutant(
        "rows far below their reference underflow",
        FORWARD,
        "np.minimum.reduce(rows.top) >= -_SLACK",
        "True",
        KERNELS,
        "large_logits",
    ),
    Mutant(
        "a reference far away costs digits: in the same block",
        FORWARD,
        "if farthest > _COARSE:",
        "if False:",
        KERNELS,
        "far_away",
    ),
    Mutant(
        "a reference far away costs digits: in the state",
        FORWARD,
        "return bool(np.max(np.abs(rows.reference)) <= _LARGEST)",
        "return True",
        KERNELS,
        "far_away",
    ),
    Mutant(
        "reference before bias",
        FORWARD,
        _FINISH,
        "        top = np.maximum.reduce(scores, axis=1)\n"
        + _FINISH.replace("np.maximum.reduce(scores, axis=1)", "top"),
        KERNELS,
        "test_bias",
    ),
    Mutant(
        "-inf minus -inf: reference of a row that saw nothing",
        FORWARD,
        "base = np.where(new == -np.inf, 0, new)",
        "base = new",
        KERNELS,
        "test_mask",
    ),
    Mutant(
        "-inf minus -inf: end of a row that saw nothing",
        FORWARD,
        "factor = np.exp(-np.where(seen, rows.top, 0))",
        "factor = np.exp(-rows.top)",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "+inf sentinel: maximum of a row that saw nothing",
        FORWARD,
        "np.where(seen, rows.reference + rows.top, -np.inf)",
        "np.where(seen, rows.reference + rows.top, np.inf)",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "finite sentinel: edges",
        TILES,
        "np.where(hidden, -np.inf, 0.0)",
        "np.where(hidden, -1e4, 0.0)",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "finite sentinel: mask",
        TILES,
        _MASK,
        _MASK.replace("-np.inf", "-1e30"),
        KERNELS,
        "test_mask",
    ),
    Mutant(
        "half statistics: NumPy kernels",
        TILES,
        "return np.float64 if x.dtype == np.float64 else np.float32",
        "return x.dtype.type",
        KERNELS,
        "half_types",
    ),
    Mutant(
        "what an unseen row of a state holds is read",
        FORWARD,
        "            if not seen.all():\n                rows.weighted[~seen] = 0\n",
        "",
        KERNELS,
        "unseen_rows",
    ),
    Mutant(
        "scale dropped: NumPy kernels",
        FORWARD,
        "        rows.q[:, :depth] *= self._score.scale\n",
        "",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "scale dropped: keys of the NumPy backward",
        BACKWARD,
        "        k[:, :-1] *= self._score.scale\n",
        "",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "scale dropped: dk of the NumPy backward",
        BACKWARD,
        "                np.multiply(keys.dk, self._score.scale, out=keys.dk)\n",
        "",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "mask swallowed: NumPy forward",
        FORWARD,
        "self._plain = bias is None and mask is None and",
        "self._plain = bias is None and",
        KERNELS,
        "test_mask",
    ),
    Mutant(
        "mask swallowed: NumPy backward",
        BACKWARD,
        "self._plain = bias is None and mask is None and",
        "self._plain = bias is None and",
        KERNELS,
        "test_mask",
    ),
    Mutant(
        "softcap swallowed: NumPy forward",
        FORWARD,
        "and mask is None and score.softcap is None",
        "and mask is None",
        KERNELS,
        "softcap_comes",
    ),
    Mutant(
        "cap after mask: NumPy kernels",
        TILES,
        _MASK,
        _MASK.replace("-np.inf", "-np.inf if cap is None else -cap"),
        KERNELS,
        "softcap_comes",
    ),
    Mutant(
        "cap after bias: NumPy kernels",
        TILES,
        "scores += bias\n",
        "scores[...] = scores + bias if cap is None else cap * np.tanh(np.arctanh(scores / cap) + bias / cap)\n",
        KERNELS,
        "softcap_comes",
    ),
    Mutant(
        "softcap's factor missing: NumPy kernels",
        BACKWARD,
        _SLOPE,
        "",
        KERNELS,
        "softcap_comes",
    ),
    Mutant(
        "softcap's factor without the square: NumPy kernels",
        TILES,
        "np.multiply(scores, scores, out=factor)",
        "np.abs(scores, out=factor)",
        KERNELS,
        "softcap_comes",
    ),
    Mutant(
        "softcap's factor in the gradient of bias",
        BACKWARD,
        _BIAS + _SLOPE,
        _SLOPE + _BIAS,
        KERNELS,
        "softcap_comes",
    ),
    Mutant(
        "grouped heads in the wrong order: NumPy forward",
        FORWARD,
        "k_head * group + member,",
        "k_head + member * self._k_heads,",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "grouped heads in the wrong order: NumPy backward",
        BACKWARD,
        "range(task.k_head * self._group, (task.k_head + 1) * self._group)",
        "range(task.k_head, self._group * self._k_heads, self._k_heads)",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "diagonal off by one: NumPy upper edge",
        TILES,
        "step = band.hi + 1 + rows[0] - columns[0]",
        "step = band.hi + 2 + rows[0] - columns[0]",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "diagonal off by one: NumPy lower edge",
        TILES,
        "lower[:height, -step : last - step]",
        "lower[:height, 1 - step : last - step + 1]",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "0 * NaN of a hidden key: NumPy kernels",
        TILES,
        "if visible is None or np.isfinite(np.sum(values)):",
        "if True:",
        KERNELS,
        "poison_reaches",
    ),
    Mutant(
        "0 * NaN of a hidden key: NumPy backward's fast tile",
        BACKWARD,
        "return bool(np.isfinite(np.dot(flat, flat)))",
        "return True",
        KERNELS,
        "poison_reaches",
    ),
    Mutant(
        "a NaN passes for a sum that is not too large",
        FORWARD,
        "not np.isfinite(np.sum(rows.weighted) + np.sum(rows.total))",
        "np.abs(np.sum(rows.weighted) + np.sum(rows.total)) == np.inf",
        KERNELS,
        "poison_reaches",
    ),
    Mutant(
        "-inf added to a hidden NaN",
        TILES,
        _EDGES,
        "        add_edges(scores, self.band, rows, columns, self._size)\n",
        KERNELS,
        "poison_reaches",
    ),
    Mutant(
        "a NaN under a bias of -inf",
        TILES,
        "if np.isnan(np.max(scores)):",
        "if False:",
        KERNELS,
        "poison_reaches and bias",
    ),
    Mutant(
        "mask unheard where keys are poisoned",
        TILES,
        "            seen &= cut(self.mask, at, rows, columns)\n",
        "            pass\n",
        KERNELS,
        "poison_reaches and mask",
    ),
    Mutant(
        "rows without a sum give a gradient",
        BACKWARD,
        "if not dead.any():",
        "if True:",
        KERNELS,
        "without_a_sum",
    ),
    Mutant(
        "epsilon in a denominator: NumPy backward",
        BACKWARD,
        "np.reciprocal(total, dtype=self._dtype)",
        "np.reciprocal(total + 1e-8, dtype=self._dtype)",
        KERNELS,
        "test_bands",
    ),
    Mutant(
        "weights from the lse alone: NumPy backward",
        BACKWARD,
        "        np.multiply(maximum, -1.0, out=q[:, -1])\n        inverse = np.reciprocal(total, dtype=self._dtype)\n",
        "        np.negative(maximum + np.log(np.where(total > 0, total, 1)), out=q[:, -1])\n"
        "        inverse = np.ones_like(total)\n",
        KERNELS,
        "smallest_number",
    ),
    Mutant(
        "delta dropped: NumPy backward",
        BACKWARD,
        "np.multiply(self._delta[at], -inverse, out=dout[:, -1])",
        "dout[:, -1] = 0",
        RING,
        "gradients and plain",
    ),
    Mutant(
        "tasks add to the same rows in any order: dq",
        BACKWARD,
        "                    self._order.wait(number, position, job)\n",
        "",
        "tests/test_mutant_order.py",
    ),
    Mutant(
        "tasks add to the same rows in any order: bias of each row",
        BACKWARD,
        "self._order.wait(number, (index + 1) * self._group - 1, job, every_head=True)",
        "pass",
        "tests/test_mutant_order.py",
    ),
    Mutant(
        "tasks add to the same rows in any order: bias of all rows",
        BACKWARD,
        "            self._order.wait(number, EVERYTHING, job, every_head=True)\n",
        "",
        "tests/test_mutant_order.py",
    ),
    Mutant(
        "BLAS left at one thread",
        "adapters/ringcore_numpy/threads.py",
        "            for library, before in self._shared:\n                _set(library, before)\n",
        "            pass\n",
        KERNELS,
        "errors_come_out",
    ),
)
