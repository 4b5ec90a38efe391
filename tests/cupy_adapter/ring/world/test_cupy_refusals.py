"""Bad input on one rank, ranks that differ, ranks that fail or are late: an error on every rank, and nothing left."""

import gc
import time

import cupy
import numpy as np
import pytest
import scenes
from calls import check, run, shards, whole
from mpi4py import MPI

import ringcore
from ringcore import AgreementError, DeviceError, PeerError, RingTimeout, TransportError, UnsupportedError
from ringcore.tile import ReferenceKernels
from ringcore_cupy import CupyTransport, TileMemoryError
from ringcore_mpi import MpiTransport

WORLD = MPI.COMM_WORLD
CARRIERS = ("ipc", "nccl", "mpi", "host")
ODD = WORLD.size - 1

pytestmark = [pytest.mark.skipif(WORLD.size < 2, reason="needs ranks"), pytest.mark.usefixtures("nothing_left")]


def attend(ring, *arrays, **keywords):
    return ringcore.ring_attention(*arrays, ring=ring, kernels="reference", **keywords)


def refused(call, error, words):
    """The odd rank's own error, and the others' news of it."""
    with pytest.raises(error if WORLD.rank == ODD else PeerError, match=words) as caught:
        call()
    assert type(caught.value) is (error if WORLD.rank == ODD else PeerError)


def several(ring, kernels):
    """A rank that already had all it needed hears of a failure in its next call."""
    for _ in range(3):
        run(ring, whole(), "striped", kernels=kernels)


def other_gpu(host):
    return cupy.cuda.Device((cupy.cuda.Device().id + 1) % cupy.cuda.runtime.getDeviceCount())


@pytest.mark.parametrize("name", ["q", "v"])
def test_arrays_on_different_devices(host, name):
    arrays = dict(zip("qkv", shards(whole(), host, "zigzag"), strict=False))
    if host.rank == ODD:
        with other_gpu(host):
            arrays[name] = cupy.zeros(arrays[name].shape)
    refused(lambda: attend(host, *arrays.values()), DeviceError, "the arrays are on different devices .q: <CUDA Device")
    check(host)


def test_arrays_on_another_device_than_the_current_one(host):
    arrays = shards(whole(), host, "zigzag")[:3]
    if host.rank == ODD:
        other_gpu(host).use()
    words = r"the arrays are on GPU ., but GPU . is the current one.*Call cupy\.cuda\.Device\(.\)\.use"
    refused(lambda: attend(host, *arrays), UnsupportedError, words)
    cupy.cuda.Device(arrays[0].device.id).use()
    check(host)


def test_another_gpu_than_the_rings(host):
    check(host)
    if host.rank == ODD:
        other_gpu(host).use()
    refused(lambda: run(host, whole()), UnsupportedError, f"but this ring's memory on rank {ODD} is that of GPU")


@pytest.mark.parametrize("odd", [0, ODD])
def test_numpy_arrays_on_one_rank(host, odd):
    arrays = shards(whole(), host, "zigzag")[:3]
    if host.rank == odd:
        arrays = [cupy.asnumpy(x) for x in arrays]
    with pytest.raises(AgreementError, match=r"the ranks disagree on library of the arrays: '(cupy|numpy)' on rank 0"):
        attend(host, *arrays)
    check(host)


def test_no_array_on_one_rank(host):
    q, k, v = shards(whole(), host, "zigzag")[:3]
    refused(lambda: attend(host, [] if host.rank == ODD else q, k, v), ringcore.DtypeError, "q is a list")
    check(host)


def test_torch_tensors_beside_cupy_arrays(host):
    torch = pytest.importorskip("torch")
    q, k, v = shards(whole(), host, "zigzag")[:3]
    if host.rank == ODD:
        k = torch.zeros(k.shape, dtype=torch.float64)
    words = r"q: cupy, k: torch, v: cupy\)\. On one GPU cupy\.from_dlpack\(x\.detach\(\)\).*torch\.from_dlpack"
    refused(lambda: attend(host, q, k, v), DeviceError, words)
    whole_call = shards(whole(), host, "zigzag")[:3]
    _, pullback = ringcore.ring_attention_vjp(*whole_call, wrt=("q",), ring=host, kernels="reference")
    dout = torch.zeros(q.shape, dtype=torch.float64) if host.rank == ODD else cupy.zeros(q.shape)
    refused(
        lambda: pullback(dout), DeviceError, r"dout is an array of torch, but q one of cupy\. On one GPU cupy\.from_d"
    )


def test_numpy_arrays_over_a_ring_of_cupys(host):
    ring = CupyTransport(host)
    arrays = shards(whole(), host, "zigzag")[:3]
    if host.rank == ODD:
        arrays = [cupy.asnumpy(x) for x in arrays]
    refused(lambda: attend(ring, *arrays), UnsupportedError, "an array is a numpy.ndarray; this ring carries CuPy's")


