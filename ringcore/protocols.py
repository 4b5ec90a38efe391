"""What an adapter supplies: kernels (compute) and transports (communication).

Kernels compute one tile; a transport moves blocks. Neither knows about layouts, masks over the whole
sequence or the ring: the plan does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ringcore.partial import Partial
from ringcore.values import Array, Blocks, Capabilities, Gradients, Move, Score, Spec, Tile


@runtime_checkable
class Kernels(Protocol):
    """Attention over one tile, forward and backward.

    The arrays are already cut to the tile: q [B, H, S, D], k [B, Hk, T, D], v [B, Hk, T, E] with S the tile's
    height and T its width. bias and mask have four axes, each of the tile's length or 1.
    Kernels that need much memory beside these may have ``reserve(q, k, v, *, gradient)``, which raises where there is
    too little: it is asked about a rank's own arrays before anything is sent, so that the ring can be used again.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What these kernels can do."""
        ...

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        score: Score,
        tile: Tile,
        bias: Array | None = None,
        mask: Array | None = None,
        state: Partial | None = None,
    ) -> Partial:
        """The tile's partial merged into ``state``, whose buffers may be reused; ``fused`` kernels get no state.

        maximum is a true natural-log maximum; a row that sees no key is (0, -inf, 0).
        """
        ...

    def backward(
        self,
        dout: Array,
        q: Array,
        k: Array,
        v: Array,
        maximum: Array,
        total: Array,
        delta: Array | None,
        *,
        score: Score,
        tile: Tile,
        bias: Array | None = None,
        mask: Array | None = None,
        into: Gradients,
    ) -> Gradients:
        """``into`` plus the tile's gradients, in the accumulation dtype; fields that are None stay None.

        maximum and total [B, H, S] are those of the finished row over all keys, delta is
        rowsum(dout * out) - dlse. The buffers of ``into`` may be reused. ``fused`` kernels get no delta and an
        ``into`` of dbias alone, and three keywords more: of the finished rows ``out`` [B, H, S, E] in q's dtype and
        ``lse`` [B, H, S], +inf where a row saw no key so that exp(s - lse) is 0; and ``dlse`` [B, H, S] or None. They
        return the tile's own dq, dk and dv, in any floating dtype, beside ``into.dbias`` plus its share.
        """
        ...


class Arithmetic(Protocol):
    """How partials of one library are merged and finished, where it knows better than the array API standard.

    It may have ``check_array(q)``, which raises for arrays with which its library could not compute. It may have
    ``gathers(x)``; where that is true, partials of fused kernels, and parts of gradients, wait, up to twice all rows,
    and are brought together in one pass by ``finished_together(q, width, parts, dtype)`` and
    ``summed_together(like, parts, dtype)``; where these give None, one by one. And it may have
    ``finished_packed(stacked, dtype)``: out and lse of n partials [n, B, H, S, E + 2] of weighted, maximum and total
    side by side, or None.
    """

    @property
    def merge_rows(self) -> Callable[[Partial, tuple[Any, ...], Partial], Partial]:
        """As `ringcore.merge.merge_rows`."""
        ...

    @property
    def finished(self) -> Callable[..., tuple[Array, Array, Array]]:
        """As `ringcore.merge.finished`."""
        ...

    @property
    def finished_lse(self) -> Callable[[Array, Array, float], Array]:
        """As `ringcore.merge.finished_lse`."""
        ...


class Pending(Protocol):
    """Blocks on their way."""

    def wait(self) -> Mapping[Move, Blocks]:
        """What arrived, by its move; raises RingTimeout after the transport's deadline, PeerError if a peer failed."""
        ...


class Members(Protocol):
    """This rank among those that make a call together: what they say to each other, on the host.

    node: ranks with equal numbers can share memory. sharers: how many ranks share this machine's cores.
    """

    rank: int
    size: int
    node: int
    sharers: int

    def check(self, *arrays: Array) -> None:
        """Raise UnsupportedError, by name, for arrays that it cannot carry: asked before anything is sent."""
        ...

    def gather(self, note: bytes) -> tuple[bytes, ...]:
        """Every rank's note, in the order of ranks: small, on the host, with a deadline."""
        ...

    def abort(self, error: BaseException) -> None:
        """Tell every peer that this rank failed, so that none waits for it."""
        ...


@runtime_checkable
class Transport(Members, Protocol):
    """One rank's end of a ring of processes."""

    def exchange(
        self,
        kind: str,
        sends: Sequence[tuple[Move, Blocks]],
        receives: Sequence[tuple[Move, Sequence[Spec]]],
    ) -> Pending:
        """Start all sends and receives at once. Blocks stay untouched until the answer's wait returns."""
        ...


class Sharing(Transport, Protocol):
    """A transport that lets each rank have one small array of every rank in one step."""

    def shares(self, x: Array) -> Array | None:
        """Copies of all ranks' arrays, which are like x, stacked in the order of ranks; collective.

        None, on every rank, for arrays that it does not take.
        """
        ...


class Reducing(Transport, Protocol):
    """A transport that reduces one small array of each rank in one step; others let the arrays visit all ranks."""

    def reduce(self, x: Array, combine: Callable[[Array, Array], Array]) -> Array | None:
        """``combine`` of all ranks' arrays, neighbours first, in the order of ranks: the same on every rank.

        ``combine`` gets copies of them and may write to its second array.
        None, on every rank, for arrays that it does not take. Collective. Raises as `gather` does.
        """
        ...


@runtime_checkable
class OneSided(Transport, Protocol):
    """A transport whose ranks can also read each other's published blocks in place."""

    def reaches(self, reader: int, owner: int) -> bool:
        """Whether ``reader`` can fetch what ``owner`` publishes; equal on every rank."""
        ...

    def publish(
        self,
        blocks: Blocks,
        specs: Mapping[int, Sequence[Spec]],
        carried: Mapping[int, Mapping[Move, Sequence[Spec]]] | None = None,
    ) -> bool:
        """Make this rank's blocks readable. Collective.

        ``specs`` is what each rank publishes, ``carried`` what will come home to it, by its moves there, if anything.
        False, on every rank that could have shared, means that there is no room: use `exchange`.
        """
        ...

    def fetch(self, owner: int, rows: slice | None, seen: slice | None = None) -> Blocks:
        """The blocks that ``owner`` published; never written to, and there once the next exchange was waited for.

        rows: of the whole block, None is all. seen: those of ``rows`` that are ever read; others may hold anything.
        """
        ...

    def retire(self) -> None:
        """No rank reads published blocks after this. Collective."""
        ...
