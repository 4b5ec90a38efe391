// What CUDA C means on a CPU that runs one thread of a kernel at a time.
#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {
unsigned the_grid[3], the_block[3], the_threads[3], the_blocks[3];
}


#define __global__ extern "C"
#define __device__ inline
#define __forceinline__
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct Place {
    unsigned x, y, z;
};
#define blockIdx (Place{the_grid[0], the_grid[1], the_grid[2]})
#define threadIdx (Place{the_block[0], the_block[1], the_block[2]})
#define blockDim (Place{the_threads[0], the_threads[1], the_threads[2]})
#define gridDim (Place{the_blocks[0], the_blocks[1], the_blocks[2]})

static inline void __syncthreads() {}
static inline void __syncwarp() {}
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
