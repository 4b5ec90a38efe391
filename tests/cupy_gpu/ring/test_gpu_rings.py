"""What only streams, copy engines and processes of real GPUs show."""

import gc
import time

import cupy
import numpy as np
import pytest
import scenes
from mpi4py import MPI

import ringcore
from ringcore import PeerError, UnsupportedError
from ringcore_cupy import CupyTransport
from ringcore_mpi import MpiTransport

WORLD = MPI.COMM_WORLD

pytestmark = pytest.mark.skipif(WORLD.size < 2, reason="needs ranks")


def keep_busy(cycles):
    """Work for the caller's stream that takes so many cycles of the GPU's clock: 1e9 are more than half a second."""
    code = """extern "C" __global__ void busy(long long cycles) {
        long long start = clock64();
        while (clock64() - start < cycles) {}
    }"""
    cupy.RawKernel(code, "busy")((1,), (1,), (np.int64(cycles),))


def draw(rows, seed=0, dtype=np.float64, width=8):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 2, rows, width)).astype(dtype) for _ in range(4)]


def dense(q, k, v, dout):
    """out, dq, dk, dv of causal attention, from whole matrices."""
    q, k, v, dout = (cupy.asarray(x.astype(np.float64)) for x in (q, k, v, dout))
    scale, rows = q.shape[-1] ** -0.5, q.shape[2]
    scores = cupy.where(cupy.tril(cupy.ones((rows, rows), bool)), q @ k.swapaxes(-1, -2) * scale, -np.inf)
    weights = cupy.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ v
    inner = weights * (dout @ v.swapaxes(-1, -2) - (out * dout).sum(-1, keepdims=True)) * scale
    return out, inner @ k, inner.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dout


def shards(arrays, ring, layout="zigzag"):
    return [cupy.asarray(ringcore.shard(x, layout, ring.rank, ring.size)) for x in arrays]


def run(ring, parts, layout="zigzag", **keywords):
    q, k, v, dout = parts
    (out, _), pullback = ringcore.ring_attention_vjp(
        q, k, v, wrt=("q", "k", "v"), ring=ring, layout=layout, causal=True, **keywords
    )
    return [out, *pullback(dout)]


def check(ring, came, arrays, layout="zigzag", tolerance=1e-10):
    for name, x, whole in zip(("out", "dq", "dk", "dv"), came, dense(*arrays), strict=True):
        due = ringcore.shard(whole, layout, ring.rank, ring.size)
        assert float(cupy.abs(x - due).max()) <= tolerance, name


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_gradients_are_those_of_dense_attention(ring, layout):
    arrays = draw(37)
    check(ring, run(ring, shards(arrays, ring, layout), layout), arrays, layout)


def test_calls_that_queue_up_do_not_meet(ring):
    """The host runs ahead of the GPU, and memory is handed out again long before its first use has ended."""
    problems = [draw(1024, seed, np.float32, 64) for seed in range(12)]
    parts = [shards(arrays, ring) for arrays in problems]
    cupy.cuda.runtime.deviceSynchronize()
    keep_busy(500_000_000)
    found = []
    for part in parts:
        found.append(run(ring, part))
        for x in part:
            x.fill(np.nan)
    for arrays, came in zip(problems, found, strict=True):
        check(ring, came, arrays, tolerance=2e-3)


@pytest.mark.parametrize("blocking", [False, True])
def test_a_stream_of_the_users_own(ring, blocking):
    arrays = draw(512, dtype=np.float32, width=64)
    cupy.cuda.runtime.deviceSynchronize()
    with cupy.cuda.Stream(non_blocking=not blocking) as stream:
        keep_busy(200_000_000)
        came = run(ring, shards(arrays, ring))
        stream.synchronize()
    check(ring, came, arrays, tolerance=2e-3)


@pytest.mark.parametrize("carrier", ["ipc", "nccl"])
def test_the_host_waits_for_no_gpu(host, carrier):
    ring = CupyTransport(host, carrier=carrier)
    q, k, v, _ = shards(draw(512, dtype=np.float32, width=64), ring)
    for _ in range(2):
        ringcore.ring_attention(q, k, v, ring=ring, layout="zigzag", causal=True)
    cupy.cuda.runtime.deviceSynchronize()
    WORLD.Barrier()
    before, after = cupy.cuda.Event(), cupy.cuda.Event()
    before.record()
    keep_busy(3_000_000_000)
    start = time.monotonic()
    ringcore.ring_attention(q, k, v, ring=ring, layout="zigzag", causal=True)
    spent = time.monotonic() - start
    after.record()
    after.synchronize()
    assert spent < cupy.cuda.get_elapsed_time(before, after) / 1000 / 2
    ring.close()


