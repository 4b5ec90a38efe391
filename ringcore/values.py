"""The plain data that plans, kernels and transports exchange. Everything here is frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import array_api_compat

Array: TypeAlias = Any
"""An array of any library that follows the Python array API standard."""

Blocks: TypeAlias = tuple[Array, ...]
"""Arrays that travel together, such as one rank's (k, v)."""


def namespace(*arrays: Array) -> Any:
    """The array-API namespace of arrays of one library.

    NumPy's own where it has one: array-api-compat's cover of it imports all of NumPy, 14 MiB and 0.1 s.
    """
    if all(array_api_compat.is_numpy_array(x) and hasattr(x, "__array_namespace__") for x in arrays):
        return arrays[0].__array_namespace__()
    return array_api_compat.array_namespace(*arrays)


@dataclass(frozen=True)
class Band:
    """Which pairs of a tile are visible: row i sees column j where ``lo <= j - i <= hi``.

    i and j count rows and columns of the tile; None is unbounded.
    """

    lo: int | None = None
    hi: int | None = None

    @property
    def unbounded(self) -> bool:
        """Whether the band hides nothing, whatever the tile's shape."""
        return self.lo is None and self.hi is None

    def columns(self, start: int, stop: int, width: int) -> tuple[int, int]:
        """The half-open range of columns, out of ``width``, that some row in [start, stop) sees."""
        first = 0 if self.lo is None else max(0, start + self.lo)
        last = width if self.hi is None else min(width, stop - 1 + self.hi + 1)
        return first, max(first, last)

    def rows(self, start: int, stop: int, height: int) -> tuple[int, int]:
        """The half-open range of rows, out of ``height``, that see some column in [start, stop)."""
        return Band(_negative(self.hi), _negative(self.lo)).columns(start, stop, height)

    def covers(self, rows: tuple[int, int], columns: tuple[int, int]) -> bool:
        """Whether every pair of the half-open ranges is visible, so that no mask is needed."""
        smallest, largest = columns[0] - (rows[1] - 1), columns[1] - 1 - rows[0]
        return (self.lo is None or smallest >= self.lo) and (self.hi is None or largest <= self.hi)

    def clipped(self, height: int, width: int) -> Band:
        """The one name of this band over a tile: no bound that hides nothing in it, NOTHING if all is hidden."""
        lo = None if self.lo is None or self.lo <= -(height - 1) else self.lo
        hi = None if self.hi is None or self.hi >= width - 1 else self.hi
        hidden = height == 0 or width == 0 or (lo is not None and hi is not None and lo > hi)
        hidden = hidden or (lo is not None and lo > width - 1) or (hi is not None and hi < -(height - 1))
        return NOTHING if hidden else Band(lo, hi)

    def shifted(self, rows: int, columns: int) -> Band:
        """The same pairs, counted from an origin ``rows`` further down and ``columns`` further right."""
        return Band(*(None if bound is None else bound + rows - columns for bound in (self.lo, self.hi)))


