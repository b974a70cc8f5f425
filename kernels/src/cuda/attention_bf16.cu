// Causal attention and its gradient in bf16 on tensor cores: wmma 16x16x16 with f32 sums. The design follows
// attention_f32.cu: scores are not stored, and two kernels compute the gradient. Each sum has one owner and a fixed
// order.
//
// A block is four warps. Each warp has 16 of the block's 64 rows. CUDA does not specify the position of an element in a
// fragment, so each warp determines it once by loading a matrix of numbered elements. Masks, exponentials and row
// factors apply to fragments. Only the softmax sums and the probabilities go through shared memory. D is the head's
// depth rounded up to a compiled depth. The extra dims are zeros in shared memory.

#include <mma.h>

using nvcuda::wmma::accumulator;
using nvcuda::wmma::col_major;
using nvcuda::wmma::fill_fragment;
using nvcuda::wmma::fragment;
using nvcuda::wmma::load_matrix_sync;
using nvcuda::wmma::matrix_a;
using nvcuda::wmma::matrix_b;
using nvcuda::wmma::mem_row_major;
using nvcuda::wmma::mma_sync;
using nvcuda::wmma::row_major;

#define ROWS 64
#define THREADS 128
// Padding of a tile row, in elements. With it, eight rows lie in different banks, and stay 16-byte aligned.
#define PAD 8
// Row pitch of the 16 columns of probabilities in the backward pass, in elements.
#define P_PITCH 24
// Row pitch of a warp's 64 scores and 64 probabilities in the forward pass, in elements.
#define S_PITCH 72
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

typedef fragment<accumulator, 16, 16, 16, float> Sums;
// Left operand: its rows are the product's rows.
typedef fragment<matrix_a, 16, 16, 16, bf16, row_major> Left;
// Right operand: its rows are indexed by the summed index.
typedef fragment<matrix_b, 16, 16, 16, bf16, row_major> Right;
// Right operand, transposed: its rows are the product's columns.
typedef fragment<matrix_b, 16, 16, 16, bf16, col_major> RightTransposed;

static_assert(Sums::num_elements == 8, "a warp holds 256 sums");

template <class A, class B>
struct IsSame {
    static constexpr bool value = false;
};
template <class A>
struct IsSame<A, A> {
    static constexpr bool value = true;
};

// Like load_matrix_sync, but only for shared memory. On a GPU, this issues the instruction for shared memory directly.
// With load_matrix_sync, NVRTC issues four generic loads per bf16 operand instead of one `ldmatrix`.
template <class F>
INLINE void load_shared(F& to, const bf16* from, u32 pitch) {
#if defined(__CUDA_ARCH__) && !defined(SOFTWARE_CUDA)
    static_assert(sizeof(to.x) == 16, "four registers");
    u32 bits[4];
    const u32 address = (u32)__cvta_generic_to_shared(from);
#define LOAD_SHARED(which)                                                                                  \
    asm volatile("wmma.load." which ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"                  \
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3]) : "r"(address), "r"(pitch) : "memory")
    if constexpr (IsSame<F, Left>::value) {
        LOAD_SHARED("a.sync.aligned.row");
    } else if constexpr (IsSame<F, Right>::value) {
        LOAD_SHARED("b.sync.aligned.row");
    } else {
        LOAD_SHARED("b.sync.aligned.col");
    }
    copy_bits(to.x, bits);
#else
    load_matrix_sync(to, from, pitch);
#endif
}

// The row and the column of each of a lane's eight elements in a fragment of sums. Each number takes four bits.
struct FragmentMap {
    u32 rows, columns;

    // `scratch` is 1 KiB of shared memory owned by the warp, 32-byte aligned.
    INLINE FragmentMap(float* scratch) {
        for (int i = threadIdx.x % 32; i < 256; i += 32) scratch[i] = (float)i;
        __syncwarp();
        Sums numbers;
        load_matrix_sync(numbers, scratch, 16, mem_row_major);
        rows = columns = 0;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const u32 number = (u32)numbers.x[e];
            rows |= number / 16 << (4 * e);
            columns |= number % 16 << (4 * e);
        }
        __syncwarp();
    }

    INLINE int row(int e) const { return rows >> (4 * e) & 15; }
    INLINE int column(int e) const { return columns >> (4 * e) & 15; }
};

