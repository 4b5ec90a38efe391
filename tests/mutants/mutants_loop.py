"""A wrong ring loop, wrong gradients, and calls on which the ranks do not agree."""

from __future__ import annotations

from mutant import PLAN, PRECISION, REPORT, RING, Mutant

_FORWARD = """\
        return self.kernels.forward(self.q[rows], k[keys], v[keys], score=self.score, tile=tile, **terms, **state)
"""
_CHUNK = """\
        part = self.kernels.forward(self.q[rows], k[keys], v[keys], score=self.score, tile=tile, **terms)
        piece = state.get("state")
        chunk = part.out if piece is None else piece.weighted + part.out
"""
_BACKWARD = """\
        return forward.kernels.backward(
            self.dout[rows], forward.q[rows], k[keys], v[keys],
            self.maximum[rows], self.total[rows], None if self.delta is None else self.delta[rows],
            score=forward.score, tile=tile, into=into, **terms,
            **{name: None if x is None else x[rows] for name, x in self.rows.items()},
        )  # fmt: skip
"""
_LOCAL = """\
        here = forward.kernels.forward(forward.q[rows], k[keys], v[keys], score=forward.score, tile=tile, **terms)
"""
FUSED = "tests/test_probation.py"

MUTANTS = (
    Mutant(
        "per-chunk softmax summed",
        "ringcore/forward_work.py",
        _FORWARD,
        f"{_CHUNK}        return Partial(chunk, part.maximum * 0, part.total * 0 + 1)\n",
        REPORT,
        "every_ring_size",
    ),
    Mutant(
        "per-chunk averaged",
        "ringcore/forward_work.py",
        _FORWARD,
        f"{_CHUNK}        seen = 0 if piece is None else piece.total\n"
        "        return Partial(chunk, part.maximum * 0, part.total * 0 + 1 + seen)\n",
        REPORT,
        "every_ring_size",
    ),
    Mutant(
        "the last chunk only",
        "ringcore/forward_work.py",
        "score=self.score, tile=tile, **terms, **state)",
        "score=self.score, tile=tile, **terms)",
        REPORT,
        "every_ring_size",
    ),
    Mutant(
        "mask swallowed: ring",
        "ringcore/forward_work.py",
        'return {"bias": bias, "mask": mask}',
        'return {"bias": bias, "mask": None}',
        RING,
        "out_and_lse and mask",
    ),
    Mutant(
        "bias swallowed: ring",
        "ringcore/forward_work.py",
        'return {"bias": bias, "mask": mask}',
        'return {"bias": None, "mask": mask}',
        RING,
        "out_and_lse and bias",
    ),
    Mutant(
        "local columns of a bias or mask taken for global ones",
        "ringcore/arrays.py",
        "wanted = (tile.batch, tile.q_heads, tile.rows, slice_of(columns))",
        "wanted = (tile.batch, tile.q_heads, tile.rows, tile.columns)",
        RING,
        "out_and_lse and bias and contiguous",
    ),
    Mutant(
        "stale K, V in backward",
        "ringcore/backward_work.py",
        """ they are wanted.\"\"\"
        k, v = block
""",
        """ they are wanted.\"\"\"
        k, v = block if block is self.forward.prefix else self.forward.visiting()
""",
        PRECISION,
        "within_their_bounds and plain-float64-3",
    ),
    Mutant(
        "local lse in backward",
        "ringcore/backward_work.py",
        _BACKWARD,
        _LOCAL + _BACKWARD.replace("self.maximum[rows], self.total[rows]", "here.maximum, here.total"),
        RING,
        "gradients and plain",
    ),
    Mutant(
        "local out in backward",
        "ringcore/backward_work.py",
        _BACKWARD,
        _LOCAL
        + _BACKWARD.replace("None if self.delta is None else self.delta[rows]", "(self.dout[rows] * here.out).sum(-1)"),
        RING,
        "gradients and plain",
    ),
    Mutant(
        "local lse in backward: fused",
        "ringcore/backward_work.py",
        _BACKWARD,
        _LOCAL + _BACKWARD.replace("None if x is None", "here.lse if name == 'lse' else None if x is None"),
        FUSED,
        "exact",
    ),
    Mutant(
        "a part is added to what is already divided",
        "ringcore/merge.py",
        "    state = state.widened\n    merged",
        "    merged",
        FUSED,
        "exact",
    ),
    Mutant(
        "what a fused kernel leaves is never looked at",
        "ringcore/probation.py",
        "known[key] = _tried(kernels, q, v.shape[3], asked)",
        "known[key] = None",
        FUSED,
        "refused",
    ),
    Mutant(
        "the last partial of fused kernels left out",
        "ringcore/forward_work.py",
        "empty_partial(self.q, self.v.shape[-1]), dtype, last)",
        "empty_partial(self.q, self.v.shape[-1]), dtype, None)",
        f"{RING} --backend torch",
        "dense_attention and causal and float16",
    ),
    Mutant(
        "accumulators of many hops travel in a half type",
        "ringcore/backward_work.py",
        "return ranks == 2 and kernels",
        "return kernels",
        "tests/test_gradient_sums.py",
        "many_ranks",
    ),
    Mutant(
        "a third gradient is added in a half type",
        "ringcore/sums.py",
        "self._total = add(widened(self._started()), *self._last)",
        "self._total = add(self._started(), *self._last)",
        "tests/test_gradient_sums.py",
        "accumulation_dtype",
    ),
    Mutant(
        "tiles not counted in the rows that accumulators are carried for",
        "ringcore/ring.py",
        "columns = slice(tile.columns.start - back, tile.columns.stop - back, tile.columns.step)",
        "columns = tile.columns",
        f"{PLAN}/test_ring_plans.py",
        "loop",
        error="IndexError",
    ),
    Mutant(
        "delta without dlse",
        "ringcore/backward_work.py",
        "return delta if dlse is None else delta - xp.astype(dlse, dtype)",
        "return delta",
        RING,
        "gradients and plain",
    ),
    Mutant(
        "delta of the rounded out",
        "ringcore/backward_work.py",
        "self.delta = _delta(dout, wide, dlse)",
        "self.delta = _delta(dout, out.astype(wide.dtype), dlse)",
        PRECISION,
        "half_types_are_rounded_once",
    ),
    Mutant(
        "delta with the sign of dlse turned",
        "ringcore/backward_work.py",
        "delta - xp.astype(dlse, dtype)",
        "delta + xp.astype(dlse, dtype)",
        RING,
        "gradients and plain",
    ),
    Mutant(
        "dK, dV returned one rank off: result",
        "ringcore/prepared.py",
        "(blocks for blocks in carried if blocks is not None)",
        "(blocks for blocks in [*carried[1:], carried[0]] if blocks is not None)",
        PRECISION,
        "within_their_bounds and plain-float64-3",
    ),
    Mutant(
        "dK, dV without the hop that takes them home",
        "ringcore/ring.py",
        "own = work.combine((yield Finish(token))[move], own or (), move.rows)",
        "yield Finish(token)",
        RING,
        "gradients and plain",
    ),
    Mutant(
        "dK, dV of the last guest alone",
        "ringcore/ring.py",
        "share = work.combine(arrived[step.carry_in], share)",
        "pass",
        RING,
        "gradients and plain",
    ),
    Mutant(
        "gradient dtype hard-coded",
        "ringcore/prepared.py",
        "xp.astype(gradient, like.dtype, copy=False)",
        "xp.astype(gradient, self._xp.float32, copy=False)",
        RING,
        "gradients and plain",
    ),
    Mutant(
        "gradient left in the accumulation dtype",
        "ringcore/prepared.py",
        "self._xp.astype(gradient, like.dtype, copy=False)",
        "gradient",
        PRECISION,
        "half_types_are_rounded_once",
    ),
    Mutant(
        "gradients summed in the dtype of k",
        "ringcore/sums.py",
        "xp.zeros(x.shape, dtype=accumulation_dtype(x),",
        "xp.zeros(x.shape, dtype=x.dtype,",
        PRECISION,
        "half_types_are_rounded_once",
    ),
    Mutant(
        "gradients in the order of the function, not of wrt",
        "ringcore/prepared.py",
        "for name in wrt)\n\n    def _joined",
        "for name in sorted(wrt))\n\n    def _joined",
        "tests/test_refusals.py",
        "wrt_is_read",
    ),
    Mutant(
        "gradient of a shared bias of one rank alone",
        "ringcore/replicated.py",
        "        total = total + part\n",
        "        pass\n",
        RING,
        "gradients and row_bias",
    ),
    Mutant(
        "send buffer overwritten in flight: accumulators",
        "ringcore/backward_work.py",
        "        dk, dv = (zeros(x) if want else None for x, want in zip(block, wanted, strict=True))\n",
        "        dk, dv = self.__dict__.setdefault(f'of {len(tiles)} tiles {k.shape}', [zeros(x) for x in block])\n"
        "        dk[...] = 0\n",
        RING,
        "gradients and plain",
    ),
)
