"""Attention over one tile by cuDNN, for arrays of any library that tells where they are."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import array_api_compat

from ringcore import Array, Band, Capabilities, Gradients, Partial, Score, Tile
from ringcore_cudnn.arrays import Arrays
from ringcore_cudnn.engine import Engine
from ringcore_cudnn.graphs import Problem
from ringcore_cudnn.hiding import added, normalised, seen_alone

_BLOCK = 128  # keys; where backward forgets those past the end, exp(0 - lse) can overflow
_BYTES = 16  # that cuDNN loads at once
_ALIGNED = 8  # numbers of a half type in them

HALF = frozenset({"float16", "bfloat16"})


class CudnnFrontend:
    """cuDNN's attention with a mask, on arrays of the library that ``arrays`` speaks for.

    name, library, devices, largest_head: as in `ringcore.Capabilities`.
    """

    def __init__(self, arrays: Arrays, name: str, library: str, devices: frozenset[str], largest_head: int) -> None:
        self._arrays, self._engine = arrays, Engine()
        self.capabilities = Capabilities(
            name, dtypes=HALF, libraries=frozenset({library}), devices=devices, bias=False, softcap=False,
            bias_gradient=False, fused=True, half_gradients=True, bands="windows", preference=15, poison_rows=False,
            largest_head=largest_head,
        )  # fmt: skip

    def capturing(self) -> bool:
        """Whether work is recorded for a graph, not run."""
        return self._arrays.capturing()

    def forward(
        self, q: Array, k: Array, v: Array, *, score: Score, tile: Tile,
        bias: None = None, mask: Array | None = None, state: None = None,
    ) -> Partial:  # fmt: skip
        """The tile's own partial; see `ringcore.Kernels`."""
        term, width = self._term(mask, q, k), v.shape[3]
        q, k, v = self._padded(q, *seen_alone(self._arrays, mask, k, v))
        out, lse = self._attend(q, k, v, term, tile.band, score.scale)
        out = self._cut(out, width)
        if mask is not None:
            return normalised(self._arrays, out, lse)
        return Partial(out, lse, self._arrays.ones(lse))

    def backward(
        self, dout: Array, q: Array, k: Array, v: Array, maximum: Array, total: Array, delta: None, *,
        score: Score, tile: Tile, bias: None = None, mask: Array | None = None, into: Gradients, out: Array,
        lse: Array, dlse: Array | None,
    ) -> Gradients:  # fmt: skip
        """The tile's own gradients; see `ringcore.Kernels`."""
        term, widths = self._term(mask, q, k), (q.shape[3], k.shape[3], v.shape[3])
        dout, q, k, v, out = self._padded(dout, q, *seen_alone(self._arrays, mask, k, v), out)
        found = self._pull_back(dout, q, k, v, out, lse, term, tile.band, score.scale)
        if dlse is None:
            return Gradients(*map(self._cut, found, widths))
        # Scores get weights * (dout v - dout out): with v 1 and out 0, dlse in dout's place gives its part of them.
        xp = self._arrays.xp
        dlse = _in_first_column(dlse, q.dtype)
        ones = xp.ones((*k.shape[:3], _ALIGNED), dtype=q.dtype, device=array_api_compat.device(q))
        more = self._pull_back(dlse, q, k, ones, xp.zeros_like(dlse), lse, term, tile.band, score.scale)
        dq, dk = (xp.astype(x, xp.float32) + y for x, y in zip(found[:2], more[:2], strict=True))
        return Gradients(*map(self._cut, (dq, dk, found[2]), widths))

    def _attend(
        self, q: Array, k: Array, v: Array, term: Array | None, band: Band, scale: float
    ) -> tuple[Array, Array]:
        """out [B, H, S, E] and lse [B, H, S]."""
        rows = q.shape[2]
        if rows == k.shape[2] == 1:
            q = _two_rows(q)
        out = self._rows_like(q, v.shape[3])
        lse = self._arrays.empty(q.shape[:3], q, self._arrays.xp.float32)
        self._run({"q": q, "k": k, "v": v} | _masked(term, q), {"out": out, "lse": lse}, band, scale)
        return (out, lse) if q.shape[2] == rows else (out[:, :, :rows], lse[:, :, :rows])

    def _pull_back(
        self, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, term: Array | None, band: Band,
        scale: float,
    ) -> list[Array]:  # fmt: skip
        """dq, dk and dv in q's dtype: cuDNN leaves wider ones unwritten."""
        rows = q.shape[2]
        if rows == k.shape[2] == 1:
            q, out, dout, lse = (_two_rows(x) for x in (q, out, dout, lse))
        given = {"q": q, "k": k, "v": v, "out": out, "dout": dout} | _masked(term, q)
        given["lse"] = self._packed(lse)
        if k.shape[2] % _BLOCK or rows == 1:
            given |= _lengths(q, k)
        found = {name: self._rows_like(x, x.shape[3]) for name, x in (("dq", q), ("dk", k), ("dv", v))}
        self._run(given, found, band, scale, deterministic=self._arrays.deterministic())
        dq, dk, dv = found.values()
        return [dq if dq.shape[2] == rows else dq[:, :, :rows], dk, dv]

    def _run(
        self, given: dict[str, Array], found: dict[str, Array], band: Band, scale: float, deterministic: bool = False
    ) -> None:
        arrays, like = self._arrays, given["q"]
        given = {name: self._aligned(x) if name in _LOADED else x for name, x in given.items()} | found
        operands = tuple([(name, x.shape, arrays.strides(x), x.dtype) for name, x in given.items()])
        problem = Problem(operands, scale, band, deterministic)
        addresses = tuple([arrays.address(x) for x in given.values()])
        with arrays.on(like):
            self._engine.run(
                problem, addresses, device=arrays.device(like), stream=arrays.stream(like),
                allocate=lambda size: arrays.allocate(size, like),
            )  # fmt: skip

    def _padded(self, *arrays: Array) -> tuple[Array, ...]:
        """The arrays with columns of 0 more, as many as cuDNN wants, which add nothing to scores or sums."""
        return tuple(x if x.shape[3] % _ALIGNED == 0 else self._widened(x) for x in arrays)

    def _widened(self, x: Array) -> Array:
        width = x.shape[3]
        wide = self._rows_like(x, width + -width % _ALIGNED)
        wide[..., :width] = x
        wide[..., width:] = 0
        return wide

    def _cut(self, x: Array, width: int) -> Array:
        """x without columns past ``width``, in memory without gaps."""
        if x.shape[3] == width:
            return x
        cut = self._arrays.empty((*x.shape[:3], width), x)
        cut[...] = x[..., :width]
        return cut

    def _term(self, mask: Array | None, q: Array, k: Array) -> Array | None:
        """What is added to the scores for a mask, as cuDNN loads it; rows that are all alike stay one."""
        return None if mask is None else self._aligned(added(self._arrays, q, mask, k.shape[2]))

    def _aligned(self, x: Array) -> Array:
        """x, or a copy if its rows do not begin at multiples of 16 bytes: cuDNN loads so many, and does not ask."""
        if self._arrays.address(x) % _BYTES == 0 and _rows_aligned(x.shape, self._arrays.strides(x)):
            return x
        width = x.shape[3]
        copy = self._arrays.empty((*x.shape[:3], width + -width % _ALIGNED), x)[..., :width]
        copy[...] = x
        return copy

    def _packed(self, x: Array) -> Array:
        """x [B, H, S] without gaps, or a copy."""
        _, heads, rows = x.shape
        if self._arrays.strides(x) == (heads * rows, rows, 1) and self._arrays.address(x) % _BYTES == 0:
            return x
        copy = self._arrays.empty(tuple(x.shape), x)
        copy[...] = x
        return copy

    def _rows_like(self, x: Array, width: int) -> Array:
        """Memory for [B, H, S, width], heads and rows in the order in which x has them."""
        batch, heads, rows, _ = x.shape
        strides = self._arrays.strides(x)
        if strides[1] < strides[2]:
            return self._arrays.empty((batch, rows, heads, width), x).swapaxes(1, 2)
        return self._arrays.empty((batch, heads, rows, width), x)


