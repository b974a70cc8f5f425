// Causal attention and its gradient in f32. Tiles are in shared memory and sums in registers; scores are not stored
// (Dao et al. 2022, https://arxiv.org/abs/2205.14135). The gradient recomputes the probabilities from lse, the log of
// each row's sum of exponentials. One kernel computes dk and dv by blocks of keys, another computes dq by blocks of
// queries. Each sum has one owner and a fixed order.
//
// A block is 256 threads, viewed as 16 by 16. Thread (x, y) has R rows, y * R + i, and the columns x + 16 j of a tile.
// D is the head's depth rounded up to a compiled depth. The extra dims are zeros in shared memory. An item is a (batch,
// head); a block's index is item * blocks + block. The blocks with the most work come first.

// Padding, in elements, after the D elements of a tile row, so that 16 rows lie in different banks.
#define PAD 4

// Offset and stride of the rows of one (batch, head) in a tensor [b, t, h, d].
struct HeadRows {
    i64 first, step;

    INLINE HeadRows(i64 item, i64 time, int heads, int depth) {
        const i64 batch = item / heads, head = item % heads;
        step = (i64)heads * depth;
        first = batch * time * step + head * depth;
    }
};

// Loads the rows of one (batch, head) from row `begin` on, with zeros after the last row and after `depth`. If `whole`
// is set, loads four adjacent elements at a time.
template <int D, int ROWS>
INLINE void load_tile(float* tile, const float* x, HeadRows item, i64 begin, i64 time, int depth, bool whole) {
    constexpr int PACKS = D / 4;
    for (int p = threadIdx.x; p < ROWS * PACKS; p += 256) {
        const int row = p / PACKS, column = p % PACKS * 4;
        const float* from = x + item.first + (begin + row) * item.step + column;
        float values[4] = {};
        if (begin + row < time) {
            if (!whole) {
                for (int j = 0; j < 4; j++) values[j] = column + j < depth ? from[j] : 0.0f;
            } else if (column < depth) {
                load<4>(values, from);
            }
        }
        store<4>(tile + row * (D + PAD) + column, values);
    }
}

// sums[i][j] += dot product of row i of a and row j of b, over K dims. a begins at the thread's first row, b at the row
// of the thread's first column.
template <int K, int R, int C>
INLINE void add_dots(float (&sums)[R][C], const float* a, int a_pitch, const float* b, int b_pitch) {
#pragma unroll 4
    for (int k = 0; k < K; k += 4) {
        float left[R][4], right[C][4];
#pragma unroll
        for (int i = 0; i < R; i++) load<4>(left[i], a + i * a_pitch + k);
#pragma unroll
        for (int j = 0; j < C; j++) load<4>(right[j], b + 16 * j * b_pitch + k);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int j = 0; j < C; j++) {
#pragma unroll
                for (int l = 0; l < 4; l++) sums[i][j] = fmaf(left[i][l], right[j][l], sums[i][j]);
            }
        }
    }
}

// sums[i][j] += sum over k of a[i][k] b[k][16 j].
template <int K, int R, int C>
INLINE void add_product(float (&sums)[R][C], const float* a, int a_pitch, const float* b, int b_pitch) {
#pragma unroll 2
    for (int k = 0; k < K; k += 4) {
        float left[R][4];
#pragma unroll
        for (int i = 0; i < R; i++) load<4>(left[i], a + i * a_pitch + k);
#pragma unroll
        for (int l = 0; l < 4; l++) {
#pragma unroll
            for (int j = 0; j < C; j++) {
                const float right = b[(k + l) * b_pitch + 16 * j];
#pragma unroll
                for (int i = 0; i < R; i++) sums[i][j] = fmaf(left[i][l], right, sums[i][j]);
            }
        }
    }
}

// sums[i][j] += sum over k of a[k][i] b[k][16 j], for four rows i.
template <int K, int C>
INLINE void add_transposed_product(float (&sums)[4][C], const float* a, int a_pitch, const float* b, int b_pitch) {
#pragma unroll 4
    for (int k = 0; k < K; k++) {
        float left[4];
        load<4>(left, a + k * a_pitch);
#pragma unroll
        for (int j = 0; j < C; j++) {
            const float right = b[k * b_pitch + 16 * j];
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i][j] = fmaf(left[i], right, sums[i][j]);
        }
    }
}

