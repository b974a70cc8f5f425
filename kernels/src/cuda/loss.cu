// Softmax cross entropy in several kernels, so that devices can share a vocabulary. One block processes a row. With an
// odd vocabulary size, rows begin unaligned: the elements before the first aligned 16 bytes are processed singly.

// Number of elements before the first aligned 16 bytes of a row, and the end of the last aligned 16 bytes.
struct AlignedSpan {
    i64 head, tail;

    template <class T>
    INLINE AlignedSpan(const T* row, i64 width) {
        constexpr int W = Width<T>::value;
        const i64 before = (16 - reinterpret_cast<size_t>(row) % 16) % 16 / sizeof(T);
        head = before < width ? before : width;
        tail = width - (width - head) % W;
    }
};

// Passes this thread's share of a row to `into`, as arrays of adjacent values.
template <class T, class Into>
INLINE void read_row(const T* row, i64 width, Into& into) {
    constexpr int W = Width<T>::value;
    const AlignedSpan span(row, width);
    auto single = [&](i64 i) {
        const float value[1] = {widen(row[i])};
        into.add(value);
    };
    for (i64 i = threadIdx.x; i < span.head; i += blockDim.x) single(i);
#pragma unroll 4
    for (i64 i = span.head + (i64)threadIdx.x * W; i < span.tail; i += (i64)blockDim.x * W) {
        float values[W];
        load<W>(values, row + i);
        into.add(values);
    }
    for (i64 i = span.tail + threadIdx.x; i < width; i += blockDim.x) single(i);
}

// y[column] = f(column, x[column]); y may be x.
template <class T, class U, class F>
INLINE void map_row(const T* x, U* y, i64 width, F f) {
    constexpr int W = Width<T>::value;
    if (sizeof(T) != sizeof(U) || (reinterpret_cast<size_t>(x) ^ reinterpret_cast<size_t>(y)) % 16 != 0) {
        for (i64 i = threadIdx.x; i < width; i += blockDim.x) narrow(&y[i], f(i, widen(x[i])));
        return;
    }
    const AlignedSpan span(x, width);
    for (i64 i = threadIdx.x; i < span.head; i += blockDim.x) narrow(&y[i], f(i, widen(x[i])));
    for (i64 i = span.head + (i64)threadIdx.x * W; i < span.tail; i += (i64)blockDim.x * W) {
        float values[W];
        load<W>(values, x + i);
#pragma unroll
        for (int j = 0; j < W; j++) values[j] = f(i + j, values[j]);
        store<W>(y + i, values);
    }
    for (i64 i = span.tail + threadIdx.x; i < width; i += blockDim.x) narrow(&y[i], f(i, widen(x[i])));
}

struct RowMaximum {
    float best;

    template <int W>
    INLINE void add(const float (&logits)[W]) {
#pragma unroll
        for (int j = 0; j < W; j++) best = larger(best, logits[j]);
    }
};

template <class T>
INLINE void row_max(const T* logits, float* maxima, i64 width) {
    const i64 row = blockIdx.x;
    RowMaximum maximum = {MINUS_INFINITY};
    read_row(logits + row * width, width, maximum);
    const float best = block_max(maximum.best);
    if (threadIdx.x == 0) maxima[row] = best;
}

extern "C" __global__ void __launch_bounds__(512) row_max_f32(const float* logits, float* maxima, i64 width) {
    row_max(logits, maxima, width);
}

extern "C" __global__ void __launch_bounds__(512) row_max_bf16(const bf16* logits, float* maxima, i64 width) {
    row_max(logits, maxima, width);
}

struct ExpSum {
    float max, sum;

    template <int W>
    INLINE void add(const float (&logits)[W]) {
#pragma unroll
        for (int j = 0; j < W; j++) sum += expf(logits[j] - max);
    }
};

