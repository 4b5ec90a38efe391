"""Wrong rings of processes: buffers, ranks of groups, order of messages, agreement."""

from __future__ import annotations

from mutant import Mutant

WORLD = "tests/mpi/world"

_NOTES = """\
            to = self._members[(self._place - step) % size]
            sends.append(line.comm.Isend([header + body, MPI.BYTE], to, CONTROL_TAG))
            notes += self._receive(self._members[(self._place + step) % size], operation)
"""

MUTANTS = (
    Mutant(
        "send buffer overwritten in flight: messages",
        "adapters/ringcore_mpi/messages.py",
        "return bool(MPI.Request.Testall(self._requests))",
        "return bool(MPI.Request.Testall(self._receives))",
        f"{WORLD}/test_mpi_in_flight.py",
        "overwritten",
        ranks=2,
    ),
    Mutant(
        "send buffer overwritten in flight: window",
        "adapters/ringcore_mpi/sharing.py",
        '            self._fence(self._window, "retire")\n',
        "            pass\n",
        f"{WORLD}/test_mpi_window.py",
        "does_not_change",
        ranks=2,
    ),
    Mutant(
        "send buffer overwritten in flight: window of the caller's own arrays",
        "ringcore/session.py",
        "            reader.retire()\n",
        "",
        f"{WORLD}/test_mpi_in_flight.py",
        "allocated",
        ranks=2,
    ),
    Mutant(
        "another thread's call while blocks are published",
        "adapters/ringcore_mpi/transport.py",
        "            self._line.published = published\n",
        "",
        f"{WORLD}/test_mpi_in_flight.py",
        "another_thread",
        ranks=2,
        hangs=True,
    ),
    Mutant(
        "window read before it is written",
        "adapters/ringcore_mpi/sharing.py",
        '            self._fence(self._window, "publish")\n',
        "",
        f"{WORLD}/test_mpi_window.py",
        "does_not_change",
        ranks=2,
    ),
    Mutant(
        "every rank sends before it receives",
        "ringcore/ring.py",
        'leaving.append((yield Begin("carried", sends=tuple((move, share) for move in step.carry_out))))',
        'yield Finish((yield Begin("carried", sends=tuple((move, share) for move in step.carry_out))))',
        f"{WORLD}/test_mpi_in_flight.py",
        "large",
        ranks=3,
        hangs=True,
    ),
    Mutant(
        "odd ring size deadlocks",
        "adapters/ringcore_mpi/circle.py",
        _NOTES,
        _NOTES.replace("(self._place - step)", "(self._place ^ step)").replace(
            "(self._place + step)", "(self._place ^ step)"
        ),
        f"{WORLD}/test_mpi_transport.py",
        "notes_of_any_length and 3",
        ranks=3,
        hangs=True,
    ),
    Mutant(
        "global rank used for a group rank: ring",
        "adapters/ringcore_mpi/line.py",
        "self.rank: int = comm.Get_rank()",
        "self.rank: int = MPI.COMM_WORLD.Get_rank()",
        f"{WORLD}/test_mpi_ring.py",
        "ranks_of_the_ring",
        ranks=3,
        hangs=True,
    ),
    Mutant(
        "global rank used for a group rank: node",
        "adapters/ringcore_mpi/places.py",
        "return self.members.index(rank)",
        "return rank % len(self.members)",
        f"{WORLD}/test_mpi_ring.py",
        "window_messages_and_both and zigzag",
        ranks=3,
        error="ValueError",  # the shard that lies there has another length
    ),
    Mutant(
        "agreement skipped",
        "ringcore/agreement.py",
        "            _explain(json.loads(answers[0][1]), json.loads(other), rank)\n",
        "            pass\n",
        f"{WORLD}/test_mpi_refusals.py",
        "disagree_all and scale",
        ranks=2,
    ),
    Mutant(
        "a refusal on one rank is not told to the others",
        "ringcore/agreement.py",
        '        failure, head["error"] = error, f"{type(error).__name__}: {error}"\n',
        "        raise\n",
        f"{WORLD}/test_mpi_refusals.py",
        "bad_input_on_one_rank and softcap",
        ranks=2,
        hangs=True,
    ),
    Mutant(
        "a failure while computing is not told to the others",
        "ringcore/session.py",
        "            self.members.abort(error)\n",
        "",
        "tests/mpi/test_launch.py",
        "kernel_that_fails",
    ),
    Mutant(
        "blocks cut at the size of a message",
        "adapters/ringcore_mpi/messages.py",
        "for start in range(0, memory.size, PIECE):",
        "for start in range(0, min(memory.size, PIECE), PIECE):",
        f"{WORLD}/test_mpi_arrays.py",
        "blocks_in_pieces and 999",
        ranks=2,
    ),
    Mutant(
        name="gaps of torch tensors copied as they lie",
        file="adapters/ringcore_mpi/buffers.py",
        source="return x.detach().contiguous()",
        replacement="return x.detach()",
        tests="tests/mpi/world/test_mpi_gaps.py",
        ranks=2,
    ),
    Mutant(
        "partials reduced in another order than that of ranks",
        "adapters/ringcore_mpi/reduction.py",
        "upper[...] = combine(lower, upper)",
        "upper[...] = combine(upper, lower)",
        "tests/mpi/world/test_mpi_decode.py",
        "in_the_order",
        ranks=3,
    ),
)
