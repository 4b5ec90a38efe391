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
        "ringcore/tiling.py",
        "gap, step = rows.start - columns.start,",
        "gap, step = columns.start - rows.start,",
        RING,
        "out_and_lse and causal",
    ),
    Mutant(
        "causal offset with the wrong sign: query_offset",
        "ringcore/tiling.py",
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
        "ringcore/tiling.py",
        "(hi + gap) // step",
        "-((-hi - gap) // step)",
        RING,
        "out_and_lse and causal and striped",
    ),
    Mutant(
        "stripe diagonal off by one: too little",
        "ringcore/tiling.py",
        "(hi + gap) // step",
        "(hi + gap) // step - (step > 1)",
        RING,
        "out_and_lse and causal and striped",
    ),
    Mutant(
        "window passed unchanged to each hop: left",
        "ringcore/tiling.py",
        "-((-lo - gap) // step)",
        "lo",
        RING,
        "out_and_lse and window",
    ),
    Mutant(
        "window passed unchanged to each hop: right",
        "ringcore/tiling.py",
        "None if hi is None else (hi + gap) // step",
        "None if hi is None else hi if hi else gap // step",
        RING,
        "out_and_lse and window",
    ),
    Mutant(
        "window's left side ignored where causal",
        "ringcore/tiling.py",
        "return None if left is None else -left, right",
        "return None if left is None or self.causal else -left, right",
        RING,
        "out_and_lse and causal_window",
    ),
    Mutant(
        "key lengths one too long",
        "ringcore/tiling.py",
        "count = bisect_left(piece.positions, limit)",
        "count = bisect_left(piece.positions, limit + 1)",
        RING,
        "out_and_lse and key_lengths",
    ),
    Mutant(
        "key lengths swallowed",
        "ringcore/session.py",
        "key_limits=arguments.key_lengths or (keys,) * batch",
        "key_limits=(keys,) * batch",
        RING,
        "out_and_lse and key_lengths",
    ),
    Mutant(
        "offset and key length of the first batch entry for all",
        "ringcore/tiling.py",
        "in groupby(entries):",
        "in groupby([next(entries)] * len(visibility.offsets)):",
        RING,
        "out_and_lse and (offsets or key_lengths)",
    ),
    Mutant(
        "tiles joined whatever their bands",
        "ringcore/tiling.py",
        "fits_first = band.clipped(first.height, first.width) == first.band",
        "fits_first = True",
        RING,
        "out_and_lse and (causal or window)",
    ),
    Mutant(
        "ranges of unequal steps taken for equal",
        "ringcore/tiling.py",
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
    Mutant(
        "document boundary ignored",
        "ringcore/tiling.py",
        "    if runs is None:\n",
        "    if True:\n",
        RING,
        "out_and_lse and (documents or cu_seqlens)",
    ),
    Mutant(
        "documents of the first batch entry for all",
        "ringcore/documents.py",
        "return self.runs * batch if len(self.runs) == 1 else self.runs",
        "return self.runs[:1] * batch",
        RING,
        "out_and_lse and documents_of_entries",
    ),
    Mutant(
        "a document that comes back is another one",
        "ringcore/tiling.py",
        "_, stop, document = runs[",
        "document, stop, _ = runs[",
        RING,
        "out_and_lse and documents_of_entries",
    ),
    Mutant(
        "a call with other documents is taken for the one before",
        "ringcore/call.py",
        '"documents": None if documents is None else documents.runs,',
        '"documents": None,',
        "tests/test_remembered.py",
        "documents",
    ),
    Mutant(
        "the last row that a window reaches stays at home",
        "ringcore/schedule.py",
        "max(places[-1] for places in seen) + 1)",
        "max(places[-1] for places in seen))",
        f"{PLAN}/test_near_plans.py",
        "halos",
    ),
    Mutant(
        "whole blocks sent where a window reaches a few rows",
        "ringcore/schedule.py",
        "return min(around, straight, key=",
        "return max(around, straight, key=",
        f"{PLAN}/test_near_plans.py",
        "moves_less",
    ),
    Mutant(
        "sink counted per hop",
        "ringcore/work.py",
        """        \"\"\"Merge the tiles into the state of q's rows.\"\"\"
""",
        """        k, _ = block
        if self.sinks is not None and self.state is not None and tiles:
            self.state.total[...] += namespace(k).exp(self.sinks[:, None] - self.state.maximum)
""",
        RING,
        "out_and_lse and sinks",
    ),
    Mutant(
        "replicated keys counted at every hop",
        "ringcore/work.py",
        """        self._visit(block, tiles, self.bias, self.mask)
        return ()
""",
        """        self._visit(block, tiles, self.bias, self.mask)
        self.complete()
        return ()
""",
        RING,
        "out_and_lse and prefix",
    ),
    Mutant(
        "gradients of replicated keys of the first rank alone",
        "ringcore/call.py",
        "sums = {name: add_all(shares[name])",
        "sums = {name: add_all(shares[name][:1])",
        RING,
        "gradients and prefix",
    ),
    Mutant(
        "mask laid on replicated keys",
        "ringcore/work.py",
        "self._visit(self.prefix, self.prefix_tiles(), None, None)",
        "self._visit(self.prefix, self.prefix_tiles(), self.bias, self.mask)",
        RING,
        "out_and_lse and prefix_reduced",
        error="ValueError",
    ),
    Mutant(
        "prefix left out of the gradient of q",
        "ringcore/work.py",
        "            found = visit(forward.prefix, forward.prefix_tiles(), wanted, None, None, None)\n",
        "            without = None if self.dq is None else self.dq + 0\n"
        "            found = visit(forward.prefix, forward.prefix_tiles(), wanted, None, None, None)\n"
        "            self.dq = without\n",
        RING,
        "gradients and prefix",
    ),
    Mutant(
        "sums over ranks in the order in which they came",
        "ringcore/replicated.py",
        "sorted(range(self._size), key=lambda hop: (self._rank - hop) % self._size)",
        "range(self._size)",
        "tests/test_sum_over_ranks.py",
        "equal",
    ),
    Mutant(
        "sums over ranks of what later visitors overwrote",
        "ringcore/replicated.py",
        "namespace(x).asarray(x, copy=True)",
        "x",
        "tests/test_sum_over_ranks.py",
        "overwritten",
    ),
    Mutant(
        "sinks seen by the forward pass alone",
        "ringcore/work.py",
        "return -xp.sum(weights * self.delta, axis=(0, 2))",
        "return -xp.sum(self.delta, axis=(0, 2))",
        RING,
        "gradients and sinks",
    ),
    Mutant(
        "gradient of sinks with the wrong sign",
        "ringcore/work.py",
        "return -xp.sum(weights * self.delta",
        "return xp.sum(weights * self.delta",
        RING,
        "gradients and sinks",
    ),
    Mutant(
        "one layout for q and for k",
        "ringcore/call.py",
        "(arguments.k, deal.k_layout)",
        "(arguments.k, deal.q_layout)",
        RING,
        "out_and_lse and zigzag_and_striped",
        error="ValueError",
    ),
)
