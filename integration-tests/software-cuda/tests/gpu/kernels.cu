// Kernels for the tests of the software device. Some kernels are correct, and others have one mistake each.
#include <cuda_bf16.h>
#include <mma.h>

extern "C" __global__ void add(float* __restrict__ out, const float* __restrict__ a, const float* __restrict__ b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a[i] + b[i];
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

// Returns the sum over the block. If `SYNC` is false, a barrier is missing.
template <bool SYNC> __device__ float block_sum(float v) {
    __shared__ float part[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
    v = warp_sum(v);
    if (lane == 0) part[warp] = v;
    if (SYNC) __syncthreads();
    v = lane < warps ? part[lane] : 0.0f;
    return warp_sum(v);
}

extern "C" __global__ void __launch_bounds__(256) row_sum(float* out, const float* x, int n) {
    float v = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[blockIdx.x * n + i];
    v = block_sum<true>(v);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
}
extern "C" __global__ void row_sum_no_barrier(float* out, const float* x, int n) {
    float v = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[blockIdx.x * n + i];
    v = block_sum<false>(v);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
}

// Reverses a tile in dynamic shared memory.
template <bool SYNC> __device__ void reverse_tile(float* out, const float* x, int n) {
    extern __shared__ __align__(16) float tile[];
    int i = threadIdx.x;
    tile[i] = x[blockIdx.x * n + i];
    if (SYNC) __syncthreads();
    out[blockIdx.x * n + i] = tile[n - 1 - i];
}
extern "C" __global__ void reverse(float* out, const float* x, int n) { reverse_tile<true>(out, x, n); }
extern "C" __global__ void reverse_no_barrier(float* out, const float* x, int n) { reverse_tile<false>(out, x, n); }
extern "C" __global__ void reverse_uninitialised(float* out, const float* x, int n) {
    extern __shared__ float tile[];
    if (threadIdx.x + 1 < n) tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = tile[n - 1 - threadIdx.x];
}

// Normalises a row in place. Every thread must read the whole row before any thread writes.
template <bool SYNC> __device__ void normalise_row(float* x, int n) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += x[blockIdx.x * n + i];
    if (SYNC) __syncthreads();
    x[blockIdx.x * n + threadIdx.x] /= sum;
}
extern "C" __global__ void normalise(float* x, int n) { normalise_row<true>(x, n); }
extern "C" __global__ void normalise_no_barrier(float* x, int n) { normalise_row<false>(x, n); }

// Lanes exchange values through shared memory.
template <bool SYNC> __device__ void rotate_lanes(float* out, const float* x) {
    __shared__ float hand[64];
    int i = threadIdx.x;
    hand[i] = x[i];
    if (SYNC) __syncwarp();
    out[i] = hand[(i & ~31) | ((i + 1) & 31)];
}
extern "C" __global__ void rotate(float* out, const float* x) { rotate_lanes<true>(out, x); }
extern "C" __global__ void rotate_no_barrier(float* out, const float* x) { rotate_lanes<false>(out, x); }

// A shuffle synchronises lanes but does not order memory.
extern "C" __global__ void rotate_shuffle(float* out, const float* x) {
    __shared__ float hand[64];
    int i = threadIdx.x;
    hand[i] = x[i];
    int next = __shfl_sync(0xffffffffu, (i & ~31) | ((i + 1) & 31), i & 31);
    out[i] = hand[next];
}

// The threads wait at different barriers, so some wait forever.
extern "C" __global__ void half_barrier(float* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __shfl_sync(0xffffffffu, 1.0f, 0);
        if (threadIdx.x == 32) __syncwarp();
        else __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}
extern "C" __global__ void whole_barrier(float* out) {
    __syncthreads();
    __syncwarp();
    out[threadIdx.x] = 1.0f;
}

// Every block adds to one number, with or without atomics.
extern "C" __global__ void count_blocks(float* out) {
    if (threadIdx.x == 0) atomicAdd(out, 1.0f);
}
extern "C" __global__ void count_blocks_plainly(float* out) {
    if (threadIdx.x == 0) *out += 1.0f;
}

// The first of these kernels scales bf16 numbers in pairs, the second one at a time.
extern "C" __global__ void scale_pairs(__nv_bfloat16* x, float by, int n) {
    int i = 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 1 < n) {
        float2 v = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(x + i));
        *reinterpret_cast<__nv_bfloat162*>(x + i) = __floats2bfloat162_rn(v.x * by, v.y * by);
    } else if (i < n) {
        x[i] = __float2bfloat16_rn(__bfloat162float(x[i]) * by);
    }
}
extern "C" __global__ void scale_singly(__nv_bfloat16* x, float by, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = __float2bfloat16(__bfloat162float(x[i]) * by);
    if (i < n) x[i] = x[i] + __nv_bfloat16(0.0f);
}
extern "C" __global__ void copy_wide(float4* __restrict__ out, const float4* __restrict__ x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i];
}