template <class T>
INLINE void sum_exp_target(const T* logits, const float* maxima, const int* targets, float* sums, float* chosen,
                           i64 rows, i64 width, i64 vocab_start, i64 vocab, u32* record, u32 launch) {
    const i64 row = blockIdx.x;
    if (row == 0) check_indices(targets, rows, vocab, record, launch);
    ExpSum exponentials = {maxima[row], 0.0f};
    read_row(logits + row * width, width, exponentials);
    const float sum = block_sum(exponentials.sum);
    if (threadIdx.x > 0) return;
    sums[row] = sum;
    const i64 column = (i64)targets[row] - vocab_start;
    chosen[row] = column >= 0 && column < width ? widen(logits[row * width + column]) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(512)
    sum_exp_target_f32(const float* logits, const float* maxima, const int* targets, float* sums, float* chosen,
                       i64 rows, i64 width, i64 vocab_start, i64 vocab, u32* record, u32 launch) {
    sum_exp_target(logits, maxima, targets, sums, chosen, rows, width, vocab_start, vocab, record, launch);
}

extern "C" __global__ void __launch_bounds__(512)
    sum_exp_target_bf16(const bf16* logits, const float* maxima, const int* targets, float* sums, float* chosen,
                        i64 rows, i64 width, i64 vocab_start, i64 vocab, u32* record, u32 launch) {
    sum_exp_target(logits, maxima, targets, sums, chosen, rows, width, vocab_start, vocab, record, launch);
}

// A running sum of exponentials relative to the largest logit so far.
struct RunningExpSum {
    float best, sum;

    template <int W>
    INLINE void add(const float (&logits)[W]) {
        float most = best;
#pragma unroll
        for (int j = 0; j < W; j++) most = larger(most, logits[j]);
        if (most > best) {
            sum *= expf(best - most);
            best = most;
        }
        // Inf and NaN logits make the sum NaN.
#pragma unroll
        for (int j = 0; j < W; j++) sum += logits[j] != MINUS_INFINITY ? expf(logits[j] - best) : 0.0f;
    }
};

// row_max and sum_exp_target in one pass over the logits, for a vocabulary that is not split. Each thread's sum is
// relative to the largest logit that the thread has seen. Inf and NaN logits give the same results as in two passes.
template <class T>
INLINE void row_max_sum_exp_target(const T* logits, const int* targets, float* maxima, float* sums, float* chosen,
                                   i64 rows, i64 width, i64 vocab_start, i64 vocab, u32* record, u32 launch) {
    const i64 row = blockIdx.x;
    if (row == 0) check_indices(targets, rows, vocab, record, launch);
    RunningExpSum own = {MINUS_INFINITY, 0.0f};
    read_row(logits + row * width, width, own);
    const float most = block_max(own.best);
    const float sum = block_sum(own.best == MINUS_INFINITY ? own.sum : own.sum * expf(own.best - most));
    if (threadIdx.x > 0) return;
    maxima[row] = most;
    // If all logits are -Inf, the result is NaN.
    sums[row] = width > 0 && most == MINUS_INFINITY ? most - most : sum;
    const i64 column = (i64)targets[row] - vocab_start;
    chosen[row] = column >= 0 && column < width ? widen(logits[row * width + column]) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(512)
    row_max_sum_exp_target_f32(const float* logits, const int* targets, float* maxima, float* sums, float* chosen,
                               i64 rows, i64 width, i64 vocab_start, i64 vocab, u32* record, u32 launch) {
    row_max_sum_exp_target(logits, targets, maxima, sums, chosen, rows, width, vocab_start, vocab, record, launch);
}

extern "C" __global__ void __launch_bounds__(512)
    row_max_sum_exp_target_bf16(const bf16* logits, const int* targets, float* maxima, float* sums, float* chosen,
                                i64 rows, i64 width, i64 vocab_start, i64 vocab, u32* record, u32 launch) {
    row_max_sum_exp_target(logits, targets, maxima, sums, chosen, rows, width, vocab_start, vocab, record, launch);
}

// One block computes scale * sum(max + ln(sum) - target), in f64.
extern "C" __global__ void __launch_bounds__(1024)
    token_loss(const float* maxima, const float* sums, const float* chosen, float* loss, i64 tokens, float scale,
               int accumulate) {
    double total = 0.0;
    for (i64 i = threadIdx.x; i < tokens; i += blockDim.x) {
        total += (double)maxima[i] + log((double)sums[i]) - (double)chosen[i];
    }
    total = block_sum(total);
    if (threadIdx.x > 0) return;
    const float value = (float)((double)scale * total);
    *loss = accumulate ? *loss + value : value;
}

// dloss * scale * (exp(logit - max) / sum - [column == target])
template <class T, class U>
INLINE void cross_entropy_grad(const float* dloss, const T* logits, const float* maxima, const float* sums,
                               const int* targets, U* dlogits, i64 width, i64 vocab_start, float scale) {
    const i64 row = blockIdx.x;
    const float max = maxima[row], factor = *dloss * scale, row_factor = factor / sums[row];
    const i64 target = (i64)targets[row] - vocab_start;
    map_row(logits + row * width, dlogits + row * width, width, [=](i64 column, float logit) {
        const float gradient = row_factor * expf(logit - max);
        return column == target ? gradient - factor : gradient;
    });
}

extern "C" __global__ void __launch_bounds__(512)
    cross_entropy_grad_f32(const float* dloss, const float* logits, const float* maxima, const float* sums,
                           const int* targets, float* dlogits, i64 width, i64 vocab_start, float scale) {
    cross_entropy_grad(dloss, logits, maxima, sums, targets, dlogits, width, vocab_start, scale);
}

extern "C" __global__ void __launch_bounds__(512)
    cross_entropy_grad_bf16(const float* dloss, const bf16* logits, const float* maxima, const float* sums,
                            const int* targets, bf16* dlogits, i64 width, i64 vocab_start, float scale) {
    cross_entropy_grad(dloss, logits, maxima, sums, targets, dlogits, width, vocab_start, scale);
}

extern "C" __global__ void __launch_bounds__(512)
    cross_entropy_grad_bf16_f32(const float* dloss, const bf16* logits, const float* maxima, const float* sums,
                                const int* targets, float* dlogits, i64 width, i64 vocab_start, float scale) {
    cross_entropy_grad(dloss, logits, maxima, sums, targets, dlogits, width, vocab_start, scale);
}
