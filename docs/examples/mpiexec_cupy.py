"""Exact attention and its gradients over GPUs under MPI, compared with the same on one GPU.

    mpiexec -n 2 python docs/examples/mpiexec_cupy.py [--carrier ipc | nccl | mpi | host] [--length 4096]

Every rank draws the same whole q, k and v, keeps its own rows on its GPU, and computes attention and gradients over the
ring. The largest differences to ringcore on one GPU are printed, and how blocks travelled. MPI needs to know nothing of
GPUs, but for --carrier mpi.
"""

import argparse

import cupy
import numpy as np
from mpi4py import MPI

import ringcore
from ringcore_cupy import CupyTransport

HEADS, WIDTH = 8, 64
LAYOUT = "zigzag"


def main():
    """Attend over the ring, go backward, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carrier", choices=("ipc", "nccl", "mpi", "host"))
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cupy.cuda.Device(neighbours.rank % cupy.cuda.runtime.getDeviceCount()).use()  # before any array is made
    ring = CupyTransport(comm, carrier=options.carrier)  # comm itself, if there is no choice
    rng = np.random.default_rng(0)
    shape = (1, HEADS, options.length, WIDTH)
    whole = [cupy.asarray(rng.standard_normal(shape, dtype=np.float32).astype(np.float16)) for _ in range(4)]

    q, k, v, dout = (ringcore.shard(x, LAYOUT, ring.rank, ring.size).copy() for x in whole)
    (out, _), pullback = ringcore.ring_attention_vjp(
        q, k, v, wrt=("q", "k", "v"), ring=ring, layout=LAYOUT, causal=True
    )
    came = [out, *pullback(dout)]

    (out, _), pullback = ringcore.ring_attention_vjp(*whole[:3], wrt=("q", "k", "v"), causal=True)
    due = [out, *pullback(whole[3])]
    largest = {}
    for name, mine, x in zip(("out", "dq", "dk", "dv"), came, due, strict=True):
        difference = mine.astype(np.float32) - ringcore.shard(x, LAYOUT, ring.rank, ring.size).astype(np.float32)
        largest[name] = comm.allreduce(float(cupy.abs(difference).max()), MPI.MAX)
    if ring.rank == 0:
        text = ", ".join(f"{name} {value:.1e}" for name, value in largest.items())
        print(f"{ring.size} ranks, largest differences to one GPU: {text}")
        print(ring.explain)
    ring.close()


if __name__ == "__main__":
    main()