def test_a_ring_of_cupys_is_no_host(host):
    with pytest.raises(UnsupportedError, match="Give the ring of processes under it"):
        CupyTransport(CupyTransport(host))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_kernel_that_fails_ends_the_ring_and_leaves_nothing(carrier, direction):
    host = MpiTransport(WORLD, device_buffers=True, timeout=10)
    ring = CupyTransport(host, carrier=carrier)
    check(ring)
    kernels = scenes.Failing(ReferenceKernels(), host.rank == ODD, direction)
    with pytest.raises(ZeroDivisionError if host.rank == ODD else PeerError, match="a kernel failed"):
        several(ring, kernels)
    if carrier == "ipc" and hasattr(cupy.cuda.runtime, "opened"):
        assert not cupy.cuda.runtime.opened, "what peers shared is closed though the ring is kept"
    with pytest.raises(TransportError, match="this ring ended"):
        run(ring, whole())
    WORLD.Barrier()
    host.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_rank_that_is_late_is_a_timeout_on_all(carrier):
    host = MpiTransport(WORLD, device_buffers=True)
    ring = CupyTransport(host, carrier=carrier)
    check(ring)
    host.gather(b"")  # the deadline begins once the ring stands
    host.timeout = host._line.timeout = 1

    class Late(ReferenceKernels):
        late = host.rank == ODD

        def forward(self, *arrays, **keywords):
            if self.late:
                self.late = False
                time.sleep(8)
            return super().forward(*arrays, **keywords)

    started = time.monotonic()
    with pytest.raises((RingTimeout, PeerError), match="waited 1 s for"):
        several(ring, Late())
    assert time.monotonic() - started < (20 if host.rank == ODD else 6), "the GPU was waited for, not the host"
    WORLD.Barrier()
    host.close()


@pytest.mark.parametrize("gradient", [False, True])
def test_too_little_memory_on_one_rank_leaves_the_ring_usable(host, gradient):
    ring = CupyTransport(host)
    arrays = shards(whole(), host, "zigzag")[:3]
    keywords = {"ring": ring, "layout": "zigzag", "kernels": "cupy.cuda.tiled"}
    call = ringcore.ring_attention_vjp if gradient else ringcore.ring_attention
    call(*arrays, **keywords)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    if host.rank == ODD:
        pool.set_limit(size=pool.used_bytes() + 1024)
    try:
        words = r"a tile of \d+ rows x \d+ keys with \d+ heads needs [\d,]+ bytes beside its arrays"
        refused(lambda: call(*arrays, **keywords), TileMemoryError, words)
    finally:
        pool.set_limit(size=0)
    call(*arrays, **keywords)
    ring.close()


def test_memory_is_flat_after_many_calls(host):
    ring = CupyTransport(host)
    arrays = shards(whole(8 * host.size), host, "zigzag")

    def used():
        gc.collect()
        runtime = cupy.cuda.runtime
        kept = len(runtime.opened), len(runtime.opened_events), len(runtime._shared_events), len(runtime._maps)
        return cupy.get_default_memory_pool().used_bytes(), *kept, len(runtime.events_work)

    def call():
        (_, pullback) = ringcore.ring_attention_vjp(
            *arrays[:3], wrt=("k",), ring=ring, layout="zigzag", kernels="reference"
        )
        pullback(arrays[3])

    for _ in range(3):
        call()
    before = used()
    for _ in range(500 if host.size == 2 else 50):  # two calls of the ring each
        call()
    assert used() == before
    ring.close()


def test_what_is_the_gpus_goes_with_the_ring():
    comm = WORLD.Dup()
    q, k, v, _ = shards(whole(), comm_ring(comm), "zigzag")
    attend(comm, q, k, v)
    assert cupy.cuda.runtime.opened
    comm.Free()
    gc.collect()
    assert not cupy.cuda.runtime.opened
    assert not cupy.cuda.runtime._maps


@pytest.mark.parametrize("backwards", [False, True])
def test_ranks_that_end_their_rings_one_after_the_other(backwards):
    """None asks anything of a peer that is gone."""
    host = MpiTransport(WORLD)
    ring = CupyTransport(host)
    check(ring)
    for rank in range(WORLD.size):
        if WORLD.rank == (WORLD.size - 1 - rank if backwards else rank):
            del ring
            gc.collect()
            assert not cupy.cuda.runtime.opened
        WORLD.Barrier()
    host.close()


def comm_ring(comm):
    return type("Place", (), {"rank": comm.rank, "size": comm.size})


def test_a_pullback_keeps_the_ring_of_its_call():
    q, k, v, dout = shards(whole(), comm_ring(WORLD), "zigzag")
    (out, _), pullback = ringcore.ring_attention_vjp(
        q, k, v, wrt=("q", "k", "v"), ring=MpiTransport(WORLD), layout="zigzag", causal=True, kernels="reference"
    )
    gc.collect()
    (dq, dk, dv) = pullback(dout)
    assert np.isfinite(cupy.asnumpy(dk)).all()
    del pullback, out, dq, dv
    gc.collect()
    assert not cupy.cuda.runtime.opened


def test_mpi_takes_no_memory_of_a_gpu_that_it_does_not_know():
    host = MpiTransport(WORLD, device_buffers=False)
    with pytest.raises(
        UnsupportedError, match=r"in a GPU's memory, which this MPI library.*ringcore_cupy\.CupyTransport"
    ):
        host.check(cupy.zeros(3))
    host.close()
