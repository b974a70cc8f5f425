// Causal attention for heads of any depth, one warp per row, and the row sums that every backward pass needs first.
// These kernels are slow; tiled kernels cover common depths. Outputs are f32 if their flag `.._wide` is set, else bf16.

// Offset of row `row` of item `item`, a (batch, head), in a tensor [b, t, h, d].
INLINE i64 row_start(i64 item, i64 row, i64 time, int heads, i64 depth) {
    return ((item / heads * time + row) * heads + item % heads) * depth;
}

template <class T>
INLINE float warp_dot(const T* a, const T* b, i64 depth) {
    float sum = 0.0f;
    for (i64 c = threadIdx.x % 32; c < depth; c += 32) sum += widen(a[c]) * widen(b[c]);
    return warp_sum(sum);
}

// Number of columns, 32 apart, that a lane sums at once. Deeper heads take several passes over the rows.
#define LANE_COLUMNS 8

// sums += factor * row, for the columns from `begin` on.
template <class T>
INLINE void add_columns(float (&sums)[LANE_COLUMNS], float factor, const T* row, i64 begin, i64 depth) {
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j++) {
        const i64 column = begin + threadIdx.x % 32 + 32 * j;
        if (column < depth) sums[j] += factor * widen(row[column]);
    }
}

// Writes factor * sums to the row that begins at element `start`, for the columns from `begin` on.
INLINE void write_columns(void* to, bool wide, i64 start, const float (&sums)[LANE_COLUMNS], float factor, i64 begin,
                          i64 depth) {
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j++) {
        const i64 column = begin + threadIdx.x % 32 + 32 * j;
        if (column < depth) narrow_at(to, wide, start + column, sums[j] * factor);
    }
}

// `rows` is batch * heads * time.
template <class T>
INLINE void attention_plain(const T* q, const T* k, const T* v, void* o, bool o_wide, float* lse, i64 rows, i64 time,
                            int heads, i64 depth, float scale) {
    const i64 warp = global_thread() / 32;
    if (warp >= rows) return;
    const i64 item = warp / time, query = warp % time;
    const T* q_row = q + row_start(item, query, time, heads, depth);
    float best = MINUS_INFINITY;
    for (i64 key = 0; key <= query; key++) {
        best = larger(best, scale * warp_dot(q_row, k + row_start(item, key, time, heads, depth), depth));
    }
    float total = 0.0f;
    for (i64 key = 0; key <= query; key++) {
        total += expf(scale * warp_dot(q_row, k + row_start(item, key, time, heads, depth), depth) - best);
    }
    if (threadIdx.x % 32 == 0) lse[warp] = best + logf(total);
    for (i64 begin = 0; begin < depth; begin += 32 * LANE_COLUMNS) {
        float sums[LANE_COLUMNS] = {};
        for (i64 key = 0; key <= query; key++) {
            const i64 start = row_start(item, key, time, heads, depth);
            add_columns(sums, expf(scale * warp_dot(q_row, k + start, depth) - best), v + start, begin, depth);
        }
        write_columns(o, o_wide, row_start(item, query, time, heads, depth), sums, 1.0f / total, begin, depth);
    }
}

template <class T>
INLINE void attention_grad_keys_plain(const T* d_o, const T* q, const T* k, const T* v, const float* lse,
                                      const float* delta, void* dk, bool dk_wide, void* dv, bool dv_wide, i64 rows,
                                      i64 time, int heads, i64 depth, float scale) {
    const i64 warp = global_thread() / 32;
    if (warp >= rows) return;
    const i64 item = warp / time, key = warp % time, key_start = row_start(item, key, time, heads, depth);
    for (i64 begin = 0; begin < depth; begin += 32 * LANE_COLUMNS) {
        float dk_sums[LANE_COLUMNS] = {}, dv_sums[LANE_COLUMNS] = {};
        for (i64 query = key; query < time; query++) {
            const i64 start = row_start(item, query, time, heads, depth), row = item * time + query;
            const float p = expf(scale * warp_dot(q + start, k + key_start, depth) - lse[row]);
            const float ds = p * (warp_dot(d_o + start, v + key_start, depth) - delta[row]);
            add_columns(dv_sums, p, d_o + start, begin, depth);
            add_columns(dk_sums, ds, q + start, begin, depth);
        }
        write_columns(dk, dk_wide, key_start, dk_sums, scale, begin, depth);
        write_columns(dv, dv_wide, key_start, dv_sums, 1.0f, begin, depth);
    }
}

