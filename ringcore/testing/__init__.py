"""Whether an implementation of attention over a ring is right, and which known mistake it makes if it is not.

Needs NumPy: ``pip install "ringcore[numpy]"``.
"""

from ringcore.testing.asking import ACCEPTS, Case, ask, cases, check_attention, questions
from ringcore.testing.dense import Answer, right
from ringcore.testing.diagnosis import Diagnosis, Observation, diagnose
from ringcore.testing.diseases import DISEASES, Disease, given_by
from ringcore.testing.meaning import problem_of
from ringcore.testing.problem import Dealt, Problem, Question
from ringcore.testing.report import Fault, Report
from ringcore.testing.table import FEATURES, Shape, draw

__all__ = [
    "ACCEPTS",
    "DISEASES",
    "FEATURES",
    "Answer",
    "Case",
    "Dealt",
    "Diagnosis",
    "Disease",
    "Fault",
    "Observation",
    "Problem",
    "Question",
    "Report",
    "Shape",
    "ask",
    "cases",
    "check_attention",
    "diagnose",
    "draw",
    "given_by",
    "problem_of",
    "questions",
    "right",
]