// With `APART`, the upper half of each warp waits while the lower half votes.
template <bool APART> __device__ __forceinline__ void vote(float* out) {
    unsigned votes = 0;
    if (APART && (threadIdx.x & 16)) __syncwarp();
    else votes = __ballot_sync(~0u, threadIdx.x & 1);
    out[threadIdx.x] = (float)votes;
}
extern "C" __global__ void vote_together(float* out) { vote<false>(out); }
extern "C" __global__ void vote_apart(float* out) { vote<true>(out); }

// One warp multiplies 16 x 16 by 16 x 16 through shared memory.
extern "C" __global__ void tile_product(float* d, const __nv_bfloat16* a, const __nv_bfloat16* b) {
    using namespace nvcuda;
    __shared__ __align__(32) __nv_bfloat16 as[16 * 16];
    __shared__ __align__(32) float ds[16 * 16];
    for (int i = threadIdx.x; i < 256; i += 32) as[i] = a[i];
    __syncwarp();
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> fd;
    wmma::fill_fragment(fd, 0.0f);
    wmma::load_matrix_sync(fa, as, 16);
    wmma::load_matrix_sync(fb, b, 16);
    wmma::mma_sync(fd, fa, fb, fd);
    for (int i = 0; i < fd.num_elements; i++) fd.x[i] *= 2.0f;
    wmma::store_matrix_sync(ds, fd, 16, wmma::mem_row_major);
    __syncwarp();
    for (int i = threadIdx.x; i < 256; i += 32) d[i] = ds[i];
}

// Compares the results of warp functions with expected values.
extern "C" __global__ void warp_functions(unsigned* out) {
    unsigned lane = threadIdx.x & 31;
    unsigned odd = __ballot_sync(0xffffffffu, lane & 1);
    unsigned up = __shfl_up_sync(0xffffffffu, lane, 1), down = __shfl_down_sync(0xffffffffu, lane, 3, 8);
    unsigned sum = __reduce_add_sync(0xffffffffu, lane);
    int any = __any_sync(0xffffffffu, lane == 7), all = __all_sync(0xffffffffu, lane < 31);
    int count = __syncthreads_count(lane < 4), either = __syncthreads_or(threadIdx.x == 40);
    unsigned half = lane < 16 ? __shfl_sync(0x0000ffffu, lane, 5) : __shfl_sync(0xffff0000u, lane, 21);
    out[threadIdx.x] = (odd == 0xaaaaaaaau) + 2 * (up == (lane ? lane - 1 : 0)) + 4 * (down == ((lane & 7) < 5 ? lane + 3 : lane)) +
                       8 * (sum == 496) + 16 * (any == 1) + 32 * (all == 0) + 64 * (count == 8) + 128 * (either == 1) +
                       256 * (half == (lane < 16 ? 5 : 21));
}

struct Pointers {
    float* out;
    const float* in;
};
extern "C" __global__ void through_struct(Pointers p, int n) {
    int i = threadIdx.x;
    if (i < n) p.out[i] = p.in[i] + 1.0f;
}
// Writes at an offset from its pointer, which may be outside of the pointer's region.
extern "C" __global__ void stray(float* out, long offset) { out[offset] = 1.0f; }
