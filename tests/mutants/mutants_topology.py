"""Wrong grids of heads and ring, double rings and rings both ways, and queries that visit."""

from __future__ import annotations

from mutant import PLAN, RING, Mutant

GRID = f"{RING} --ring mpi-grid"
WORLD = "tests/mpi/world"

MUTANTS = (
    Mutant(
        "heads of a grid in the wrong order",
        "ringcore/grid_session.py",
        "slice(owner * heads, (owner + 1) * heads)",
        "slice((group.size - 1 - owner) * heads, (group.size - owner) * heads)",
        GRID,
        "out_and_lse and plain and 2-",
        ranks=2,
    ),
    Mutant(
        "the same weights dropped in every part of the heads",
        "ringcore/prepared.py",
        "replace(arguments.score, first_head=heads.start) if heads.start else arguments.score",
        "arguments.score",
        GRID,
        "out_and_lse and dropout and 2-",
        ranks=2,
    ),
    Mutant(
        "gradients of sinks at the places of other heads",
        "ringcore/prepared.py",
        "(slice(None),) * axis + (self.session.heads(like.shape[axis]), ...), share)",
        "(slice(None),) * axis + (slice(0, share.shape[axis]), ...), share)",
        GRID,
        "gradients and sinks and 2-",
        ranks=2,
    ),
    Mutant(
        "one part of a mask for all heads",
        "ringcore/positions.py",
        "return answer if alike else answer[..., self._heads, :, :]",
        "return answer if alike else answer[..., : self._count // 2, :, :]",
        f"{WORLD}/test_mpi_topology.py",
        "grid_is_attention and 2",
        ranks=2,
    ),
    Mutant(
        "groups that are no grid",
        "ringcore/grid.py",
        "if not all(places(self.heads, columns == fits)):",
        "if False:",
        f"{WORLD}/test_mpi_topology.py",
        "no_grid",
        ranks=2,
        error="Failed",
        hangs=True,
    ),
    Mutant(
        "both halves of a block one way",
        "ringcore/routes.py",
        "            block, coming = (rank - sign * hop) % size, (rank - sign * (hop + 1)) % size\n"
        "            if hop < far[block][way]:\n"
        "                sends.append(Move((rank + sign) % size, block, halves[block][way]))",
        "            block, coming = (rank - sign * hop) % size, (rank - sign * (hop + 1)) % size\n"
        "            if hop < far[block][way]:\n"
        "                sends.append(Move((rank + 1) % size, block, halves[block][way]))",
        f"{PLAN}/test_later_plans.py",
        "both_ways",
        error="TransportError",  # the driver of rings in one process notices what would be a hang
    ),
    Mutant(
        "accumulators of one half go home as those of the other",
        "ringcore/routes.py",
        "homes = sorted((2 * hops + way, way, hops) for way, hops in enumerate(far[rank]) if hops)",
        "homes = sorted((-hops, way, hops) for way, hops in enumerate(far[rank]) if hops)",
        f"{PLAN}/test_later_plans.py",
        "both_ways",
    ),
    Mutant(
        "a wait for accumulators that their sender cannot give yet",
        "ringcore/ring.py",
        "while leaving and not beside:",
        "while leaving:",
        f"{PLAN}/test_later_plans.py",
        "both_ways",
    ),
    Mutant(
        "a double ring that crosses between hosts in every round",
        "ringcore/routes.py",
        "giver = (turn, hop - 1) if hop else (turn - 1, 0)",
        "giver = (turn, hop - 1) if hop else (turn - 1, inner - 1)",
        f"{PLAN}/test_later_plans.py",
        "double_rings",
        error="KeyError",  # of a block that was not there to be sent
    ),
    Mutant(
        "machines of unlike ranks taken for inner rings",
        "ringcore/routes.py",
        "len(set(nodes)) != len(machines) or ",
        "",
        f"{WORLD}/test_mpi_topology.py",
        "unlike",
        ranks=3,
        error="Failed",
    ),
    Mutant(
        "rows of visiting queries fetched as if they were keys",
        "ringcore/values.py",
        "rows = _hull([tile.rows for tile in tiles]) if self.queries_visit else span(tiles)",
        "rows = span(tiles)",
        "tests/test_decode.py",
        "visiting_queries_is_all",
    ),
    Mutant(
        "a gradient of lse that one rank of a grid trades alone",
        "ringcore/grid_session.py",
        'return b"1" in self.grid.heads.gather(b"1" if given else b"0")',
        "return given",
        f"{WORLD}/test_mpi_topology.py",
        "is_not_traded",
        ranks=2,
    ),
    Mutant(
        "sinks of visiting queries counted by every rank",
        "ringcore/visiting_queries.py",
        "sinks = self.sinks if q is self.q else None",
        "sinks = self.sinks",
        "tests/test_decode.py",
        "dealt_too and sinks",
    ),
    Mutant(
        "what visiting queries saw elsewhere is lost",
        "ringcore/visiting_queries.py",
        "return _carried(merge(partial_of(arrived), partial_of(share)))",
        "return share",
        "tests/test_decode.py",
        "dealt_too and full",
    ),
    Mutant(
        "keys visit where queries are fewer bytes",
        "ringcore/decoding.py",
        "carried * (int(v.shape[3]) + 2) * max(4, size))",
        "carried * (int(v.shape[3]) + 2) * size * 0)",
        "tests/test_decode.py",
        "fewer_bytes",
    ),
)