NOTHING = Band(1, 0)
"""The band that hides every pair."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of the score matrix: local rows of q against local rows ("columns") of k and v.

    batch, q_heads, k_heads: slices of the leading axes of q and of k, v (grouped heads: query head
        h of the tile reads key head h // group of the tile).
    rows, columns: slices, possibly strided, of the local rows of q and of the visiting k, v.
    row_positions, column_positions: the global positions of those rows, as ranges in order.
    band: which pairs are visible, counted within the tile.
    parts: if there are any, only their pairs are visible. Their rows and columns follow each other; the tile's are from
        the first one's to the last one's, its positions are theirs, and its band is counted from the lower right corner
        of each.
    """

    batch: slice
    q_heads: slice
    k_heads: slice
    rows: slice
    columns: slice
    row_positions: tuple[range, ...]
    column_positions: tuple[range, ...]
    band: Band = Band()
    parts: tuple[Tile, ...] = ()

    def part(self, rows: tuple[int, int], columns: tuple[int, int], band: Band) -> Tile:
        """The tile of these rows and columns, half-open ranges counted within this one, under a band of its own."""
        return replace(
            self,
            rows=_cut(self.rows, *rows),
            columns=_cut(self.columns, *columns),
            row_positions=_cut_ranges(self.row_positions, *rows),
            column_positions=_cut_ranges(self.column_positions, *columns),
            band=band,
        )

    def places(self) -> Iterator[tuple[Tile, slice, slice]]:
        """Each of its parts, with the rows and the columns that it has of the tile's own: counted from their first."""
        for part in self.parts:
            sides = (self.rows, part.rows, part.height), (self.columns, part.columns, part.width)
            first_row, first_column = ((own.start - whole.start) // whole.step for whole, own, _ in sides)
            yield part, slice(first_row, first_row + part.height), slice(first_column, first_column + part.width)

    @property
    def heads(self) -> int:
        """How many heads of q the tile has."""
        return len(range(self.q_heads.start, self.q_heads.stop, self.q_heads.step or 1))

    @property
    def height(self) -> int:
        """How many rows of q the tile has."""
        return sum(map(len, self.row_positions))

    @property
    def width(self) -> int:
        """How many keys the tile has."""
        return sum(map(len, self.column_positions))


@dataclass(frozen=True)
class Score:
    """What turns q.k into a score, equal for the whole call.

    scale multiplies q.k; softcap, if given, then bounds it to cap * tanh(score / cap). Bias and mask come after.
    dropout is the rate at which finished weights become 0, seed what decides which ones (see `ringcore.dropout`), with
    first_head, the number of the first head here among those of the whole call.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    seed: int = 0
    first_head: int = 0


@dataclass(frozen=True)
class Move:
    """One block on its way: ``block`` is the rank that owns it, ``peer`` where it goes to or comes from.

    rows: the part of the owner's rows that travels, straight from or to the owner; None is all of them.
    """

    peer: int
    block: int
    rows: range | None = None


Held: TypeAlias = tuple[int, range | None]
"""A block, by its owner, and those of its rows that a rank holds; None is all of them."""


@dataclass(frozen=True)
class Step:
    """One stage of a rank's plan.

    block: whose visiting block the tiles read; None where nothing is computed. rows: the part of it that came here;
        None is all of them.
    sends, receives: visiting blocks that move while the tiles are computed.
    carry_in, carry_out: from whom the accumulators of ``block`` arrive, and to whom they go on with
        this step's share added. None: they start here; empty: they stay (the block is this rank's own).
    drops: blocks, or those rows of them that came here, that no later step of this rank reads or sends.
    holds: what moves here is still on its way during the next step, with which this one shares it.
    """

    block: int | None = None
    tiles: tuple[Tile, ...] = ()
    sends: tuple[Move, ...] = ()
    receives: tuple[Move, ...] = ()
    carry_in: Move | None = None
    carry_out: tuple[Move, ...] = ()
    drops: tuple[Held, ...] = ()
    rows: range | None = None
    holds: bool = False


@dataclass(frozen=True)
class Plan:
    """What one rank computes, sends and receives, decided before any array is touched.

    home: from whom the accumulators of this rank's own block arrive at the end, in the order in
        which they are added to its own share.
    queries_visit: blocks are rows of q, not of k and v.
    """

    rank: int
    size: int
    steps: tuple[Step, ...]
    home: tuple[Move, ...] = ()
    queries_visit: bool = False

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles of the plan, in order."""
        return tuple(tile for step in self.steps for tile in step.tiles)

    def seen(self, block: int, part: range | None = None) -> slice:
        """The rows of a visiting block, or of a part, from the first to the last that a tile of this rank reads."""
        tiles = (tile for step in self.steps if (step.block, step.rows) == (block, part) for tile in step.tiles)
        rows = _hull([tile.rows for tile in tiles]) if self.queries_visit else span(tiles)
        return slice(rows.start, rows.stop)


def span(tiles: Iterable[Tile]) -> range:
    """The rows of visiting k and v from the first to the last that these tiles read."""
    return _hull([tile.columns for tile in tiles])


def _hull(parts: Sequence[slice]) -> range:
    return range(min((part.start for part in parts), default=0), max((part.stop for part in parts), default=0))


@dataclass(frozen=True)
class Spec:
    """A block to be received: its shape and dtype, and an array whose library and device it shares."""

    shape: tuple[int, ...]
    like: Array
    dtype: Any

    def empty(self) -> Array:
        """A new uninitialised array of this shape, dtype and device."""
        xp = namespace(self.like)
        return xp.empty(self.shape, dtype=self.dtype, device=array_api_compat.device(self.like))


