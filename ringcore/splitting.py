"""Few queries over many keys: the keys in equal parts side by side, so that a whole device has work.

A kernel shares its device by batch entries, heads and blocks of queries. With one query there are few of those; but
parts of the keys can be entries of a batch, which is a view, and their partials are merged like any others.
"""

from __future__ import annotations

from ringcore.merge import fields, merge_stacked
from ringcore.partial import Partial
from ringcore.protocols import Kernels
from ringcore.values import Array, Score, Tile, namespace

_BLOCK = 128  # keys: parts are whole blocks of a kernel
_FEWEST = 1024  # keys of a part: it takes as long as what else is done for it


def forward_in_parts(kernels: Kernels, q: Array, k: Array, v: Array, *, score: Score, tile: Tile) -> Partial | None:
    """The tile's partial, as `Kernels.forward` gives it without bias and mask; None where it is better not cut.

    Asks the kernels, if they have it, for ``splits(q, k)``: into how many parts a device takes the keys best.
    """
    splits = getattr(kernels, "splits", None)
    if splits is None or tile.parts or not tile.band.unbounded:
        return None
    count = min(splits(q, k), k.shape[2] // _FEWEST)
    if count < 2:
        return None
    length = k.shape[2] // count // _BLOCK * _BLOCK
    found = [
        _entry(kernels, *(x[n : n + 1, ...] for x in (q, k, v)), count=count, length=length, score=score, tile=tile)
        for n in range(q.shape[0])
    ]
    if len(found) == 1:
        return found[0]
    xp = namespace(q)
    return Partial(*(xp.concat(parts, axis=0) for parts in zip(*map(fields, found), strict=True)))


def _entry(
    kernels: Kernels, q: Array, k: Array, v: Array, *, count: int, length: int, score: Score, tile: Tile
) -> Partial:
    """One entry of the batch: its parts of ``length`` keys, and what remains of the keys by itself."""
    xp, done, height = namespace(q), count * length, tile.height
    several = xp.concat([q] * count, axis=0)
    keys, values = (_parts(x[:, :, :done, :], count) for x in (k, v))
    found = [kernels.forward(several, keys, values, score=score, tile=tile.part((0, height), (0, length), tile.band))]
    if done < k.shape[2]:
        rest = tile.part((0, height), (done, tile.width), tile.band)
        found.append(kernels.forward(q, k[:, :, done:, :], v[:, :, done:, :], score=score, tile=rest))
    stacked = zip(*map(fields, found), strict=True)
    return merge_stacked(Partial(*(xp.concat(parts, axis=0)[:, None, ...] for parts in stacked)))


def _parts(x: Array, count: int) -> Array:
    """[1, H, T, D] as [count, H, T / count, D], a view where the library has views."""
    xp, (_, heads, length, width) = namespace(x), x.shape
    return xp.permute_dims(xp.reshape(x[0, ...], (heads, count, length // count, width)), (1, 0, 2, 3))
