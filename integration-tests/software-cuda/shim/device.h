// Device functions of CUDA C++: indices, barriers, exchanges between lanes, atomics, loads and stores.
#pragma once

namespace software_cuda {
struct Index {
    unsigned int x, y, z;
};
// The attribute `const` is valid, because a thread keeps its index while other fibers run.
SC_RAW static __attribute__((const, noinline)) Index thread_index() {
    const Fiber& f = block.fiber[block.now];
    return {f.x, f.y, f.z};
}
SC_RAW static __attribute__((const, noinline)) Index block_index() { return {block.index[0], block.index[1], block.index[2]}; }
SC_RAW static __attribute__((const, noinline)) Index block_dim() { return {block.block[0], block.block[1], block.block[2]}; }
SC_RAW static __attribute__((const, noinline)) Index grid_dim() { return {block.grid[0], block.grid[1], block.grid[2]}; }
SC_RAW static inline u32 lane_now() { return block.now & 31; }

template <class T> SC_RAW static inline T shuffle(u32 mask, T value, u32 source) {
    static_assert(sizeof(T) <= 8, "shuffles move eight bytes at most");
    u64 bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    bits = meet(mask, SHUFFLE, bits, source & 31);
    __builtin_memcpy(&value, &bits, sizeof(T));
    return value;
}
SC_RAW static u64 block_vote(bool predicate) {
    block.votes += predicate;
    block_barrier();
    return block.voted;
}
template <class T, class F> SC_RAW static inline T atomic(T* address, F change) {
    touch<ATOMIC>((const void*)address, sizeof(T));
    T before = *(volatile T*)address;
    *(volatile T*)address = change(before);
    return before;
}
} // namespace software_cuda

#define threadIdx (software_cuda::thread_index())
#define blockIdx (software_cuda::block_index())
#define blockDim (software_cuda::block_dim())
#define gridDim (software_cuda::grid_dim())
static constexpr int warpSize = 32;

SC_RAW static inline void __syncthreads() { software_cuda::block_barrier(); }
SC_RAW static inline int __syncthreads_count(int p) { return (int)software_cuda::block_vote(p != 0); }
SC_RAW static inline int __syncthreads_or(int p) { return software_cuda::block_vote(p != 0) != 0; }
SC_RAW static inline int __syncthreads_and(int p) { return software_cuda::block_vote(p == 0) == 0; }
SC_RAW static inline void __syncwarp(unsigned mask = ~0u) { software_cuda::meet(mask, software_cuda::SYNC, 0, 0); }
SC_RAW static inline void __threadfence() { software_cuda::checker->fenced = 1; }
SC_RAW static inline void __threadfence_system() { software_cuda::checker->fenced = 1; }
SC_RAW static inline void __threadfence_block() {}
SC_RAW static inline void __nanosleep(unsigned) {}
SC_RAW static inline long long clock64() {
    SC_DATA static long long ticks = 1;
    return ticks += 1000;
}
SC_RAW static inline long clock() { return clock64(); }
[[noreturn]] SC_RAW static inline void __trap() {
    software_cuda::checker->report(software_cuda::checker, "trap", "a thread calls __trap");
    software_cuda::fail();
}

#define SC_WIDTH(width) const unsigned lane = software_cuda::lane_now(), first = lane & ~((unsigned)(width)-1), in = lane - first
template <class T> SC_RAW static inline T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    SC_WIDTH(width);
    (void)in;
    return software_cuda::shuffle(mask, v, first + ((unsigned)source & (width - 1)));
}
template <class T> SC_RAW static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
    SC_WIDTH(width);
    unsigned source = in ^ (unsigned)bits;
    return software_cuda::shuffle(mask, v, source < (unsigned)width ? first + source : lane);
}
template <class T> SC_RAW static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
    SC_WIDTH(width);
    return software_cuda::shuffle(mask, v, in + by < (unsigned)width ? lane + by : lane);
}
template <class T> SC_RAW static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
    SC_WIDTH(width);
    return software_cuda::shuffle(mask, v, in >= by ? lane - by : lane);
}
#undef SC_WIDTH
SC_RAW static inline unsigned __ballot_sync(unsigned mask, int p) {
    return (unsigned)software_cuda::meet(mask, software_cuda::BALLOT, p != 0, 0);
}
SC_RAW static inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
SC_RAW static inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
SC_RAW static inline unsigned __activemask() { return software_cuda::block.warp[software_cuda::block.now >> 5].alive; }
#define SC_REDUCE(NAME, T, EXPRESSION)                                                                                 \
    SC_RAW static inline T NAME(unsigned mask, T v) {                                                                  \
        T a = v;                                                                                                       \
        bool any = false;                                                                                              \
        for (unsigned l = 0; l < 32; l++)                                                                              \
            if (mask & software_cuda::block.warp[software_cuda::block.now >> 5].alive & 1u << l) {                     \
                T b = software_cuda::shuffle(mask, v, l);                                                              \
                a = any ? (EXPRESSION) : b;                                                                            \
                any = true;                                                                                            \
            }                                                                                                          \
        return a;                                                                                                      \
    }
