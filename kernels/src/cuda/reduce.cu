// Sums over rows and over all elements. If one block would take too long, there are two passes, and the first leaves
// one partial sum per part in the workspace. The shape alone determines the number of parts, so results have the same
// bits on every device.

// A block sums W * blockDim.x columns over the rows of part blockIdx.y. The blockDim.y threads of a column take these
// rows in turn; blockDim.y is a power of two. `value(row, column, values)` adds W adjacent values; values after `width`
// are ignored.
template <class V, class U>
INLINE void column_sums(V value, U* out, i64 rows, i64 width, i64 rows_per_part, bool accumulate) {
    constexpr int W = 4;
    __shared__ float all[256 * W];
    const i64 column = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * W;
    const i64 begin = (i64)blockIdx.y * rows_per_part;
    const i64 end = begin + rows_per_part < rows ? begin + rows_per_part : rows;
    float sums[W] = {};
    if (column < width) {
        for (i64 row = begin + threadIdx.y; row < end; row += blockDim.y) value(row, column, sums);
    }
    float* mine = all + (threadIdx.y * blockDim.x + threadIdx.x) * W;
#pragma unroll
    for (int j = 0; j < W; j++) mine[j] = sums[j];
    for (u32 half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) {
#pragma unroll
            for (int j = 0; j < W; j++) mine[j] += mine[half * blockDim.x * W + j];
        }
    }
    if (threadIdx.y > 0) return;
    out += (i64)blockIdx.y * width;
#pragma unroll
    for (int j = 0; j < W; j++) {
        if (column + j < width) narrow(&out[column + j], accumulate ? widen(out[column + j]) + mine[j] : mine[j]);
    }
}

// Loads four adjacent elements of a row of `width`, and zeros after the end of the row.
template <class T>
INLINE void load_four(float (&values)[4], const T* x, i64 row, i64 column, i64 width, bool whole) {
    const T* from = x + row * width + column;
    if (whole) {
        load<4>(values, from);
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) values[j] = column + j < width ? widen(from[j]) : 0.0f;
}