template <class T>
INLINE void attention_grad_queries_plain(const T* d_o, const T* q, const T* k, const T* v, const float* lse,
                                         const float* delta, void* dq, bool dq_wide, i64 rows, i64 time, int heads,
                                         i64 depth, float scale) {
    const i64 warp = global_thread() / 32;
    if (warp >= rows) return;
    const i64 item = warp / time, query = warp % time, query_start = row_start(item, query, time, heads, depth);
    for (i64 begin = 0; begin < depth; begin += 32 * LANE_COLUMNS) {
        float sums[LANE_COLUMNS] = {};
        for (i64 key = 0; key <= query; key++) {
            const i64 start = row_start(item, key, time, heads, depth);
            const float p = expf(scale * warp_dot(q + query_start, k + start, depth) - lse[warp]);
            const float ds = p * (warp_dot(d_o + query_start, v + start, depth) - delta[warp]);
            add_columns(sums, ds, k + start, begin, depth);
        }
        write_columns(dq, dq_wide, query_start, sums, scale, begin, depth);
    }
}

// delta [b, h, t]: the row sums of do * o.
template <class T>
INLINE void attention_delta(const T* d_o, const T* o, float* delta, i64 rows, i64 time, int heads, i64 depth) {
    const i64 warp = global_thread() / 32;
    if (warp >= rows) return;
    // Warps follow the order of the tensors' rows, [b, t, h], so adjacent warps read adjacent rows.
    const i64 head = warp % heads, row = warp / heads % time, batch = warp / heads / time;
    const float sum = warp_dot(d_o + warp * depth, o + warp * depth, depth);
    if (threadIdx.x % 32 == 0) delta[(batch * heads + head) * time + row] = sum;
}

extern "C" __global__ void __launch_bounds__(128)
    attention_plain_f32(const float* q, const float* k, const float* v, float* o, float* lse, i64 rows, i64 time,
                        int heads, i64 depth, float scale) {
    attention_plain(q, k, v, o, true, lse, rows, time, heads, depth, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_keys_plain_f32(const float* d_o, const float* q, const float* k, const float* v, const float* lse,
                                  const float* delta, float* dk, float* dv, i64 rows, i64 time, int heads, i64 depth,
                                  float scale) {
    attention_grad_keys_plain(d_o, q, k, v, lse, delta, dk, true, dv, true, rows, time, heads, depth, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_queries_plain_f32(const float* d_o, const float* q, const float* k, const float* v,
                                     const float* lse, const float* delta, float* dq, i64 rows, i64 time, int heads,
                                     i64 depth, float scale) {
    attention_grad_queries_plain(d_o, q, k, v, lse, delta, dq, true, rows, time, heads, depth, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_delta_f32(const float* d_o, const float* o, float* delta, i64 rows, i64 time, int heads, i64 depth) {
    attention_delta(d_o, o, delta, rows, time, heads, depth);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_plain_bf16(const bf16* q, const bf16* k, const bf16* v, void* o, int o_wide, float* lse, i64 rows,
                         i64 time, int heads, i64 depth, float scale) {
    attention_plain(q, k, v, o, o_wide != 0, lse, rows, time, heads, depth, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_keys_plain_bf16(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                   const float* delta, void* dk, int dk_wide, void* dv, int dv_wide, i64 rows,
                                   i64 time, int heads, i64 depth, float scale) {
    attention_grad_keys_plain(d_o, q, k, v, lse, delta, dk, dk_wide != 0, dv, dv_wide != 0, rows, time, heads, depth,
                              scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_grad_queries_plain_bf16(const bf16* d_o, const bf16* q, const bf16* k, const bf16* v, const float* lse,
                                      const float* delta, void* dq, int dq_wide, i64 rows, i64 time, int heads,
                                      i64 depth, float scale) {
    attention_grad_queries_plain(d_o, q, k, v, lse, delta, dq, dq_wide != 0, rows, time, heads, depth, scale);
}

extern "C" __global__ void __launch_bounds__(128)
    attention_delta_bf16(const bf16* d_o, const bf16* o, float* delta, i64 rows, i64 time, int heads, i64 depth) {
    attention_delta(d_o, o, delta, rows, time, heads, depth);
}