// Writes a thread's part of a tile to the rows begin + y * 4 + i.
template <int C>
INLINE void write_rows(float* out, const float (&values)[4][C], HeadRows item, i64 begin, i64 time, int depth,
                       const float (&factors)[4]) {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const i64 row = begin + y * 4 + i;
        if (row >= time) return;
#pragma unroll
        for (int j = 0; j < C; j++) {
            const int column = x + 16 * j;
            if (column < depth) out[item.first + row * item.step + column] = values[i][j] * factors[i];
        }
    }
}

// Number of threads that share a row.
constexpr int ROW_LANES = 16;

template <int D>
INLINE void attention(const float* q, const float* k, const float* v, float* o, float* lse, i64 time, int heads,
                      int depth, i64 blocks, float scale) {
    constexpr int QUERIES = 64, KEYS = 32, PITCH = D + PAD, P_PITCH = KEYS + PAD, C = D / 16;
    DYN_SHARED(float, shared);
    float* q_tile = shared;
    float* k_tile = q_tile + QUERIES * PITCH;
    float* v_tile = k_tile + KEYS * PITCH;
    float* p_tile = v_tile + KEYS * PITCH;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const i64 number = blockIdx.x / blocks, begin = (blocks - 1 - blockIdx.x % blocks) * QUERIES;
    const HeadRows item(number, time, heads, depth);
    const bool whole = depth % 4 == 0 && aligned(q) && aligned(k) && aligned(v);
    load_tile<D, QUERIES>(q_tile, q, item, begin, time, depth, whole);
    float sums[4][C] = {}, maxima[4], totals[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) maxima[i] = MINUS_INFINITY;
    const i64 end = begin + QUERIES < time ? begin + QUERIES : time;
    for (i64 key = 0; key < end; key += KEYS) {
        __syncthreads();
        load_tile<D, KEYS>(k_tile, k, item, key, time, depth, whole);
        load_tile<D, KEYS>(v_tile, v, item, key, time, depth, whole);
        __syncthreads();
        float scores[4][2] = {};
        add_dots<D>(scores, q_tile + y * 4 * PITCH, PITCH, k_tile + x * PITCH, PITCH);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float best = maxima[i];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool past = key + x + 16 * j <= begin + y * 4 + i;
                scores[i][j] = past ? scale * scores[i][j] : MINUS_INFINITY;
                best = larger(best, scores[i][j]);
            }
            best = warp_max<ROW_LANES>(best);
            // If all scores so far are -Inf, a base of 0 avoids the NaN of (-Inf) - (-Inf).
            const float base = best == MINUS_INFINITY ? 0.0f : best;
            const float correction = expf(maxima[i] - base);
            maxima[i] = best;
            float total = 0.0f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float p = expf(scores[i][j] - base);
                p_tile[(y * 4 + i) * P_PITCH + x + 16 * j] = p;
                total += p;
            }
            totals[i] = totals[i] * correction + warp_sum<ROW_LANES>(total);
#pragma unroll
            for (int j = 0; j < C; j++) sums[i][j] *= correction;
        }
        // One half warp both writes and reads a row of p_tile, so a warp barrier suffices.
        __syncwarp();
        add_product<KEYS>(sums, p_tile + y * 4 * P_PITCH, P_PITCH, v_tile + x, PITCH);
    }
    float factors[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        factors[i] = 1.0f / totals[i];
        const i64 row = begin + y * 4 + i;
        if (x == 0 && row < time) lse[number * time + row] = maxima[i] + logf(totals[i]);
    }
    write_rows(o, sums, item, begin, time, depth, factors);
}

