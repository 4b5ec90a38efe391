// What CUDA C means on a CPU that runs one warp of a kernel at a time, and its lanes by turns.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <utility>

#define __global__
#define __device__ inline
#define __forceinline__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct Place {
    unsigned x, y, z;
};
static Place gridDim, blockDim, blockIdx, threadIdx;

// The lanes of a warp: each runs until it waits for the others, the first lane first.
static struct Warp {
    ucontext_t back, lanes[LANES];
    char stacks[LANES][64 << 10];
    uint64_t shown[LANES];
    bool done[LANES];
    int lane;
    void (*body)(void *);
    void *what;
} warp;

static void run_lane() {
    warp.body(warp.what);
    warp.done[warp.lane] = true;
}

// Whether all lanes came to the same barriers.
static bool run_warp(Place first) {
    for (int lane = 0; lane < LANES; lane++) {
        getcontext(&warp.lanes[lane]);
        warp.lanes[lane].uc_stack.ss_sp = warp.stacks[lane];
        warp.lanes[lane].uc_stack.ss_size = sizeof warp.stacks[lane];
        warp.lanes[lane].uc_link = &warp.back;
        warp.done[lane] = false;
        makecontext(&warp.lanes[lane], run_lane, 0);
    }
    for (int ended = 0; ended < LANES;) {
        ended = 0;
        for (int lane = 0; lane < LANES; lane++) {
            threadIdx = first;
            threadIdx.x += warp.lane = lane;
            swapcontext(&warp.back, &warp.lanes[lane]);
            ended += warp.done[lane];
        }
        if (ended && ended < LANES) return false;
    }
    return true;
}

static inline void __syncwarp() {
    if (LANES > 1) swapcontext(&warp.lanes[warp.lane], &warp.back);
}
template <class T> static inline T __shfl_xor_sync(unsigned, T mine, int step) {
    memcpy(&warp.shown[warp.lane], &mine, sizeof mine);
    __syncwarp();
    T theirs;
    memcpy(&theirs, &warp.shown[warp.lane ^ step], sizeof theirs);
    __syncwarp();
    return theirs;
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void **given;
    template <size_t... N> void run(std::index_sequence<N...>) { kernel(*static_cast<A *>(given[N])...); }
    static void body(void *self) { static_cast<Call *>(self)->run(std::index_sequence_for<A...>()); }
};

// 0, or the number of the argument whose size is wrong, -1 for a wrong number of them, -2 if lanes part at a barrier.
template <class... A>
int launched(void (*kernel)(A...), void **given, const int *sizes, int count, const unsigned *grid, const unsigned *block) {
    const int due[] = {int(sizeof(A))..., 0};
    if (count != int(sizeof...(A))) return -1;
    for (int n = 0; n < count; n++)
        if (sizes[n] != due[n]) return n + 1;
    Call<A...> call{kernel, given};
    warp.body = Call<A...>::body;
    warp.what = &call;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++)
                for (unsigned z = 0; z < block[2]; z++)
                    for (unsigned y = 0; y < block[1]; y++)
                        for (unsigned x = 0; x < block[0]; x += LANES) {
                            threadIdx = {x, y, z};
                            if (LANES == 1)
                                call.body(&call);
                            else if (!run_warp(threadIdx))
                                return -2;
                        }
    return 0;
}

static inline void __syncthreads() {}
static inline void __threadfence_system() {}
template <class T> static inline T atomicAdd(T *at, T more) {
    T before = *at;
    *at += more;
    return before;
}
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
static const float CUDART_INF_F = INFINITY;

// Half types: numbers in memory, float in hand.
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        bits = std::isnan(x) ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
    operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &u, 4);
        return x;
    }
};
struct __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value(_Float16(x)) {}
    operator float() const { return float(value); }
};
