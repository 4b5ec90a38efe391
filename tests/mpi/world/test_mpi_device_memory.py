"""A GPU's memory goes to MPI only if the library says that it takes it."""

import ctypes

import pytest
from mpi4py import MPI

from ringcore_mpi import MpiTransport, device_memory


@pytest.fixture
def answer(monkeypatch):
    """Let the MPI library say this of itself; None is one that cannot be asked."""

    def set_answer(value):
        class Library:
            def __init__(self, path):
                assert path == MPI.__file__

        if value is not None:
            Library.MPIX_Query_cuda_support = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: value)
        monkeypatch.setattr(device_memory.ctypes, "CDLL", Library)
        device_memory.takes_device_memory.cache_clear()

    yield set_answer
    monkeypatch.undo()
    device_memory.takes_device_memory.cache_clear()


@pytest.mark.parametrize(("value", "due"), [(1, True), (0, False), (-1, False), (None, False)])
def test_the_library_is_asked(answer, value, due):
    answer(value)
    transport = MpiTransport(MPI.COMM_WORLD)
    assert transport.device_buffers is due
    transport.close()


@pytest.mark.parametrize("said", [True, False])
def test_the_user_knows_better(answer, said):
    answer(int(not said))
    transport = MpiTransport(MPI.COMM_WORLD, device_buffers=said)
    assert transport.device_buffers is said
    transport.close()


def test_the_library_of_these_tests_is_asked_without_harm():
    assert device_memory.takes_device_memory() in (True, False)
