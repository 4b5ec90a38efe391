"""By what blocks travel, and what is said of it."""

import os

import cupy
import pytest
from calls import check, whole
from mpi4py import MPI

import ringcore
from ringcore import KeywordError, UnsupportedError
from ringcore_cupy import CupyTransport, shared_region
from ringcore_mpi import MpiTransport, adapt

WORLD = MPI.COMM_WORLD
CARRIERS = {"ipc": "all ranks by CUDA IPC", "nccl": "all blocks by messages of NCCL", "mpi": "from the GPU's memory", "host": "pinned memory"}  # fmt: skip

pytestmark = [pytest.mark.skipif(WORLD.size < 2, reason="needs ranks"), pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def variable(monkeypatch):
    """Set what the stand-in for CUDA can do from now on."""
    if not hasattr(cupy.cuda.runtime, "opened"):
        pytest.skip("of the stand-in alone")
    return lambda name, value: monkeypatch.setenv(f"CUPY_STAND_IN_{name}", value)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_each_carrier_gives_what_one_process_gives(host, carrier, layout):
    ring = CupyTransport(host, carrier=carrier)
    check(ring, layout=layout)
    assert CARRIERS[carrier] in ring.explain
    assert (ring.reaches(0, 1), ring.reaches(0, 0)) == (carrier == "ipc", False)
    ring.close()


def test_a_communicator_is_taken_as_it_is():
    comm = WORLD.Dup()
    check(adapt(comm), where=comm)
    words = ringcore.explain(*(cupy.asarray(x) for x in whole()[:3]), ring=comm, kernels="reference").ring
    assert words.startswith("CuPy over MpiTransport, rank ")
    assert "all ranks by CUDA IPC" in words
    assert adapt(comm).messages_sent > 0, "the tokens"
    comm.Free()


def test_numpy_arrays_over_the_same_ring_go_by_the_host(host):
    q, k, v = (ringcore.shard(x, "zigzag", host.rank, host.size) for x in whole()[:3])
    ringcore.ring_attention(q, k, v, ring=host, layout="zigzag")
    check(host)


@pytest.mark.skipif(WORLD.size < 3, reason="needs 3 ranks")
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ways_are_mixed_in_one_ring(layout):
    host = MpiTransport(WORLD, node=WORLD.rank // 2)
    ring = CupyTransport(host)
    check(ring, layout=layout)
    assert "the ranks 0-1" in ring.explain
    assert "other blocks by messages of NCCL" in ring.explain
    assert "ranks 0 and 2 do not share memory: they are on different nodes" in ring.explain
    ring.close()
    host.close()


def test_gpus_that_do_not_reach_each_other_take_nccl(host, variable):
    variable("APART", "1")
    ring = CupyTransport(host)
    check(ring)
    assert "NCCL" in ring.explain
    assert "do not share memory: the GPU 0000:00:00.0 cannot access 0000:01:00.0" in ring.explain
    ring.close()
    with pytest.raises(
        UnsupportedError, match=r'carrier is "ipc", but rank 0 does not reach the memory of rank 1: the'
    ):
        check(CupyTransport(host, carrier="ipc"))
    check(CupyTransport(host, carrier="host"))


def test_ranks_on_one_gpu_use_its_memory_but_no_nccl(host):
    cupy.cuda.Device(0).use()
    ring = CupyTransport(host)
    check(ring)
    assert "all ranks by CUDA IPC" in ring.explain
    ring.close()
    with pytest.raises(UnsupportedError, match=r"but the ranks \[0, 1.*\] share a GPU.*cupy\.cuda\.Device\(number\)"):
        check(CupyTransport(host, carrier="nccl"))
    check(CupyTransport(host, carrier="host"))


def test_a_host_without_device_buffers_is_refused_by_name():
    host = MpiTransport(WORLD, device_buffers=False)
    with pytest.raises(
        UnsupportedError, match=r"carrier is 'mpi', but the host transport of the ranks \[0, 1.*buffers=T"
    ):
        check(CupyTransport(host, carrier="mpi"))
    check(host)
    host.close()


def test_ranks_that_ask_for_different_carriers_all_hear_it(host):
    ring = CupyTransport(host, carrier="ipc" if host.rank else "host")
    with pytest.raises(KeywordError, match=r"different carriers: \['host', 'ipc'"):
        check(ring)
    check(host)  # nobody failed: the ring of processes is as good as before


def test_a_carrier_that_there_is_not_is_refused_by_name(host):
    with pytest.raises(KeywordError, match="carrier is 'rdma'; it must be one of ipc, nccl, mpi, host, or None"):
        CupyTransport(host, carrier="rdma")


@pytest.mark.parametrize("where", ["all ranks", "one rank"])
@pytest.mark.parametrize(
    ("name", "value", "said"), [("CLOSED", "1", "cannot open the memory"), ("MEMORY", "1", "cannot share")]
)
def test_without_shared_memory_blocks_take_another_way(host, variable, where, name, value, said):
    if where == "all ranks" or host.rank == 1:
        variable(name, value)
    ring = CupyTransport(host)
    check(ring)
    assert "by messages of NCCL" in ring.explain
    assert said in ring.explain
    check(ring, whole(48))
    ring.close()
    with pytest.raises(UnsupportedError, match=said):
        check(CupyTransport(host, carrier="ipc"))


@pytest.mark.parametrize("name", ["CLOSED", "MEMORY"])
def test_memory_that_a_rank_cannot_have_is_not_tried_again(host, variable, monkeypatch, name):
    if host.rank == 1:
        variable(name, "1")
    tried, make = [], shared_region.Region
    monkeypatch.setattr(shared_region, "Region", lambda size: tried.append(size) or make(size))
    ring = CupyTransport(host)
    for length, times in ((24, 1), (24, 1), (48, 1), (12, 2), (12, 2)):
        check(ring, whole(length))
        assert len(tried) == times
    ring.close()


def test_memory_grows_with_the_blocks(host):
    ring = CupyTransport(host)
    for length in (24, 12, 96, 36, 200):
        check(ring, whole(length))
    ring.close()


def test_pinned_memory_is_given_back(host):
    pool = cupy.get_default_pinned_memory_pool()
    ring = CupyTransport(host, carrier="host")
    check(ring)
    assert pool.n_free_blocks()
    ring.close()
    assert not pool.n_free_blocks()


def test_no_environment_leaks():
    assert not {name for name in os.environ if name.startswith("CUPY_STAND_IN_")} - {"CUPY_STAND_IN_DEVICES"}
