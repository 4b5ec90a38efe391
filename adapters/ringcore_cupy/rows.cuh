// What all kernels share: LANES threads have one row, on a GPU a warp.
#ifdef __CUDACC_RTC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#ifndef LANES
#define LANES 32
#endif
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define NOTHING WIDE(-INFINITY)  // the maximum of a row that saw no key, the score of a hidden pair

typedef long long Count;
typedef unsigned char Byte;

__device__ int lane() { return threadIdx.x % LANES; }

__device__ Count row_of_grid() { return (Count)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; }

// The larger of two numbers; NaN if one is.
__device__ WIDE larger(WIDE a, WIDE b) { return a > b || a != a ? a : b; }

__device__ WIDE sum_of_row(WIDE x) {
#if LANES > 1
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
#endif
    return x;
}

__device__ WIDE largest_of_row(WIDE x) {
#if LANES > 1
    for (int step = LANES / 2; step; step /= 2) {
        const WIDE other = __shfl_xor_sync(0xffffffffu, x, step);
        x = other > x ? other : x;
    }
#endif
    return x;
}
