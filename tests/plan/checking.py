"""All that a plan must be, in one call."""

from counting import check_loops
from lockstep import check_exchanges
from pairs import computed

SIZES = (1, 2, 3, 5)


def check(case, plans):
    """Exact, sound and run by the loop; what the simulation saw."""
    assert computed(case, plans) == case.defined()
    check_loops(case, plans)
    return check_exchanges(plans)