// Offset and stride of the rows of one (batch, head) in a tensor [b, t, h, d].
struct HeadRows {
    i64 first, step;

    INLINE HeadRows(i64 item, i64 time, int heads, int depth) {
        const i64 batch = item / heads, head = item % heads;
        step = (i64)heads * depth;
        first = batch * time * step + head * depth;
    }
};

// Loads the rows of one (batch, head) from row `begin` on, with zeros beyond `time` and `depth`. If `whole` is set,
// loads 16 bytes at a time.
template <int D>
INLINE void load_tile(bf16* tile, const bf16* x, HeadRows item, i64 begin, i64 time, int depth, bool whole) {
    constexpr int PACKS = D / 8;
#pragma unroll
    for (int p = threadIdx.x; p < ROWS * PACKS; p += THREADS) {
        const int row = p / PACKS, column = p % PACKS * 8;
        const bf16* from = x + item.first + (begin + row) * item.step + column;
        uint4 bits = {0, 0, 0, 0};
        if (begin + row < time) {
            if (whole) {
                if (column < depth) bits = *reinterpret_cast<const uint4*>(from);
            } else {
                bf16 values[8];
                for (int j = 0; j < 8; j++) {
                    if (column + j < depth) {
                        values[j] = from[j];
                    } else {
                        narrow(&values[j], 0.0f);
                    }
                }
                copy_bits(bits, values);
            }
        }
        *reinterpret_cast<uint4*>(tile + row * (D + PAD) + column) = bits;
    }
}

// A warp's 16 rows of a tile as left operands: kept in registers, or loaded at each use if D is large.
template <int D>
struct Rows {
    static constexpr bool KEPT = D <= 64;
    Left kept[KEPT ? D / 16 : 1];
    const bf16* from;

    INLINE Rows(const bf16* tile) : from(tile) {
        if constexpr (KEPT) {
#pragma unroll
            for (int c = 0; c < D / 16; c++) load_shared(kept[c], tile + c * 16, D + PAD);
        }
    }

    // Dot products of these rows with 16 rows of a tile.
    INLINE void dots(Sums& sums, const bf16* tile) const {
        fill_fragment(sums, 0.0f);
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            RightTransposed right;
            load_shared(right, tile + c * 16, D + PAD);
            if constexpr (KEPT) {
                mma_sync(sums, kept[c], right, sums);
            } else {
                Left left;
                load_shared(left, from + c * 16, D + PAD);
                mma_sync(sums, left, right, sums);
            }
        }
    }
};

// sums += p (16 by 16) times 16 rows of a tile.
template <int D>
INLINE void add_product(Sums (&sums)[D / 16], const Left& p, const bf16* tile) {
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        Right right;
        load_shared(right, tile + c * 16, D + PAD);
        mma_sync(sums[c], p, right, sums[c]);
    }
}

// Writes a warp's 16 rows from row `begin` on: as f32 if `wide` is set (for data sent between devices), else as bf16.
template <int D, class F>
INLINE void write_rows(void* out, int wide, const Sums (&sums)[D / 16], HeadRows item, i64 begin, i64 time, int depth,
                       FragmentMap map, F factor) {
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const i64 row = begin + map.row(e);
        if (row >= time) continue;
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            const int column = c * 16 + map.column(e);
            if (column >= depth) continue;
            narrow_at(out, wide != 0, item.first + row * item.step + column, sums[c].x[e] * factor(map.row(e)));
        }
    }
}

// Running softmax of a warp's 16 rows of 64 scores. Two lanes share a row and take alternate groups of four columns.
struct Softmax {
    // `best` is a base-2 exponent; `total` is relative to 2^best.
    float best, total;

