"""The reference kernels: attention over one tile in the array API standard alone, for any library.

They work in blocks of rows and keys, so that no array of the tile's height times its width ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import array_api_compat

from ringcore.arrays import add
from ringcore.dropout import kept_weights
from ringcore.merge import empty_partial, merge
from ringcore.partial import Partial, accumulation_dtype, known
from ringcore.values import Array, Band, Capabilities, Gradients, Score, Tile, namespace

_BLOCK = 512
_LARGEST_SCORES = 1 << 21  # numbers in one block of scores over all batch entries and heads


class ReferenceKernels:
    """Attention over one tile, written once for every array library."""

    capabilities = Capabilities("reference", dropout=True)

    def forward(
        self, q: Array, k: Array, v: Array, *, score: Score, tile: Tile,
        bias: Array | None = None, mask: Array | None = None, state: Partial | None = None,
    ) -> Partial:  # fmt: skip
        """The tile's partial merged into ``state``; see `ringcore.protocols.Kernels`."""
        xp = namespace(q)
        columns = []
        for rows in _spans(0, q.shape[2], _rows_per_block(q)):
            part = empty_partial(q[:, :, slice(*rows), ...], v.shape[-1])
            for keys in _spans(*tile.band.columns(*rows, k.shape[2]), _BLOCK):
                block = _Block(q, k, v, rows, keys, score, tile, bias, mask)
                part = merge(part, block.partial())
            columns.append(part)
        if not columns:
            return state or empty_partial(q, v.shape[-1])
        joined = Partial(
            xp.concat([part.weighted for part in columns], axis=2),
            xp.concat([part.maximum for part in columns], axis=2),
            xp.concat([part.total for part in columns], axis=2),
        )
        return joined if state is None else merge(state, joined)

    def backward(
        self, dout: Array, q: Array, k: Array, v: Array, maximum: Array, total: Array, delta: Array, *,
        score: Score, tile: Tile, bias: Array | None = None, mask: Array | None = None, into: Gradients,
    ) -> Gradients:  # fmt: skip
        """``into`` plus the tile's gradients; see `ringcore.protocols.Kernels`."""
        xp = namespace(q)
        dq, dk, dv, dbias = into.dq, into.dk, into.dv, into.dbias
        for rows in _spans(0, q.shape[2], _rows_per_block(q)):
            row_part = slice(None), slice(None), slice(*rows), ...
            for keys in _spans(*tile.band.columns(*rows, k.shape[2]), _BLOCK):
                key_part = slice(None), slice(None), slice(*keys), ...
                block = _Block(q, k, v, rows, keys, score, tile, bias, mask)
                do = _grouped(xp.astype(dout[row_part], block.dtype), k.shape[1])
                weights = block.weights(*(_grouped(x[row_part], k.shape[1]) for x in (maximum, total)))
                if dv is not None:
                    dv = add(dv, key_part, xp.sum(block.product(block.dropped(weights), do, transposed=True), axis=2))
                if dq is None and dk is None and dbias is None:
                    continue
                dscores = block.score_gradient(weights, do, _grouped(delta[row_part], k.shape[1]))
                if dbias is not None:
                    part = tuple(
                        slice(0, 1) if length == 1 else slice(*span)
                        for length, span in zip(dbias.shape[2:], (rows, keys), strict=True)
                    )
                    dbias = add(dbias, (slice(None), slice(None), *part), _unbroadcast(_ungrouped(dscores), dbias))
                dscores = block.raw_gradient(dscores)
                if dq is not None:
                    dq = add(dq, row_part, _ungrouped(block.product(dscores, block.k)))
                if dk is not None:
                    dk = add(dk, key_part, xp.sum(block.product(dscores, block.q, transposed=True), axis=2))
        return Gradients(dq, dk, dv, dbias)


