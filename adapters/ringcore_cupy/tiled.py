"""Attention over one tile by cuBLAS, in blocks of scores that stay in a GPU's cache: any keyword, dtype and width."""

from __future__ import annotations

from typing import Any

import cupy

from ringcore import Array, Capabilities, Gradients, Partial, Score, Tile, UnsupportedError, empty_partial
from ringcore_cupy.blocks import MOST_KEYS, Scratch, Sides
from ringcore_cupy.memory import told
from ringcore_cupy.operands import accumulation
from ringcore_cupy.terms import Terms
from ringcore_cupy.tiled_backward import Backward
from ringcore_cupy.tiled_forward import Forward

_ROOM = 32 << 20  # bytes of a block of scores


class Tiled:
    """Attention over one tile; a row that sees NaN or an infinity in v is NaN in all its columns.

    room: how many bytes the scores of a block take. most_keys: how many keys it has, up to 1024.
    """

    capabilities = Capabilities(
        "cupy.cuda.tiled", libraries=frozenset({"cupy"}), devices=frozenset({"cuda"}), dropout=True, preference=5
    )

    def __init__(self, room: int = _ROOM, most_keys: int = MOST_KEYS) -> None:
        self._room, self._most_keys = room, min(most_keys, MOST_KEYS)

    def forward(
        self, q: Array, k: Array, v: Array, *, score: Score, tile: Tile,
        bias: Array | None = None, mask: Array | None = None, state: Partial | None = None,
    ) -> Partial:  # fmt: skip
        """The tile's partial merged into ``state``, in place; see `ringcore.Kernels`.

        Raises TileMemoryError if there is no room for the scratch, UnsupportedError while a graph is captured.
        """
        wide, sides = accumulation(q), self._sides(q, k)
        heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
        with q.device, told(rows, keys, heads, Scratch.bytes(heads, sides, wide, q.dtype) + v.nbytes):
            state = empty_partial(q, v.shape[3]) if state is None else _taken(state, wide)
            if state.maximum.size and keys:
                terms = Terms(score, tile, bias, mask, wide, q.dtype)
                Forward(q, k, v, state, terms, Scratch(heads, sides, wide, q.dtype)).run(tile.band, sides, score.scale)
        return state

    def backward(
        self, dout: Array, q: Array, k: Array, v: Array, maximum: Array, total: Array, delta: Array, *,
        score: Score, tile: Tile, bias: Array | None = None, mask: Array | None = None, into: Gradients,
    ) -> Gradients:  # fmt: skip
        """``into`` with the tile's gradients added in place; see `ringcore.Kernels`.

        Raises TileMemoryError if there is no room for the scratch, UnsupportedError while a graph is captured.
        """
        wide, sides = accumulation(q), self._sides(q, k)
        heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
        copies = dout.nbytes + q.nbytes + k.nbytes
        with q.device, told(rows, keys, heads, 2 * Scratch.bytes(heads, sides, wide, q.dtype) + copies):
            if maximum.size and keys:
                terms = Terms(score, tile, bias, mask, wide, q.dtype)
                scratch, more = (Scratch(heads, sides, wide, q.dtype) for _ in range(2))
                arrays = {"dout": dout, "q": q, "k": k, "v": v}
                call = Backward(arrays, (maximum, total, delta), into, terms, scratch, more)
                call.run(tile.band, sides, score.scale)
        return into

    def reserve(self, q: Array, k: Array, v: Array, *, gradient: bool) -> None:
        """Raise TileMemoryError if there is no room for a tile of q and k and what a ring holds beside it.

        That is the tile's scratch and copies, the sums, and two blocks that visit, as long as k, with their gradients.
        """
        wide, sides = accumulation(q), self._sides(q, k)
        heads, rows, keys = q.shape[1], q.shape[2], k.shape[2]
        scratch, block = Scratch.bytes(heads, sides, wide, q.dtype), k.nbytes + v.nbytes
        numbers = q.shape[0] * heads * rows * (q.shape[3] if gradient else v.shape[3])
        sizes = [scratch, numbers * wide.itemsize, block, block, v.nbytes]
        if gradient:
            sizes += [scratch, 2 * q.nbytes + k.nbytes, *[block // q.itemsize * wide.itemsize] * 2]
        with q.device, told(rows, keys, heads, sum(sizes)):
            held = [cupy.cuda.alloc(size) for size in sizes]
            del held  # back to the pool, which has it for the tile

    def _sides(self, q: Array, k: Array) -> Sides:
        room = self._room // accumulation(q).itemsize
        return Sides.of(max(1, q.shape[1]), q.shape[2], k.shape[2], room, self._most_keys)


def _taken(state: Partial, wide: Any) -> Partial:
    """The state in the accumulation dtype, with statistics of its own: itself, if it is so."""
    arrays = state.weighted, state.maximum, state.total
    if all(x.dtype == wide for x in arrays) and all(0 not in x.strides or x.size <= 1 for x in arrays[1:]):
        return state
    return Partial(*(cupy.ascontiguousarray(x.astype(wide, copy=False)) for x in arrays))


def load(sharers: int = 1) -> Tiled:
    """The kernels, where there is a GPU; the host's cores do not matter to them.

    Raises UnsupportedError if there is none.
    """
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if not count:
        raise UnsupportedError("CuPy finds no GPU; python -c 'import cupy; cupy.show_config()' says what it sees.")
    return Tiled()