    // Converts scores to probabilities, relative to 2^best. `past` is the number of columns that are not in the future.
    // Returns the factor by which the caller must multiply the earlier sums.
    INLINE float add(const float* scores, bf16* p, float factor, i64 past) {
        const int half = threadIdx.x % 2;
        float values[8][4], most = best;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            // The scores of a group that is entirely in the future were not computed.
            if (8 * k + 4 * half < past) load<4>(values[k], scores + 8 * k + 4 * half);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool here = 8 * k + 4 * half + j < past;
                values[k][j] = here ? values[k][j] * factor : MINUS_INFINITY;
                most = larger(most, values[k][j]);
            }
        }
        most = larger(most, __shfl_xor_sync(ALL_LANES, most, 1));
        // If all scores so far are -Inf, a base of 0 avoids the NaN of (-Inf) - (-Inf).
        const float base = most == MINUS_INFINITY ? 0.0f : most;
        const float correction = exp2f(best - base);
        float sum = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                values[k][j] = exp2f(values[k][j] - base);
                sum += values[k][j];
            }
            store<4>(p + 8 * k + 4 * half, values[k]);
        }
        total = total * correction + sum + __shfl_xor_sync(ALL_LANES, sum, 1);
        best = most;
        return correction;
    }
};

template <int D>
INLINE void attention(const bf16* q, const bf16* k, const bf16* v, void* o, int o_wide, float* lse, i64 time,
                      int heads, int depth, i64 blocks, float scale) {
    constexpr int PITCH = D + PAD;
    DYN_SHARED(unsigned char, shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    bf16* k_tile = reinterpret_cast<bf16*>(shared);
    bf16* v_tile = k_tile + ROWS * PITCH;
    float* all_scores = reinterpret_cast<float*>(v_tile + ROWS * PITCH);
    float* scores = all_scores + warp * 16 * S_PITCH;
    bf16* p = reinterpret_cast<bf16*>(all_scores + ROWS * S_PITCH) + warp * 16 * S_PITCH;
    float* factors = reinterpret_cast<float*>(reinterpret_cast<bf16*>(all_scores + ROWS * S_PITCH) + ROWS * S_PITCH);
    factors += warp * 16;

    const i64 number = blockIdx.x / blocks, begin = (blocks - 1 - blockIdx.x % blocks) * ROWS;
    const i64 first_row = begin + warp * 16;
    const HeadRows item(number, time, heads, depth);
    const bool whole = depth % 8 == 0 && aligned(q) && aligned(k) && aligned(v);
    const FragmentMap map(scores);
    Left q_rows[D / 16];
    load_tile<D>(k_tile, q, item, begin, time, depth, whole);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < D / 16; c++) load_shared(q_rows[c], k_tile + warp * 16 * PITCH + c * 16, PITCH);
    Sums sums[D / 16];
#pragma unroll
    for (int c = 0; c < D / 16; c++) fill_fragment(sums[c], 0.0f);
    Softmax softmax = {MINUS_INFINITY, 0.0f};
    for (i64 key = 0; key <= begin; key += ROWS) {
        __syncthreads();
        load_tile<D>(k_tile, k, item, key, time, depth, whole);
        load_tile<D>(v_tile, v, item, key, time, depth, whole);
        __syncthreads();
        // Number of tiles of 16 columns, up to and including the tile with the column of the warp's last query.
        const int tiles = first_row - key < 48 ? (int)(first_row - key) / 16 + 1 : 4;
        for (int t = 0; t < tiles; t++) {
            Sums dots;
            fill_fragment(dots, 0.0f);
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                RightTransposed right;
                load_shared(right, k_tile + t * 16 * PITCH + c * 16, PITCH);
                mma_sync(dots, q_rows[c], right, dots);
            }
            nvcuda::wmma::store_matrix_sync(scores + t * 16, dots, S_PITCH, mem_row_major);
        }
        __syncwarp();
        const int row = lane / 2;
        const float correction =
            softmax.add(scores + row * S_PITCH, p + row * S_PITCH, scale * LOG2_E, first_row + row + 1 - key);
        if (lane % 2 == 0) factors[row] = correction;
        __syncwarp();
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const float factor = factors[map.row(e)];
#pragma unroll
            for (int c = 0; c < D / 16; c++) sums[c].x[e] *= factor;
        }
        for (int t = 0; t < tiles; t++) {
            Left left;
            load_shared(left, p + t * 16, S_PITCH);
            add_product<D>(sums, left, v_tile + t * 16 * PITCH);
        }
        // After this barrier, the scores, probabilities and factors may be overwritten.
        __syncwarp();
    }
    if (lane % 2 == 0) {
        factors[lane / 2] = 1.0f / softmax.total;
        const i64 row = first_row + lane / 2;
        if (row < time) lse[number * time + row] = (softmax.best + log2f(softmax.total)) * LN_2;
    }
    __syncwarp();
    write_rows<D>(o, o_wide, sums, item, first_row, time, depth, map, [=](int row) { return factors[row]; });
}