_LOADED = frozenset({"q", "k", "v", "out", "dout"})


@lru_cache(maxsize=1024)
def _rows_aligned(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether all rows begin so many numbers, or a multiple, apart, and have no gaps."""
    return strides[3] == 1 and all(strides[axis] % _ALIGNED == 0 or shape[axis] == 1 for axis in range(3))


def _masked(term: Array | None, q: Array) -> dict[str, Array]:
    """The operand for what is added to the scores, with as many rows as q; none is copied."""
    if term is None:
        return {}
    xp, (batch, heads, _, columns) = array_api_compat.array_namespace(term), term.shape
    return {"mask": xp.broadcast_to(term, (batch, heads, q.shape[2], columns))}


def _two_rows(x: Array) -> Array:
    """x with a second row, of 0, which adds nothing to gradients: cuDNN takes no tile of one row and one key."""
    xp = array_api_compat.array_namespace(x)
    return xp.concat([x, xp.zeros_like(x)], axis=2)


def _lengths(q: Array, k: Array) -> dict[str, Array]:
    """How many rows and keys there are, told to cuDNN once more, so that it hides what is past the end."""
    xp, device = array_api_compat.array_namespace(q), array_api_compat.device(q)
    lengths = {"q_lengths": q.shape[2], "k_lengths": k.shape[2]}
    return {name: xp.full((q.shape[0],), length, dtype=xp.int32, device=device) for name, length in lengths.items()}


def _in_first_column(x: Array, dtype: Any) -> Array:
    """x [B, H, S] as the first of columns [B, H, S, 8], the others 0."""
    xp = array_api_compat.array_namespace(x)
    columns = xp.zeros((*x.shape, _ALIGNED), dtype=dtype, device=array_api_compat.device(x))
    columns[..., 0] = xp.astype(x, dtype)
    return columns