SC_REDUCE(__reduce_add_sync, unsigned, a + b)
SC_REDUCE(__reduce_add_sync, int, a + b)
SC_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SC_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SC_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SC_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SC_REDUCE(__reduce_and_sync, unsigned, a & b)
SC_REDUCE(__reduce_or_sync, unsigned, a | b)
SC_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SC_REDUCE

#define SC_ATOMIC(NAME, T, EXPRESSION)                                                                                 \
    SC_RAW static inline T NAME(T* address, T v) {                                                                     \
        return software_cuda::atomic(address, [v](T old) SC_RAW -> T { return EXPRESSION; });                          \
    }
#define SC_ATOMIC_INTEGERS(NAME, EXPRESSION)                                                                           \
    SC_ATOMIC(NAME, int, EXPRESSION)                                                                                   \
    SC_ATOMIC(NAME, unsigned, EXPRESSION)                                                                              \
    SC_ATOMIC(NAME, unsigned long long, EXPRESSION)
SC_ATOMIC_INTEGERS(atomicAdd, old + v)
SC_ATOMIC(atomicAdd, float, old + v)
SC_ATOMIC(atomicAdd, double, old + v)
SC_ATOMIC(atomicSub, int, old - v)
SC_ATOMIC(atomicSub, unsigned, old - v)
SC_ATOMIC_INTEGERS(atomicMax, old > v ? old : v)
SC_ATOMIC_INTEGERS(atomicMin, old < v ? old : v)
SC_ATOMIC_INTEGERS(atomicAnd, old & v)
SC_ATOMIC_INTEGERS(atomicOr, old | v)
SC_ATOMIC_INTEGERS(atomicXor, old ^ v)
SC_ATOMIC_INTEGERS(atomicExch, v)
SC_ATOMIC(atomicExch, float, v)
SC_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
SC_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)
#undef SC_ATOMIC_INTEGERS
#undef SC_ATOMIC
#define SC_CAS(T)                                                                                                      \
    SC_RAW static inline T atomicCAS(T* address, T expected, T v) {                                                    \
        return software_cuda::atomic(address, [=](T old) SC_RAW -> T { return old == expected ? v : old; });           \
    }
SC_CAS(int)
SC_CAS(unsigned)
SC_CAS(unsigned long long)
#undef SC_CAS

template <class T> static inline __attribute__((always_inline)) T __ldg(const T* p) { return *p; }
template <class T> static inline __attribute__((always_inline)) T __ldcs(const T* p) { return *p; }
template <class T> static inline __attribute__((always_inline)) T __ldcg(const T* p) { return *p; }
template <class T> static inline __attribute__((always_inline)) T __ldca(const T* p) { return *p; }
template <class T> static inline __attribute__((always_inline)) T __ldlu(const T* p) { return *p; }
template <class T> static inline __attribute__((always_inline)) T __ldcv(const T* p) { return *p; }
template <class T> static inline __attribute__((always_inline)) void __stcs(T* p, T v) { *p = v; }
template <class T> static inline __attribute__((always_inline)) void __stcg(T* p, T v) { *p = v; }
template <class T> static inline __attribute__((always_inline)) void __stwb(T* p, T v) { *p = v; }
template <class T> static inline __attribute__((always_inline)) void __stwt(T* p, T v) { *p = v; }

// memcpy and memset check each range as one access. A copy of at most 16 bytes becomes plain loads and stores.
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
}
namespace software_cuda {
SC_RAW static __attribute__((noinline)) void* copy_checked(void* to, const void* from, size_t bytes) {
    touch<READ>(from, bytes);
    touch<WRITE>(to, bytes);
    return __builtin_memcpy(to, from, bytes);
}
SC_RAW static __attribute__((noinline)) void* fill_checked(void* to, int value, size_t bytes) {
    touch<WRITE>(to, bytes);
    return __builtin_memset(to, value, bytes);
}
} // namespace software_cuda
#define memcpy(to, from, bytes)                                                                                        \
    (__builtin_constant_p(bytes) && (bytes) <= 16 ? __builtin_memcpy(to, from, bytes) : software_cuda::copy_checked(to, from, bytes))
#define memset(to, value, bytes) software_cuda::fill_checked(to, value, bytes)