template <class T, class U>
INLINE void sum_leading(const T* x, U* out, i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    const bool whole = width % 4 == 0 && aligned(x);
    auto add = [=](i64 row, i64 column, float(&sums)[4]) {
        float values[4];
        load_four(values, x, row, column, width, whole);
#pragma unroll
        for (int j = 0; j < 4; j++) sums[j] += values[j];
    };
    column_sums(add, out, rows, width, rows_per_part, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(256)
    sum_leading_f32(const float* x, float* out, i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    sum_leading(x, out, rows, width, rows_per_part, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    sum_leading_bf16(const bf16* x, bf16* out, i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    sum_leading(x, out, rows, width, rows_per_part, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    sum_leading_bf16_f32(const bf16* x, float* out, i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    sum_leading(x, out, rows, width, rows_per_part, accumulate);
}

// The second pass of a sum that is stored in bf16.
extern "C" __global__ void __launch_bounds__(256)
    sum_leading_f32_bf16(const float* x, bf16* out, i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    sum_leading(x, out, rows, width, rows_per_part, accumulate);
}

// Layer norm's dweight: the sum over rows of dy (x - mean) rstd.
template <class T>
INLINE void layer_norm_grad_weight(const T* dy, const T* x, const float* means, const float* rstds, float* out,
                                   i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    const bool whole = width % 4 == 0 && aligned(dy) && aligned(x);
    auto add = [=](i64 row, i64 column, float(&sums)[4]) {
        float gradients[4], values[4];
        load_four(gradients, dy, row, column, width, whole);
        load_four(values, x, row, column, width, whole);
        const float mean = means[row], rstd = rstds[row];
#pragma unroll
        for (int j = 0; j < 4; j++) sums[j] += gradients[j] * ((values[j] - mean) * rstd);
    };
    column_sums(add, out, rows, width, rows_per_part, accumulate != 0);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_grad_weight_f32(const float* dy, const float* x, const float* means, const float* rstds, float* out,
                               i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    layer_norm_grad_weight(dy, x, means, rstds, out, rows, width, rows_per_part, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_grad_weight_bf16(const bf16* dy, const bf16* x, const float* means, const float* rstds, float* out,
                                i64 rows, i64 width, i64 rows_per_part, int accumulate) {
    layer_norm_grad_weight(dy, x, means, rstds, out, rows, width, rows_per_part, accumulate);
}

// 2^-192, as in op.rs.
#define SQUARES_SCALE 1.5930919111324523e-58

// The bits of a double as two floats, because the workspace is only aligned to a float.
struct DoubleBits {
    float words[2];
};

// Adds a sum of squares to out[0]. Adds the same sum, scaled by 2^-192 to prevent overflow, to out[1].
INLINE void add_squares(float* out, double sum) {
    out[0] += (float)sum;
    out[1] += (float)(sum * SQUARES_SCALE);
}

// Sums the squares of gridDim.x parts of `per_part` elements each, in f64. Stores one sum per part in `partial`. If
// `partial` is null, there is one part, whose sum is added to `out`.
extern "C" __global__ void __launch_bounds__(256)
    sum_squares_f32(const float* x, float* partial, float* out, i64 n, i64 per_part) {
    constexpr int W = Width<float>::value;
    const i64 begin = (i64)blockIdx.x * per_part;
    const i64 end = begin + per_part < n ? begin + per_part : n;
    double sum = 0.0;
    // Part sizes are multiples of a pack.
    const i64 vector_end = aligned(x) ? end - (end - begin) % W : begin;
    for (i64 i = begin + (i64)threadIdx.x * W; i < vector_end; i += (i64)blockDim.x * W) {
        float values[W];
        load<W>(values, x + i);
#pragma unroll
        for (int j = 0; j < W; j++) sum += (double)values[j] * (double)values[j];
    }
    for (i64 i = vector_end + threadIdx.x; i < end; i += blockDim.x) sum += (double)x[i] * (double)x[i];
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    if (partial) {
        DoubleBits bits;
        copy_bits(bits, sum);
        partial[2 * (i64)blockIdx.x] = bits.words[0];
        partial[2 * (i64)blockIdx.x + 1] = bits.words[1];
    } else {
        add_squares(out, sum);
    }
}

// One block adds the sum of the partial sums to `out`.
extern "C" __global__ void __launch_bounds__(256) add_partial_sums(const float* partial, float* out, i64 parts) {
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < parts; i += blockDim.x) {
        const DoubleBits bits = {{partial[2 * i], partial[2 * i + 1]}};
        double part;
        copy_bits(part, bits);
        sum += part;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) add_squares(out, sum);
}

// norm = sqrt(s), where s is the sum of the first column of `sums`. If s overflows a float, it is computed from the sum
// of the second column, which is scaled by 2^-192. scale = min(1, max_norm / (norm + 1e-6)), or NaN if the norm is Inf
// or NaN. `n` counts the elements of both columns. There is one block, in which one thread adds in order.
extern "C" __global__ void __launch_bounds__(256)
    clip_scale(const float* sums, float* scale, float* norm, i64 n, float max_norm) {
    __shared__ float chunk[256];
    double plain = 0.0, scaled = 0.0;
    for (i64 begin = 0; begin < n; begin += 256) {
        const int count = n - begin < 256 ? (int)(n - begin) : 256;
        __syncthreads();
        if (threadIdx.x < count) chunk[threadIdx.x] = sums[begin + threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 0; i < count; i += 2) {
                plain += (double)chunk[i];
                scaled += (double)chunk[i + 1];
            }
        }
    }
    if (threadIdx.x > 0) return;
    const double root = sqrt(plain == (double)-MINUS_INFINITY ? scaled / SQUARES_SCALE : plain);
    const double factor = (double)max_norm / (root + 1e-6);
    const bool finite = root < (double)-MINUS_INFINITY;
    // With a NaN max_norm, the comparison is false and nothing is clipped, as on the CPU.
    *scale = !finite ? __int_as_float(0x7fffffff) : (float)(factor < 1.0 ? factor : 1.0);
    *norm = (float)root;
}
