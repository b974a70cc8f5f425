// Tensor cores on the host. Which of a sum's elements a lane holds is not specified; here it is scattered on purpose.
#pragma once
#include "cuda_bf16.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };

// Each lane has the whole matrix, as rows of the product's rows (a) or of its summed index (b).
template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
    float all[16][16];
};

template <>
struct fragment<accumulator, 16, 16, 16, float> {
    static constexpr int num_elements = 8;
    float x[8];
};

typedef fragment<accumulator, 16, 16, 16, float> Sums;

inline int number(int e) { return (shim::lane() * 8 + e) * 37 % 256; }

template <class Use, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout>& to, const __nv_bfloat16* from, unsigned pitch) {
    if (reinterpret_cast<uintptr_t>(from) % 32 || pitch % 8) fprintf(stderr, "a matrix out of line\n"), exit(3);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 16; j++) {
            const float value = __bfloat162float(from[i * pitch + j]);
            (std::is_same_v<Layout, row_major> ? to.all[i][j] : to.all[j][i]) = value;
        }
    }
}

inline void load_matrix_sync(Sums& to, const float* from, unsigned pitch, layout_t) {
    for (int e = 0; e < 8; e++) to.x[e] = from[number(e) / 16 * pitch + number(e) % 16];
}

inline void store_matrix_sync(float* to, const Sums& from, unsigned pitch, layout_t) {
    if (reinterpret_cast<uintptr_t>(to) % 32 || pitch % 4) fprintf(stderr, "a matrix out of line\n"), exit(3);
    for (int e = 0; e < 8; e++) to[number(e) / 16 * pitch + number(e) % 16] = from.x[e];
}

inline void fill_fragment(Sums& to, float value) {
    for (float& x : to.x) x = value;
}

template <class A, class B>
void mma_sync(Sums& d, const A& a, const B& b, const Sums& c) {
    for (int e = 0; e < 8; e++) {
        float sum = c.x[e];
        for (int k = 0; k < 16; k++) sum += a.all[number(e) / 16][k] * b.all[k][number(e) % 16];
        d.x[e] = sum;
    }
}

}  // namespace nvcuda::wmma
