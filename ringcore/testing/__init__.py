"""Whether an implementation of attention over a ring is right, and which known mistake it makes if it is not.

Needs NumPy: ``pip install "ringcore[numpy]"``.
"""

from ringcore.testing.diagnosis import Diagnosis, Observation, diagnose
from ringcore.testing.diseases import DISEASES, Answer, Disease, given_by, right
from ringcore.testing.problem import Dealt, Problem

__all__ = [
    "DISEASES",
    "Answer",
    "Dealt",
    "Diagnosis",
    "Disease",
    "Observation",
    "Problem",
    "diagnose",
    "given_by",
    "right",
]
