"""Wrong layouts and plans: positions, bands, which blocks travel."""

from __future__ import annotations

from mutant import PLAN, REFERENCE, RING, Mutant

MUTANTS = (
    Mutant(
        "length floored to a multiple of the ring: contiguous and zigzag",
        "ringcore/layout.py",
        "short + (index < longer)",
        "short",
        f"{PLAN}/test_layouts.py",
        "own_every_position",
    ),
    Mutant(
        "length floored to a multiple of the ring: striped",
        "ringcore/layout.py",
        "range(rank, length, size)",
        "range(rank, length - length % size, size)",
        f"{PLAN}/test_layouts.py",
        "own_every_position",
    ),
    Mutant(
        "pieces of a shard in another order than the plan's",
        "ringcore/partition.py",
        "for r in resolved.shards[rank]]",
        "for r in resolved.shards[rank][::-1]]",
        RING,
        "out_and_lse and plain and zigzag",
    ),
    Mutant(
        "causal offset with the wrong sign: between ranks",
        "ringcore/schedule.py",
        "gap, step = rows.start - columns.start,",
        "gap, step = columns.start - rows.start,",
        RING,
        "out_and_lse and causal",
    ),
    Mutant(
        "causal offset with the wrong sign: query_offset",
        "ringcore/schedule.py",
        "range(piece.start + offset, piece.stop + offset, piece.step)",
        "range(piece.start - offset, piece.stop - offset, piece.step)",
        RING,
        "out_and_lse and offset",
    ),
    Mutant(
        "causal offset with the wrong sign: reference tile",
        "ringcore/tile.py",
        "distance = distance - xp.arange(",
        "distance = xp.flip(distance) - xp.arange(",
        REFERENCE,
        "out_and_lse and causal",
    ),
    Mutant(
        "causal offset with the wrong sign: columns that a block of rows sees",
        "ringcore/values.py",
        "last = width if self.hi is None else min(width, stop - 1 + self.hi + 1)",
        "last = width if self.hi is None else min(width, stop - 1 - self.hi + 1)",
        f"{PLAN}/test_bands.py",
        "columns_are_those",
    ),
    Mutant(
        "stripe diagonal off by one: too much",
        "ringcore/schedule.py",
        "(hi + gap) // step",
        "-((-hi - gap) // step)",
        RING,
        "out_and_lse and causal and striped",
    ),
    Mutant(
        "stripe diagonal off by one: too little",
        "ringcore/schedule.py",
        "(hi + gap) // step",
        "(hi + gap) // step - (step > 1)",
        RING,
        "out_and_lse and causal and striped",
    ),
    Mutant(
        "window passed unchanged to each hop: left",
        "ringcore/schedule.py",
        "-((-lo - gap) // step)",
        "lo",
        RING,
        "out_and_lse and window",
    ),
    Mutant(
        "window passed unchanged to each hop: right",
        "ringcore/schedule.py",
        "None if hi is None else (hi + gap) // step",
        "None if hi is None else hi if hi else gap // step",
        RING,
        "out_and_lse and window",
    ),
    Mutant(
        "window's left side ignored where causal",
        "ringcore/schedule.py",
        "return None if left is None else -left, right",
        "return None if left is None or self.causal else -left, right",
        RING,
        "out_and_lse and causal_window",
    ),
    Mutant(
        "key lengths one too long",
        "ringcore/schedule.py",
        "count = bisect_left(piece.positions, limit)",
        "count = bisect_left(piece.positions, limit + 1)",
        RING,
        "out_and_lse and key_lengths",
    ),
    Mutant(
        "key lengths swallowed",
        "ringcore/session.py",
        "key_limits=arguments.key_lengths or (keys,) * len(arguments.offsets)",
        "key_limits=(keys,) * len(arguments.offsets)",
        RING,
        "out_and_lse and key_lengths",
    ),
    Mutant(
        "offset and key length of the first batch entry for all",
        "ringcore/schedule.py",
        "groupby(zip(visibility.offsets, visibility.key_limits, strict=True))",
        "groupby([(visibility.offsets[0], visibility.key_limits[0])] * len(visibility.offsets))",
        RING,
        "out_and_lse and (offsets or key_lengths)",
    ),
    Mutant(
        "tiles joined whatever their bands",
        "ringcore/schedule.py",
        "fits_first = band.clipped(first.height, first.width) == first.band",
        "fits_first = True",
        RING,
        "out_and_lse and (causal or window)",
    ),
    Mutant(
        "ranges of unequal steps taken for equal",
        "ringcore/schedule.py",
        "cut = product(row.residues(step), column.residues(step))",
        "cut = [(row, column)]",
        RING,
        "out_and_lse and causal and mixed",
    ),
    Mutant(
        "the last rank that sees a block is left out",
        "ringcore/schedule.py",
        "hops = [max((hop for hop in range(size) if table[(o + hop) % size, o]), default=0) for o in range(size)]",
        "hops = [max((hop for hop in range(size - 1) if table[(o + hop) % size, o]), default=0) for o in range(size)]",
        RING,
        "out_and_lse and plain",
    ),
    Mutant(
        "a rank that sees nothing of a block does not pass it on",
        "ringcore/schedule.py",
        "sends=(Move(after, block),) if goes_on else (),",
        "sends=(Move(after, block),) if goes_on and table[rank, block] else (),",
        RING,
        "out_and_lse and window",
        error="TransportError",  # the driver of rings in one process notices what would be a hang
    ),
    Mutant(
        "an early-stopped block's gradient lost",
        "ringcore/schedule.py",
        "rank, rows[rank]),) if hops[rank] else ()",
        "rank, rows[rank]),) if hops[rank] == size - 1 else ()",
        RING,
        "gradients and window",
    ),
    Mutant(
        "dK, dV returned one rank off: plan",
        "ringcore/schedule.py",
        "carry_out=(Move(after if goes_on else block, block, rows[block]),) if hop else (),\n"
        "                drops=(block,),\n"
        "            )\n"
        "        )\n"
        "    home = (Move((rank + hops[rank]) % size, rank, rows[rank]),) if hops[rank] else ()\n",
        "carry_out=(Move(after if goes_on else (block + 1) % size, block, rows[block]),) if hop else (),\n"
        "                drops=(block,),\n"
        "            )\n"
        "        )\n"
        "    home = (Move((before + hops[before]) % size, before, rows[before]),) if hops[before] else ()\n",
        f"{PLAN}/test_ring_plans.py",
        "exchange_what_is_needed",
    ),
)