// Loads two values per query row for the backward kernels: base-2 lse, and delta.
INLINE void load_statistics(float2* statistics, const float* lse, const float* delta, i64 first, i64 begin, i64 time) {
    for (int i = threadIdx.x; i < ROWS; i += THREADS) {
        const i64 row = begin + i;
        statistics[i] = {0.0f, 0.0f};
        if (row < time) statistics[i] = {lse[first + row] * LOG2_E, delta[first + row]};
    }
}

// Computes dk = scale ds' q and dv = p' do for a block of keys. The notation is that of attention_f32.cu. Tiles are
// transposed: the rows are a warp's 16 keys, and the columns are queries.
template <int D>
INLINE void attention_grad_keys(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                const float* delta, void* dk, int dk_wide, void* dv, int dv_wide, i64 time, int heads,
                                int depth, i64 blocks, float scale) {
    constexpr int PITCH = D + PAD;
    DYN_SHARED(unsigned char, shared);
    const int warp = threadIdx.x / 32;
    bf16* k_tile = reinterpret_cast<bf16*>(shared);
    bf16* v_tile = k_tile + ROWS * PITCH;
    bf16* q_tile = v_tile + ROWS * PITCH;
    bf16* do_tile = q_tile + ROWS * PITCH;
    bf16* p = do_tile + ROWS * PITCH + warp * 2 * 16 * P_PITCH;
    bf16* ds = p + 16 * P_PITCH;
    float2* statistics = reinterpret_cast<float2*>(do_tile + ROWS * PITCH + 4 * 2 * 16 * P_PITCH);

    const i64 number = blockIdx.x / blocks, begin = blockIdx.x % blocks * ROWS;
    const i64 first_row = begin + warp * 16;
    const HeadRows item(number, time, heads, depth);
    const bool whole = depth % 8 == 0 && aligned(d_o) && aligned(q) && aligned(k) && aligned(v);
    const FragmentMap map(reinterpret_cast<float*>(p));
    load_tile<D>(k_tile, k, item, begin, time, depth, whole);
    load_tile<D>(v_tile, v, item, begin, time, depth, whole);
    __syncthreads();
    const Rows<D> k_rows(k_tile + warp * 16 * PITCH), v_rows(v_tile + warp * 16 * PITCH);
    Sums dk_sums[D / 16], dv_sums[D / 16];
#pragma unroll
    for (int c = 0; c < D / 16; c++) {
        fill_fragment(dk_sums[c], 0.0f);
        fill_fragment(dv_sums[c], 0.0f);
    }
    for (i64 query = begin; query < time; query += ROWS) {
        __syncthreads();
        load_tile<D>(q_tile, q, item, query, time, depth, whole);
        load_tile<D>(do_tile, d_o, item, query, time, depth, whole);
        load_statistics(statistics, lse, delta, number * time, query, time);
        __syncthreads();
        for (int t = 0; t < 4; t++) {
            // Skip these queries if all of them precede all keys of this warp.
            if (query + t * 16 + 15 < first_row) continue;
            Sums scores, dp;
            k_rows.dots(scores, q_tile + t * 16 * PITCH);
            v_rows.dots(dp, do_tile + t * 16 * PITCH);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int column = t * 16 + map.column(e), place = map.row(e) * P_PITCH + map.column(e);
                const float2 row = statistics[column];
                const bool past = query + column < time && first_row + map.row(e) <= query + column;
                const float probability = past ? exp2f(scores.x[e] * (scale * LOG2_E) - row.x) : 0.0f;
                narrow(&p[place], probability);
                narrow(&ds[place], past ? probability * (dp.x[e] - row.y) : 0.0f);
            }
            __syncwarp();
            Left left;
            load_shared(left, p, P_PITCH);
            add_product<D>(dv_sums, left, do_tile + t * 16 * PITCH);
            load_shared(left, ds, P_PITCH);
            add_product<D>(dk_sums, left, q_tile + t * 16 * PITCH);
            // After this barrier, the probabilities may be overwritten.
            __syncwarp();
        }
    }
    write_rows<D>(dk, dk_wide, dk_sums, item, first_row, time, depth, map, [=](int) { return scale; });
    write_rows<D>(dv, dv_wide, dv_sums, item, first_row, time, depth, map, [](int) { return 1.0f; });
}