// Computes dk = scale ds' q and dv = p' do for a block of keys. Here, ' is the transpose, the scores are s = q k', the
// probabilities are p = e^(scale s - lse), and ds = p (do v' - delta). delta holds the row sums of do * o. The products
// sum over the queries from the position of the block's first key on.
template <int D>
INLINE void attention_grad_keys(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                const float* delta, float* dk, float* dv, i64 time, int heads, int depth, i64 blocks,
                                float scale) {
    constexpr int QUERIES = 32, KEYS = 64, PITCH = D + PAD, P_PITCH = KEYS + PAD, C = D / 16;
    DYN_SHARED(float, shared);
    float* k_tile = shared;
    float* v_tile = k_tile + KEYS * PITCH;
    float* q_tile = v_tile + KEYS * PITCH;
    float* do_tile = q_tile + QUERIES * PITCH;
    float* p_tile = do_tile + QUERIES * PITCH;
    float* ds_tile = p_tile + QUERIES * P_PITCH;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const i64 number = blockIdx.x / blocks, begin = blockIdx.x % blocks * KEYS;
    const HeadRows item(number, time, heads, depth);
    const bool whole = depth % 4 == 0 && aligned(d_o) && aligned(q) && aligned(k) && aligned(v);
    load_tile<D, KEYS>(k_tile, k, item, begin, time, depth, whole);
    load_tile<D, KEYS>(v_tile, v, item, begin, time, depth, whole);
    float dk_sums[4][C] = {}, dv_sums[4][C] = {};
    for (i64 query = begin; query < time; query += QUERIES) {
        __syncthreads();
        load_tile<D, QUERIES>(q_tile, q, item, query, time, depth, whole);
        load_tile<D, QUERIES>(do_tile, d_o, item, query, time, depth, whole);
        __syncthreads();
        float scores[2][4] = {}, dp[2][4] = {};
        add_dots<D>(scores, q_tile + y * 2 * PITCH, PITCH, k_tile + x * PITCH, PITCH);
        add_dots<D>(dp, do_tile + y * 2 * PITCH, PITCH, v_tile + x * PITCH, PITCH);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const i64 row = query + y * 2 + i;
            const float row_lse = row < time ? lse[number * time + row] : 0.0f;
            const float row_delta = row < time ? delta[number * time + row] : 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const bool past = row < time && begin + x + 16 * j <= row;
                const float p = past ? expf(scale * scores[i][j] - row_lse) : 0.0f;
                const int place = (y * 2 + i) * P_PITCH + x + 16 * j;
                p_tile[place] = p;
                ds_tile[place] = past ? p * (dp[i][j] - row_delta) : 0.0f;
            }
        }
        __syncthreads();
        add_transposed_product<QUERIES>(dv_sums, p_tile + y * 4, P_PITCH, do_tile + x, PITCH);
        add_transposed_product<QUERIES>(dk_sums, ds_tile + y * 4, P_PITCH, q_tile + x, PITCH);
    }
    write_rows(dk, dk_sums, item, begin, time, depth, {scale, scale, scale, scale});
    write_rows(dv, dv_sums, item, begin, time, depth, {1.0f, 1.0f, 1.0f, 1.0f});
}

