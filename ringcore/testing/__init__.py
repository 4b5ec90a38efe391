"""Whether an implementation of attention over a ring is right, and which known mistake it makes if it is not.

Needs NumPy: ``pip install "ringcore[numpy]"``.
"""

from ringcore.testing.asking import Fault, Report, ask, check_attention, questions
from ringcore.testing.dense import Answer, right
from ringcore.testing.diagnosis import Diagnosis, Observation, diagnose
from ringcore.testing.diseases import DISEASES, Disease, given_by
from ringcore.testing.problem import Dealt, Problem, Question

__all__ = [
    "DISEASES",
    "Answer",
    "Dealt",
    "Diagnosis",
    "Disease",
    "Fault",
    "Observation",
    "Problem",
    "Question",
    "Report",
    "ask",
    "check_attention",
    "diagnose",
    "given_by",
    "questions",
    "right",
]
