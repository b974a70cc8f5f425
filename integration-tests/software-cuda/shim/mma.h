// nvcuda::wmma for bf16, 16 x 16 x 16, with f32 accumulators. CUDA leaves the mapping of elements to lanes unspecified,
// and the mapping here differs from that of GPUs. Loads and stores are checked. As on a GPU, they do not order the
// memory accesses of different lanes.
#pragma once
#include "cuda_bf16.h"

namespace nvcuda {
namespace wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static_assert(M == 16 && N == 16 && K == 16, "the shim has 16 x 16 x 16 only");
    enum { num_elements = 8 };
    typedef T element_type;
    T x[num_elements];
};

namespace shim {
using software_cuda::u32;
// Row and column of element `i` of a lane. Each lane has half a row of 16 elements.
SC_RAW static inline u32 row_of(u32 lane) { return lane >> 1; }
SC_RAW static inline u32 column_of(u32 lane, u32 i) { return (lane & 1) * 8 + i; }
template <class T> SC_RAW static inline size_t place(bool by_rows, u32 i, unsigned leading) {
    u32 lane = software_cuda::lane_now(), row = row_of(lane), column = column_of(lane, i);
    return by_rows ? (size_t)row * leading + column : (size_t)column * leading + row;
}
// PTX requires a row stride that is a multiple of half a row, because a lane moves half a row at once. CUDA C++
// requires an address that is a multiple of 32 bytes.
template <class T> constexpr unsigned STRIDE = 8 * sizeof(T);
template <class T> SC_RAW static __attribute__((noinline)) void load(T* x, const T* from, unsigned leading, bool by_rows) {
    if ((size_t)from % 32 || leading * sizeof(T) % STRIDE<T>)
        software_cuda::checker->report(software_cuda::checker, "alignment",
                                       "a fragment is loaded from an address that is not a multiple of 32 bytes, or "
                                       "with a stride that is not a multiple of 16 bytes (32 bytes for floats)");
    for (u32 i = 0; i < 8; i++) {
        const T* at = from + place<T>(by_rows, i, leading);
        software_cuda::touch<software_cuda::READ>(at, sizeof(T));
        x[i] = *at;
    }
}
template <class T> SC_RAW static __attribute__((noinline)) void store(T* to, const T* x, unsigned leading, bool by_rows) {
    if ((size_t)to % 32 || leading * sizeof(T) % STRIDE<T>)
        software_cuda::checker->report(software_cuda::checker, "alignment",
                                       "a fragment is stored to an address that is not a multiple of 32 bytes, or "
                                       "with a stride that is not a multiple of 16 bytes (32 bytes for floats)");
    for (u32 i = 0; i < 8; i++) {
        T* at = to + place<T>(by_rows, i, leading);
        software_cuda::touch<software_cuda::WRITE>(at, sizeof(T));
        *at = x[i];
    }
}
// Waits for all lanes, but does not order memory accesses.
SC_RAW static inline void together() { software_cuda::meet(~0u, software_cuda::MATRIX, 0, 0); }
} // namespace shim

template <class F, class T> SC_RAW static inline void fill_fragment(F& f, T value) {
    for (int i = 0; i < F::num_elements; i++) f.x[i] = value;
}
template <class Use, class T, class Layout>
SC_RAW static inline void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& f, const T* from, unsigned leading) {
    shim::together();
    shim::load(f.x, from, leading, __is_same(Layout, row_major));
}
template <class T>
SC_RAW static inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& f, const T* from, unsigned leading, layout_t layout) {
    shim::together();
    shim::load(f.x, from, leading, layout == mem_row_major);
}
template <class T>
SC_RAW static inline void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& f, unsigned leading, layout_t layout) {
    shim::together();
    shim::store(to, f.x, leading, layout == mem_row_major);
}
template <class La, class Lb>
SC_RAW static __attribute__((noinline)) void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, __nv_bfloat16, La>& a, const fragment<matrix_b, 16, 16, 16, __nv_bfloat16, Lb>& b, const fragment<accumulator, 16, 16, 16, float>& c) {
    // The warp's scratch memory holds 16 x 16 elements of each operand, row by row.
    float* as = (float*)(software_cuda::checker->scratch + (software_cuda::block.now >> 5) * 4096);
    float* bs = as + 256;
    unsigned lane = software_cuda::lane_now(), row = shim::row_of(lane);
    for (unsigned i = 0; i < 8; i++) {
        as[row * 16 + shim::column_of(lane, i)] = __bfloat162float(a.x[i]);
        bs[row * 16 + shim::column_of(lane, i)] = __bfloat162float(b.x[i]);
    }
    shim::together();
    float sums[8];
    for (unsigned i = 0; i < 8; i++) sums[i] = c.x[i];
    for (unsigned k = 0; k < 16; k++)
        for (unsigned i = 0; i < 8; i++) sums[i] += as[row * 16 + k] * bs[k * 16 + shim::column_of(lane, i)];
    for (unsigned i = 0; i < 8; i++) d.x[i] = sums[i];
    shim::together();
}
} // namespace wmma
} // namespace nvcuda