@dataclass(frozen=True)
class Gradients:
    """The gradients of a tile or a call; None where one is not wanted.

    dq [B, H, S, D], dk [B, Hk, T, D], dv [B, Hk, T, E] in the accumulation dtype; dbias in bias's own shape.
    """

    dq: Array | None = None
    dk: Array | None = None
    dv: Array | None = None
    dbias: Array | None = None


FEW = 16
"""So many queries are few."""


@dataclass(frozen=True)
class Capabilities:
    """What kernels can do; what they cannot is refused by name, or other kernels are taken.

    dtypes: names of input dtypes. libraries: top-level modules whose arrays they take; empty is any. devices: kinds of
    device, such as "cpu" and "cuda"; empty is any.
    bias, mask, softcap, window (how far to the left), dropout, gradient: which of these they do. bias_gradient: whether
    the gradients include that of a bias.
    fused: they know one tile alone. Forward returns its own partial, from out and lse; backward is given ``out``,
    ``lse`` and ``dlse`` of the finished rows, and returns its own gradients. ringcore adds both up. Before their
    first use on a device they are held against the reference kernels. half_gradients: the gradients that they return
    are of the inputs' dtype, so that nothing is lost where one travels so.
    bands: "any", or into what a tile is cut for them. "windows": no row or column meets nothing, and it is no taller
    than wide, so that a window can be aligned in the lower right corner. "triangles": no band, or causal from the
    upper left corner. "squares": that on as many rows as columns. What is neither comes in strips of ``strip`` rows
    with any band.
    parts: they take tiles with parts (see `Tile`), without bias, mask and dropout. Rows without a part saw nothing.
    preference: of several kernels that can, those with the highest are taken. preference_for_few: theirs where a rank
    has no more than `FEW` queries, as in decoding: kernels that do not share a device by keys leave most of it idle.
    poison_rows: NaN in a key that only some rows see stays out of the others.
    largest_head, head_multiple, equal_heads: bounds on the widths of k and v.
    """

    name: str
    dtypes: frozenset[str] = frozenset({"float16", "bfloat16", "float32", "float64"})
    libraries: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    bias: bool = True
    mask: bool = True
    softcap: bool = True
    window: bool = True
    dropout: bool = False
    gradient: bool = True
    bias_gradient: bool = True
    fused: bool = False
    half_gradients: bool = False
    bands: str = "any"
    strip: int = 256
    parts: bool = False
    preference: int = 0
    preference_for_few: int | None = None
    poison_rows: bool = True
    largest_head: int | None = None
    head_multiple: int = 1
    equal_heads: bool = False

    def preferred(self, queries: int) -> int:
        """Their preference for so many queries."""
        few = self.preference_for_few is not None and queries <= FEW
        return self.preference_for_few if few and self.preference_for_few is not None else self.preference


@dataclass(frozen=True)
class Begin:
    """The loop asks its driver to start moving blocks.

    kind is "visiting" or "carried"; ``blocks`` holds what each send gives, ``specs`` what each receive gets.
    """

    kind: str
    sends: tuple[tuple[Move, Blocks], ...] = ()
    receives: tuple[tuple[Move, tuple[Spec, ...]], ...] = ()


@dataclass(frozen=True)
class Finish:
    """The loop asks its driver to complete a `Begin`; the answer maps each received owner to its blocks."""

    token: Any = None


Arrived: TypeAlias = Mapping[Move, Blocks]


def _negative(bound: int | None) -> int | None:
    return None if bound is None else -bound


def _cut(part: slice, start: int, stop: int) -> slice:
    step = part.step or 1
    first = (part.start or 0) + start * step
    # The end within the array, as the standard demands.
    return slice(first, first + (stop - start - 1) * step + 1, step) if start < stop else slice(first, first, step)


def _cut_ranges(ranges: tuple[range, ...], start: int, stop: int) -> tuple[range, ...]:
    found, at = [], 0
    for run in ranges:
        part = run[max(0, start - at) : max(0, stop - at)]
        if part:
            found.append(part)
        at += len(run)
    return tuple(found)
