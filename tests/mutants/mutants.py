"""The mutants that the suite must kill; ``run.py`` plants them.

Each is a bug of a real implementation, or of a careless version of ours. Some traps change no result here, and are not
in the table: -inf minus -inf in `merge` and in the reference tile, which `where` chooses away; a NaN that the NumPy
tile's test of its largest score lets pass, and an overflow as a reference moves down, after which the end of the strip
sends the rows the careful way.

Due with the features that they are bugs of: replicated tokens (a prefix) counted by every rank; dropout before the
normalisation, or by local positions.
"""

from __future__ import annotations

import mutants_gloo
import mutants_layout
import mutants_loop
import mutants_mpi
import mutants_nccl
import mutants_numpy
import mutants_topology
import mutants_values
from mutant import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *mutants_values.MUTANTS,
    *mutants_layout.MUTANTS,
    *mutants_loop.MUTANTS,
    *mutants_numpy.MUTANTS,
    *mutants_mpi.MUTANTS,
    *mutants_gloo.MUTANTS,
    *mutants_nccl.MUTANTS,
    *mutants_topology.MUTANTS,
)