// Computes dq = scale ds k for a block of queries.
template <int D>
INLINE void attention_grad_queries(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                   const float* delta, float* dq, i64 time, int heads, int depth, i64 blocks,
                                   float scale) {
    constexpr int QUERIES = 64, KEYS = 32, PITCH = D + PAD, P_PITCH = KEYS + PAD, C = D / 16;
    DYN_SHARED(float, shared);
    float* q_tile = shared;
    float* do_tile = q_tile + QUERIES * PITCH;
    float* k_tile = do_tile + QUERIES * PITCH;
    float* v_tile = k_tile + KEYS * PITCH;
    float* ds_tile = v_tile + KEYS * PITCH;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    const i64 number = blockIdx.x / blocks, begin = (blocks - 1 - blockIdx.x % blocks) * QUERIES;
    const HeadRows item(number, time, heads, depth);
    const bool whole = depth % 4 == 0 && aligned(d_o) && aligned(q) && aligned(k) && aligned(v);
    load_tile<D, QUERIES>(q_tile, q, item, begin, time, depth, whole);
    load_tile<D, QUERIES>(do_tile, d_o, item, begin, time, depth, whole);
    float row_lse[4] = {}, row_delta[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const i64 row = begin + y * 4 + i;
        if (row >= time) continue;
        row_lse[i] = lse[number * time + row];
        row_delta[i] = delta[number * time + row];
    }
    float sums[4][C] = {};
    const i64 end = begin + QUERIES < time ? begin + QUERIES : time;
    for (i64 key = 0; key < end; key += KEYS) {
        __syncthreads();
        load_tile<D, KEYS>(k_tile, k, item, key, time, depth, whole);
        load_tile<D, KEYS>(v_tile, v, item, key, time, depth, whole);
        __syncthreads();
        float scores[4][2] = {}, dp[4][2] = {};
        add_dots<D>(scores, q_tile + y * 4 * PITCH, PITCH, k_tile + x * PITCH, PITCH);
        add_dots<D>(dp, do_tile + y * 4 * PITCH, PITCH, v_tile + x * PITCH, PITCH);
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool past = key + x + 16 * j <= begin + y * 4 + i;
                const float p = expf(scale * scores[i][j] - row_lse[i]);
                ds_tile[(y * 4 + i) * P_PITCH + x + 16 * j] = past ? p * (dp[i][j] - row_delta[i]) : 0.0f;
            }
        }
        // A warp barrier suffices, as in `attention`.
        __syncwarp();
        add_product<KEYS>(sums, ds_tile + y * 4 * P_PITCH, P_PITCH, k_tile + x, PITCH);
    }
    write_rows(dq, sums, item, begin, time, depth, {scale, scale, scale, scale});
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_f32_d32(const float* q, const float* k, const float* v, float* o, float* lse, i64 time, int heads,
                      int depth, i64 blocks, float scale) {
    attention<32>(q, k, v, o, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_grad_keys_f32_d32(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                const float* delta, float* dk, float* dv, i64 time, int heads, int depth, i64 blocks,
                                float scale) {
    attention_grad_keys<32>(d_o, q, k, v, lse, delta, dk, dv, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_grad_queries_f32_d32(const float* d_o, const float* q, const float* k, const float* v,
                                   const float* lse, const float* delta, float* dq, i64 time, int heads, int depth,
                                   i64 blocks, float scale) {
    attention_grad_queries<32>(d_o, q, k, v, lse, delta, dq, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_f32_d64(const float* q, const float* k, const float* v, float* o, float* lse, i64 time, int heads,
                      int depth, i64 blocks, float scale) {
    attention<64>(q, k, v, o, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_grad_keys_f32_d64(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                const float* delta, float* dk, float* dv, i64 time, int heads, int depth, i64 blocks,
                                float scale) {
    attention_grad_keys<64>(d_o, q, k, v, lse, delta, dk, dv, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_grad_queries_f32_d64(const float* d_o, const float* q, const float* k, const float* v,
                                   const float* lse, const float* delta, float* dq, i64 time, int heads, int depth,
                                   i64 blocks, float scale) {
    attention_grad_queries<64>(d_o, q, k, v, lse, delta, dq, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_f32_d96(const float* q, const float* k, const float* v, float* o, float* lse, i64 time, int heads,
                      int depth, i64 blocks, float scale) {
    attention<96>(q, k, v, o, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_grad_keys_f32_d96(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                const float* delta, float* dk, float* dv, i64 time, int heads, int depth, i64 blocks,
                                float scale) {
    attention_grad_keys<96>(d_o, q, k, v, lse, delta, dk, dv, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_grad_queries_f32_d96(const float* d_o, const float* q, const float* k, const float* v,
                                   const float* lse, const float* delta, float* dq, i64 time, int heads, int depth,
                                   i64 blocks, float scale) {
    attention_grad_queries<96>(d_o, q, k, v, lse, delta, dq, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_f32_d128(const float* q, const float* k, const float* v, float* o, float* lse, i64 time, int heads,
                      int depth, i64 blocks, float scale) {
    attention<128>(q, k, v, o, lse, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_grad_keys_f32_d128(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                const float* delta, float* dk, float* dv, i64 time, int heads, int depth, i64 blocks,
                                float scale) {
    attention_grad_keys<128>(d_o, q, k, v, lse, delta, dk, dv, time, heads, depth, blocks, scale);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    attention_grad_queries_f32_d128(const float* d_o, const float* q, const float* k, const float* v,
                                   const float* lse, const float* delta, float* dq, i64 time, int heads, int depth,
                                   i64 blocks, float scale) {
    attention_grad_queries<128>(d_o, q, k, v, lse, delta, dq, time, heads, depth, blocks, scale);
}
