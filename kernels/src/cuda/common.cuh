// Prepended to the text of each `.cu` file: element types, 16-byte accesses, reductions in a fixed order, and the error
// record of an index out of range.
//
// Rules for all kernels: sums are f32 or f64, whatever the element type. Results do not depend on the order in which
// blocks run, so there are no floating-point atomics. Counts are 64-bit. A buffer may begin at any element.

#include <cuda_bf16.h>

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef __nv_bfloat16 bf16;

// The block's dynamic shared memory as a pointer. A compiler for another target may define the macro first.
#ifndef DYN_SHARED
extern __shared__ __align__(128) unsigned char dynamic_shared[];
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(dynamic_shared)
#endif

#define INLINE __device__ __forceinline__
#define ALL_LANES 0xffffffffu
#define MINUS_INFINITY __int_as_float((int)0xff800000)

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return __bfloat162float(x); }

INLINE void narrow(float* to, float x) { *to = x; }
INLINE void narrow(bf16* to, float x) { *to = __float2bfloat16_rn(x); }

// Copies the bits of `from` to an object of another type.
template <class A, class B>
INLINE void copy_bits(A& to, const B& from) {
    static_assert(sizeof(to) == sizeof(from), "sizes must match");
#ifdef SOFTWARE_CUDA
    __builtin_memcpy(&to, &from, sizeof(to));
#else
    memcpy(&to, &from, sizeof(to));
#endif
}

// Number of elements in 16 bytes.
template <class T>
struct Width {
    static constexpr int value = 16 / sizeof(T);
};

INLINE bool aligned(const void* pointer) { return (reinterpret_cast<size_t>(pointer) & 15) == 0; }

// Returns x after rounding to type T.
template <class T>
INLINE float stored(float x) {
    T there;
    narrow(&there, x);
    return widen(there);
}

// Writes element i: as f32 if `wide` is set, else as bf16.
INLINE void narrow_at(void* to, bool wide, i64 i, float x) {
    if (wide) {
        static_cast<float*>(to)[i] = x;
    } else {
        narrow(static_cast<bf16*>(to) + i, x);
    }
}

// Number of adjacent elements that fit in 16 bytes in both types.
template <class T, class U>
struct CommonWidth {
    static constexpr int value = Width<T>::value < Width<U>::value ? Width<T>::value : Width<U>::value;
};

// Loads W adjacent elements, in accesses of 16 or 8 bytes if the size allows. The address must be aligned accordingly.
template <int W, class T>
INLINE void load(float (&values)[W], const T* from) {
    T raw[W];
    if constexpr (W * sizeof(T) % 16 == 0) {
        uint4 bits[W * sizeof(T) / 16];
#pragma unroll
        for (int j = 0; j < (int)(W * sizeof(T) / 16); j++) bits[j] = reinterpret_cast<const uint4*>(from)[j];
        copy_bits(raw, bits);
    } else if constexpr (W * sizeof(T) == 8) {
        const uint2 bits = *reinterpret_cast<const uint2*>(from);
        copy_bits(raw, bits);
    } else {
#pragma unroll
        for (int j = 0; j < W; j++) raw[j] = from[j];
    }
#pragma unroll
    for (int j = 0; j < W; j++) values[j] = widen(raw[j]);
}

template <int W, class T>
INLINE void store(T* to, const float (&values)[W]) {
    T raw[W];
#pragma unroll
    for (int j = 0; j < W; j++) narrow(&raw[j], values[j]);
    if constexpr (W * sizeof(T) % 16 == 0) {
        uint4 bits[W * sizeof(T) / 16];
        copy_bits(bits, raw);
#pragma unroll
        for (int j = 0; j < (int)(W * sizeof(T) / 16); j++) reinterpret_cast<uint4*>(to)[j] = bits[j];
    } else if constexpr (W * sizeof(T) == 8) {
        uint2 bits;
        copy_bits(bits, raw);
        *reinterpret_cast<uint2*>(to) = bits;
    } else {
#pragma unroll
        for (int j = 0; j < W; j++) to[j] = raw[j];
    }
}

// Returns the larger value. Ignores a NaN in b, like the CPU kernel; the row's sum of exponentials is NaN anyway.
INLINE float larger(float a, float b) { return b > a ? b : a; }

// Sum over each group of LANES adjacent threads of a warp, returned to each thread of the group.
template <int LANES = 32, class V>
INLINE V warp_sum(V value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

template <int LANES = 32>
INLINE float warp_max(float value) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        value = larger(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// Sum over the block, returned to each thread. The block's size in x is a multiple of the warp size.
template <class V>
__device__ V block_sum(V value) {
    __shared__ V parts[32];
    value = warp_sum(value);
    // Wait until the parts of an earlier call have been read.
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    V total = parts[0];
    for (u32 i = 1; i < blockDim.x / 32; i++) total += parts[i];
    return total;
}

__device__ inline float block_max(float value) {
    __shared__ float parts[32];
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float best = parts[0];
    for (u32 i = 1; i < blockDim.x / 32; i++) best = larger(best, parts[i]);
    return best;
}

INLINE i64 global_thread() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

// Checks all indices with one block and records the first that is not in 0..limit, unless the stream's record already
// holds an error. Launches of a stream are ordered, so a record has one writer at a time. See ErrorRecord in step.rs.
__device__ inline void check_indices(const int* indices, i64 count, i64 limit, u32* record, u32 launch) {
    __shared__ u64 firsts[32];
    u64 first = ~0ull;
    for (i64 i = threadIdx.x; i < count; i += blockDim.x) {
        const int index = indices[i];
        if (index < 0 || index >= limit) {
            first = i;
            break;
        }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, first, distance);
        first = other < first ? other : first;
    }
    if (threadIdx.x % 32 == 0) firsts[threadIdx.x / 32] = first;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (u32 i = 1; i < blockDim.x / 32; i++) first = firsts[i] < first ? firsts[i] : first;
    if (first == ~0ull || record[0] != 0) return;
    record[1] = (u32)indices[first];
    record[2] = (u32)first;
    record[3] = (u32)(first >> 32);
    record[4] = (u32)limit;
    record[5] = (u32)((u64)limit >> 32);
    record[0] = launch + 1;
}

// Maps an index in a region of up to four dims to an offset in the larger tensor. The last dim is contiguous.
struct Box {
    // Extents of dims 1 to 3.
    u64 size1, size2, size3;
    // Strides of dims 0 to 2, in elements.
    u64 step0, step1, step2;

    template <class I>
    INLINE u64 place_by(I index) const {
        const I inner = index % (I)size3;
        index /= (I)size3;
        const I third = index % (I)size2;
        index /= (I)size2;
        const I second = index % (I)size1;
        return (u64)(index / (I)size1) * step0 + second * step1 + third * step2 + inner;
    }

    // Uses 32-bit division where possible: 64-bit division is slow.
    INLINE u64 place(u64 index) const {
        const bool wide = ((index | size1 | size2 | size3) >> 32) != 0;
        return wide ? place_by<u64>(index) : place_by<u32>((u32)index);
    }
};