// Computes dq = scale ds k for a block of queries.
template <int D>
INLINE void attention_grad_queries(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                   const float* delta, void* dq, int dq_wide, i64 time, int heads, int depth,
                                   i64 blocks, float scale) {
    constexpr int PITCH = D + PAD;
    DYN_SHARED(unsigned char, shared);
    const int warp = threadIdx.x / 32;
    bf16* q_tile = reinterpret_cast<bf16*>(shared);
    bf16* do_tile = q_tile + ROWS * PITCH;
    bf16* k_tile = do_tile + ROWS * PITCH;
    bf16* v_tile = k_tile + ROWS * PITCH;
    bf16* ds = v_tile + ROWS * PITCH + warp * 2 * 16 * P_PITCH;
    float2* statistics = reinterpret_cast<float2*>(v_tile + ROWS * PITCH + 4 * 2 * 16 * P_PITCH);

    const i64 number = blockIdx.x / blocks, begin = (blocks - 1 - blockIdx.x % blocks) * ROWS;
    const i64 first_row = begin + warp * 16;
    const HeadRows item(number, time, heads, depth);
    const bool whole = depth % 8 == 0 && aligned(d_o) && aligned(q) && aligned(k) && aligned(v);
    const FragmentMap map(reinterpret_cast<float*>(ds));
    load_tile<D>(q_tile, q, item, begin, time, depth, whole);
    load_tile<D>(do_tile, d_o, item, begin, time, depth, whole);
    load_statistics(statistics, lse, delta, number * time, begin, time);
    __syncthreads();
    const Rows<D> q_rows(q_tile + warp * 16 * PITCH), do_rows(do_tile + warp * 16 * PITCH);
    Sums sums[D / 16];
#pragma unroll
    for (int c = 0; c < D / 16; c++) fill_fragment(sums[c], 0.0f);
    for (i64 key = 0; key <= begin; key += ROWS) {
        __syncthreads();
        load_tile<D>(k_tile, k, item, key, time, depth, whole);
        load_tile<D>(v_tile, v, item, key, time, depth, whole);
        __syncthreads();
        for (int t = 0; t < 4; t++) {
            // Stop if all of these keys follow all queries of this warp.
            if (key + t * 16 > first_row + 15) break;
            Sums scores, dp;
            q_rows.dots(scores, k_tile + t * 16 * PITCH);
            do_rows.dots(dp, v_tile + t * 16 * PITCH);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int row = map.row(e);
                const float2 row_statistics = statistics[warp * 16 + row];
                const bool past = key + t * 16 + map.column(e) <= first_row + row;
                const float probability = exp2f(scores.x[e] * (scale * LOG2_E) - row_statistics.x);
                narrow(&ds[row * P_PITCH + map.column(e)], past ? probability * (dp.x[e] - row_statistics.y) : 0.0f);
            }
            __syncwarp();
            Left left;
            load_shared(left, ds, P_PITCH);
            add_product<D>(sums, left, k_tile + t * 16 * PITCH);
            // After this barrier, the probabilities may be overwritten.
            __syncwarp();
        }
    }
    write_rows<D>(dq, dq_wide, sums, item, first_row, time, depth, map, [=](int) { return scale; });
}