def test_the_ring_of_a_communicator_takes_each_others_memory():
    comm = WORLD.Dup()
    arrays = draw(64)
    place = MpiTransport(comm)
    check(place, run(comm, shards(arrays, place)), arrays)
    q, k, v, _ = shards(arrays, place)
    assert "all ranks by CUDA IPC" in ringcore.explain(q, k, v, ring=comm).ring
    comm.Free()
    place.close()


def test_ranks_on_one_gpu_use_its_memory_but_no_nccl(host):
    cupy.cuda.Device(0).use()
    arrays = draw(64)
    ring = CupyTransport(host)
    check(ring, run(ring, shards(arrays, ring)), arrays)
    assert "all ranks by CUDA IPC" in ring.explain
    ring.close()
    with pytest.raises(UnsupportedError, match=r"the ranks \[0, 1.*\] share a GPU"):
        run(CupyTransport(host, carrier="nccl"), shards(arrays, host))


@pytest.mark.skipif(WORLD.size < 3, reason="needs 3 ranks")
def test_ways_are_mixed_in_one_ring():
    host = MpiTransport(WORLD, node=WORLD.rank // 2)
    ring, arrays = CupyTransport(host), draw(64)
    check(ring, run(ring, shards(arrays, ring)), arrays)
    ring.close()
    host.close()


def test_nothing_is_left_after_1000_calls(ring):
    parts = shards(draw(256, dtype=np.float32, width=64), ring)
    pool = cupy.get_default_memory_pool()

    def used():
        gc.collect()
        cupy.cuda.runtime.deviceSynchronize()
        WORLD.Barrier()
        return pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()[0]

    for _ in range(20):
        run(ring, parts)
    before = used()
    for _ in range(500):  # forward and backward
        run(ring, parts)
    after = used()
    assert after[:2] == before[:2]
    assert after[2] >= before[2] - (64 << 20)  # other processes of the GPU's, and the driver's own


@pytest.mark.parametrize("carrier", ["ipc", "nccl", "host"])
def test_a_kernel_that_fails_frees_all_ranks(carrier):
    from ringcore.tile import ReferenceKernels

    host = MpiTransport(WORLD, timeout=20)
    ring = CupyTransport(host, carrier=carrier)
    parts, odd = shards(draw(64), ring, "striped"), host.rank == host.size - 1
    run(ring, parts, "striped")
    kernels = scenes.Failing(ReferenceKernels(), odd)

    def several():
        for _ in range(3):
            run(ring, parts, "striped", kernels=kernels)

    with pytest.raises(ZeroDivisionError if odd else PeerError, match="a kernel failed"):
        several()
    cupy.cuda.runtime.deviceSynchronize()  # no stream waits for a peer
    WORLD.Barrier()
    host.close()


def test_memory_is_freed_with_the_ring():
    comm = WORLD.Dup()
    arrays = [cupy.zeros((1, 1, 1 << 17, 128), np.float32) for _ in range(3)]  # 64 MiB each
    WORLD.Barrier()

    class Nothing:
        from ringcore.tile import ReferenceKernels

        capabilities = ReferenceKernels().capabilities

        def forward(self, q, k, v, *, state=None, **keywords):
            return ringcore.empty_partial(q, v.shape[-1])

        backward = forward

    cupy.get_default_memory_pool().free_all_blocks()
    before = cupy.cuda.runtime.memGetInfo()[0]
    ringcore.ring_attention(*arrays, ring=comm, kernels=Nothing())
    cupy.cuda.runtime.deviceSynchronize()
    WORLD.Barrier()
    comm.Free()
    gc.collect()
    WORLD.Barrier()
    cupy.get_default_memory_pool().free_all_blocks()
    assert cupy.cuda.runtime.memGetInfo()[0] >= before - (64 << 20)