class _Block:
    """One block of scores [B, Hk, G, s, t]: G query heads share each key head."""

    def __init__(
        self, q: Array, k: Array, v: Array, rows: tuple[int, int], keys: tuple[int, int],
        score: Score, tile: Tile, bias: Array | None, mask: Array | None,
    ) -> None:  # fmt: skip
        xp = self.xp = namespace(q)
        self.dtype, self.score = accumulation_dtype(q), score
        row_part, key_part = slice(*rows), slice(*keys)
        self.q = _grouped(xp.astype(q[:, :, row_part, ...], self.dtype), k.shape[1])
        self.k = xp.astype(k[:, :, key_part, ...], self.dtype)[:, :, None, ...]
        self.v = xp.astype(v[:, :, key_part, ...], self.dtype)[:, :, None, ...]
        scores = (self.q * score.scale) @ xp.matrix_transpose(self.k)
        if score.softcap is not None:
            scores = xp.tanh(scores / score.softcap) * score.softcap
        self.capped = scores
        visible = None
        if not tile.band.covers(rows, keys):
            visible = _band_mask(q, rows, keys, tile.band)
        for term, index in ((mask, (row_part, key_part)), (bias, (row_part, key_part))):
            if term is None:
                continue
            heights = tuple(slice(0, 1) if n == 1 else part for n, part in zip(term.shape[2:], index, strict=True))
            cut = term[:, :, *heights]
            cut = _grouped(cut, k.shape[1]) if cut.shape[1] > 1 else cut[:, :, None, ...]
            if term is bias:
                cut = xp.astype(cut, self.dtype)
                scores = scores + cut
                cut = cut != -math.inf
            visible = cut if visible is None else visible & cut
        self.visible = visible
        self.scores = scores if visible is None else xp.where(visible, scores, -math.inf)
        self.kept: Array | None = None
        if score.dropout:
            part = tile.part(rows, keys, Band())
            self.kept = _grouped(kept_weights(score, part, q, self.dtype), k.shape[1])

    def dropped(self, weights: Array) -> Array:
        """What dropout leaves of the weights, which their sum does not know of."""
        return weights if self.kept is None else weights * self.kept

    def partial(self) -> Partial:
        """The block's own partial [B, H, s, ...]."""
        xp = self.xp
        maximum = xp.max(self.scores, axis=-1)
        reference = xp.where(maximum == -math.inf, 0.0, maximum)
        weights = xp.exp(self.scores - reference[..., None])
        total = xp.sum(weights, axis=-1)
        weighted = self.product(self.dropped(weights), self.v)
        return Partial(*(_ungrouped(x) for x in (weighted, maximum, total)))

    def weights(self, maximum: Array, total: Array) -> Array:
        """exp(s - maximum) / total with the finished row's statistics; 0 in rows that saw no key.

        A hidden pair has 0 also in a row that a poisoned key has made NaN: it must not reach other keys' gradients.
        """
        xp = self.xp
        seen = ((maximum != -math.inf) & (total != 0))[..., None]
        scores = xp.where(seen, self.scores, -math.inf)
        reference = xp.where(seen, maximum[..., None], 0.0)
        weights = xp.exp(scores - reference) / xp.where(seen, total[..., None], 1.0)
        return xp.where(scores == -math.inf, 0.0, weights)

    def score_gradient(self, weights: Array, dout: Array, delta: Array) -> Array:
        """The gradient of the scores after softcap, bias and mask."""
        gradient = weights * (self.dropped(dout @ self.xp.matrix_transpose(self.v)) - delta[..., None])
        return self.xp.where(self.scores == -math.inf, 0.0, gradient)

    def raw_gradient(self, gradient: Array) -> Array:
        """The gradient of q.k, given that of the scores."""
        if self.score.softcap is not None:
            inner = self.capped / self.score.softcap
            gradient = gradient * (1.0 - inner * inner)
            gradient = self.xp.where(self.scores == -math.inf, 0.0, gradient)
        return gradient * self.score.scale

    def product(self, weights: Array, values: Array, transposed: bool = False) -> Array:
        """weights @ values (or weights transposed), in which a hidden pair never meets a NaN or an infinity.

        A visible one that does shows it.
        """
        xp = self.xp
        visible = xp.astype(self.scores != -math.inf, self.dtype)
        if transposed:
            weights, visible = xp.matrix_transpose(weights), xp.matrix_transpose(visible)
        finite = xp.isfinite(values)
        if known(xp.all(finite)):
            return weights @ values
        values, clean = xp.broadcast_arrays(values, xp.where(finite, values, 0.0))
        shown = [xp.astype(x, self.dtype) for x in (values == math.inf, values == -math.inf, xp.isnan(values))]
        plus, minus, nan = (visible @ x > 0 for x in shown)
        poison = xp.where(plus, math.inf, xp.where(minus, -math.inf, 0.0))
        poison = xp.where(nan | (plus & minus), math.nan, poison)
        return weights @ clean + xp.astype(poison, self.dtype)


def _rows_per_block(q: Array) -> int:
    batch, heads = q.shape[:2]
    return int(max(16, min(_BLOCK, _LARGEST_SCORES // max(1, batch * heads * _BLOCK))))


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, length):
        yield first, min(stop, first + length)


def _band_mask(like: Array, rows: tuple[int, int], keys: tuple[int, int], band: Band) -> Array:
    xp, device = namespace(like), array_api_compat.device(like)
    distance = xp.arange(*keys, dtype=xp.int64, device=device)[None, :]
    distance = distance - xp.arange(*rows, dtype=xp.int64, device=device)[:, None]
    visible = xp.ones(distance.shape, dtype=xp.bool, device=device)
    if band.lo is not None:
        visible = visible & (distance >= band.lo)
    if band.hi is not None:
        visible = visible & (distance <= band.hi)
    return visible


def _grouped(x: Array, key_heads: int) -> Array:
    """[B, H, ...] as [B, Hk, G, ...]: query head h reads key head h // G."""
    xp = namespace(x)
    return xp.reshape(x, (x.shape[0], key_heads, x.shape[1] // key_heads, *x.shape[2:]))


def _ungrouped(x: Array) -> Array:
    xp = namespace(x)
    return xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))


def _unbroadcast(gradient: Array, like: Array) -> Array:
    """The gradient summed over the axes that ``like`` has only once."""
    xp = namespace(gradient)
    axes = tuple(i for i in range(4) if like.shape[i] == 1 and gradient.shape[i] != 1)
    return xp.sum(gradient, axis=axes, keepdims=True) if axes else gradient


def load(sharers: int = 1) -> Any:
    """The reference kernels, as an entry point."""
    return ReferenceKernels()