extern "C" __global__ void __launch_bounds__(128)
    attention_bf16_d32(const bf16* q, const bf16* k, const bf16* v, void* o, int o_wide, float* lse, i64 time,
                       int heads, int depth, i64 blocks, float scale) {
    attention<32>(q, k, v, o, o_wide, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_keys_bf16_d32(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                 const float* delta, void* dk, int dk_wide, void* dv, int dv_wide, i64 time, int heads,
                                 int depth, i64 blocks, float scale) {
    attention_grad_keys<32>(d_o, q, k, v, lse, delta, dk, dk_wide, dv, dv_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_queries_bf16_d32(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                    const float* delta, void* dq, int dq_wide, i64 time, int heads, int depth,
                                    i64 blocks, float scale) {
    attention_grad_queries<32>(d_o, q, k, v, lse, delta, dq, dq_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_bf16_d64(const bf16* q, const bf16* k, const bf16* v, void* o, int o_wide, float* lse, i64 time,
                       int heads, int depth, i64 blocks, float scale) {
    attention<64>(q, k, v, o, o_wide, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_keys_bf16_d64(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                 const float* delta, void* dk, int dk_wide, void* dv, int dv_wide, i64 time, int heads,
                                 int depth, i64 blocks, float scale) {
    attention_grad_keys<64>(d_o, q, k, v, lse, delta, dk, dk_wide, dv, dv_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_queries_bf16_d64(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                    const float* delta, void* dq, int dq_wide, i64 time, int heads, int depth,
                                    i64 blocks, float scale) {
    attention_grad_queries<64>(d_o, q, k, v, lse, delta, dq, dq_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_bf16_d96(const bf16* q, const bf16* k, const bf16* v, void* o, int o_wide, float* lse, i64 time,
                       int heads, int depth, i64 blocks, float scale) {
    attention<96>(q, k, v, o, o_wide, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_keys_bf16_d96(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                 const float* delta, void* dk, int dk_wide, void* dv, int dv_wide, i64 time, int heads,
                                 int depth, i64 blocks, float scale) {
    attention_grad_keys<96>(d_o, q, k, v, lse, delta, dk, dk_wide, dv, dv_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_queries_bf16_d96(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                    const float* delta, void* dq, int dq_wide, i64 time, int heads, int depth,
                                    i64 blocks, float scale) {
    attention_grad_queries<96>(d_o, q, k, v, lse, delta, dq, dq_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_bf16_d128(const bf16* q, const bf16* k, const bf16* v, void* o, int o_wide, float* lse, i64 time,
                        int heads, int depth, i64 blocks, float scale) {
    attention<128>(q, k, v, o, o_wide, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_keys_bf16_d128(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                  const float* delta, void* dk, int dk_wide, void* dv, int dv_wide, i64 time,
                                  int heads, int depth, i64 blocks, float scale) {
    attention_grad_keys<128>(d_o, q, k, v, lse, delta, dk, dk_wide, dv, dv_wide, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_queries_bf16_d128(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                     const float* delta, void* dq, int dq_wide, i64 time, int heads, int depth,
                                     i64 blocks, float scale) {
    attention_grad_queries<128>(d_o, q, k, v, lse, delta, dq, dq_wide, time, heads, depth, blocks, scale);
}
