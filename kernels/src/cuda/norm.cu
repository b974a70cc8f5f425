// Layer norm and its gradient. One warp processes a row, and keeps the row's first packs in registers. Weights and
// statistics are f32 for every type of x. The gradient of the weight is in reduce.cu.

// Number of packs of W elements that a lane keeps. With packs of 16 bytes, a warp keeps 1024 elements.
template <int W>
struct KeptPacks {
    static constexpr int packs = W > 4 ? 32 / W : 8;
};

// Calls f(offset of a pack in the row, its values) for each of a lane's packs of W elements.
template <int W, class T, class F>
INLINE void for_each_pack(const T* row, i64 width, float (&kept)[KeptPacks<W>::packs][W], F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int p = 0; p < KeptPacks<W>::packs; p++) {
        const i64 place = (lane + 32 * p) * W;
        if (place < width) f(place, kept[p]);
    }
    for (i64 place = (i64)(lane + 32 * KeptPacks<W>::packs) * W; place < width; place += 32 * W) {
        float values[W];
        load<W>(values, row + place);
        f(place, values);
    }
}

template <int W, class T>
INLINE void keep_packs(const T* row, i64 width, float (&kept)[KeptPacks<W>::packs][W]) {
#pragma unroll
    for (int p = 0; p < KeptPacks<W>::packs; p++) {
        const i64 place = (threadIdx.x % 32 + 32 * p) * W;
        if (place < width) load<W>(kept[p], row + place);
    }
}

// `x` is the complete row. If there is a residual, `add_row` has already added it.
template <int W, class T, class U>
INLINE void layer_norm_row(const T* x, const float* weight, U* y, float* mean, float* rstd, i64 width, float eps) {
    float kept[KeptPacks<W>::packs][W];
    keep_packs<W>(x, width, kept);
    float sum = 0.0f;
    for_each_pack<W>(x, width, kept, [&](i64, float(&values)[W]) {
#pragma unroll
        for (int j = 0; j < W; j++) sum += values[j];
    });
    const float centre = warp_sum(sum) / width;
    float squares = 0.0f;
    for_each_pack<W>(x, width, kept, [&](i64, float(&values)[W]) {
#pragma unroll
        for (int j = 0; j < W; j++) squares += (values[j] - centre) * (values[j] - centre);
    });
    const float factor = 1.0f / sqrtf(warp_sum(squares) / width + eps);
    for_each_pack<W>(x, width, kept, [&](i64 place, float(&values)[W]) {
        float weights[W], normed[W];
        load<W>(weights, weight + place);
#pragma unroll
        for (int j = 0; j < W; j++) normed[j] = (values[j] - centre) * factor * weights[j];
        store<W>(y + place, normed);
    });
    if (threadIdx.x % 32 == 0) {
        *mean = centre;
        *rstd = factor;
    }
}

// sums = a + b for one row. Each lane later reads only elements that it wrote itself, so no barrier is needed.
template <int W, class T>
INLINE void add_row(const T* a, const T* b, T* sums, i64 width) {
    for (i64 place = (i64)(threadIdx.x % 32) * W; place < width; place += 32 * W) {
        float left[W], right[W];
        load<W>(left, a + place);
        load<W>(right, b + place);
#pragma unroll
        for (int j = 0; j < W; j++) left[j] += right[j];
        store<W>(sums + place, left);
    }
}

template <class T, class U>
INLINE void layer_norm(const T* x, const float* weight, U* y, float* means, float* rstds, i64 rows, i64 width,
                       float eps) {
    constexpr int W = Width<T>::value;
    const i64 row = global_thread() / 32;
    if (row >= rows) return;
    if (width % W == 0 && aligned(x) && aligned(weight) && aligned(y)) {
        layer_norm_row<W>(x + row * width, weight, y + row * width, means + row, rstds + row, width, eps);
    } else {
        layer_norm_row<1>(x + row * width, weight, y + row * width, means + row, rstds + row, width, eps);
    }
}

template <class T>
INLINE void add_layer_norm(const T* a, const T* b, const float* weight, T* sums, T* y, float* means, float* rstds,
                           i64 rows, i64 width, float eps) {
    constexpr int W = Width<T>::value;
    const i64 row = global_thread() / 32, first = row * width;
    if (row >= rows) return;
    if (width % W == 0 && aligned(a) && aligned(b) && aligned(weight) && aligned(sums) && aligned(y)) {
        add_row<W>(a + first, b + first, sums + first, width);
        layer_norm_row<W>(sums + first, weight, y + first, means + row, rstds + row, width, eps);
    } else {
        add_row<1>(a + first, b + first, sums + first, width);
        layer_norm_row<1>(sums + first, weight, y + first, means + row, rstds + row, width, eps);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    layer_norm_f32(const float* x, const float* weight, float* y, float* means, float* rstds, i64 rows, i64 width,
                   float eps) {
    layer_norm(x, weight, y, means, rstds, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(128)
    layer_norm_bf16(const bf16* x, const float* weight, bf16* y, float* means, float* rstds, i64 rows, i64 width,
                    float eps) {
    layer_norm(x, weight, y, means, rstds, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(128)
    layer_norm_bf16_f32(const bf16* x, const float* weight, float* y, float* means, float* rstds, i64 rows, i64 width,
                        float eps) {
    layer_norm(x, weight, y, means, rstds, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(128)
    add_layer_norm_f32(const float* a, const float* b, const float* weight, float* sums, float* y, float* means,
                       float* rstds, i64 rows, i64 width, float eps) {
    add_layer_norm(a, b, weight, sums, y, means, rstds, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(128)
    add_layer_norm_bf16(const bf16* a, const bf16* b, const float* weight, bf16* sums, bf16* y, float* means,
                        float* rstds, i64 rows, i64 width, float eps) {
    add_layer_norm(a, b, weight, sums, y, means, rstds, rows, width, eps);
}

// dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy weight and xhat = (x - mean) rstd.
template <int W, class T, class U>
INLINE void layer_norm_grad_row(const T* dy, const T* x, const float* weight, U* dx, float mean, float rstd,
                                i64 width) {
    float kept[KeptPacks<W>::packs][W];
    keep_packs<W>(x, width, kept);
    float g_sum = 0.0f, gx_sum = 0.0f;
    for_each_pack<W>(x, width, kept, [&](i64 place, float(&values)[W]) {
        float gradients[W], weights[W];
        load<W>(gradients, dy + place);
        load<W>(weights, weight + place);
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float g = gradients[j] * weights[j];
            g_sum += g;
            gx_sum += g * ((values[j] - mean) * rstd);
        }
    });
    const float g_mean = warp_sum(g_sum) / width, gx_mean = warp_sum(gx_sum) / width;
    for_each_pack<W>(x, width, kept, [&](i64 place, float(&values)[W]) {
        float gradients[W], weights[W];
        load<W>(gradients, dy + place);
        load<W>(weights, weight + place);
#pragma unroll
        for (int j = 0; j < W; j++) {
            const float normed = (values[j] - mean) * rstd;
            gradients[j] = rstd * (gradients[j] * weights[j] - g_mean - normed * gx_mean);
        }
        store<W>(dx + place, gradients);
    });
}

template <class T, class U>
INLINE void layer_norm_grad(const T* dy, const T* x, const float* weight, const float* means, const float* rstds,
                            U* dx, i64 rows, i64 width) {
    constexpr int W = Width<T>::value;
    const i64 row = global_thread() / 32, first = row * width;
    if (row >= rows) return;
    if (width % W == 0 && aligned(dy) && aligned(x) && aligned(weight) && aligned(dx)) {
        layer_norm_grad_row<W>(dy + first, x + first, weight, dx + first, means[row], rstds[row], width);
    } else {
        layer_norm_grad_row<1>(dy + first, x + first, weight, dx + first, means[row], rstds[row], width);
    }
}

extern "C" __global__ void __launch_bounds__(128)
    layer_norm_grad_f32(const float* dy, const float* x, const float* weight, const float* means, const float* rstds,
                        float* dx, i64 rows, i64 width) {
    layer_norm_grad(dy, x, weight, means, rstds, dx, rows, width);
}

extern "C" __global__ void __launch_bounds__(128)
    layer_norm_grad_bf16(const bf16* dy, const bf16* x, const float* weight, const float* means, const float* rstds,
                         bf16* dx, i64 rows, i64 width) {
    layer_norm_grad(dy, x, weight, means, rstds, dx, rows, width);
}

extern "C" __global__ void __launch_bounds__(128)
    layer_norm_grad_bf16_f32(const bf16* dy, const bf16* x, const float* weight, const float* means,
                             const float* rstds, float* dx, i64 rows, i64 width) {
    layer_norm_grad(dy, x, weight, means, rstds, dx, rows, width);
}
