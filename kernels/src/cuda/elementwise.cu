// Elementwise ops. A thread processes 16 bytes of the wider type. A result may overwrite an operand of the same type.
// Kernel names contain the type that is read, and the type that is written if it differs.

// y[i] = f(x[i])
template <class T, class U, class F>
INLINE void map1(const T* x, U* y, i64 n, F f) {
    constexpr int W = CommonWidth<T, U>::value;
    const i64 first = global_thread() * W;
    if (first + W <= n && aligned(x) && aligned(y)) {
        float values[W];
        load<W>(values, x + first);
#pragma unroll
        for (int j = 0; j < W; j++) values[j] = f(values[j]);
        store<W>(y + first, values);
        return;
    }
    for (i64 i = first; i < n && i < first + W; i++) narrow(&y[i], f(widen(x[i])));
}

// y[i] = f(a[i], b[i])
template <class T, class U, class F>
INLINE void map2(const T* a, const T* b, U* y, i64 n, F f) {
    constexpr int W = CommonWidth<T, U>::value;
    const i64 first = global_thread() * W;
    if (first + W <= n && aligned(a) && aligned(b) && aligned(y)) {
        float left[W], right[W];
        load<W>(left, a + first);
        load<W>(right, b + first);
#pragma unroll
        for (int j = 0; j < W; j++) left[j] = f(left[j], right[j]);
        store<W>(y + first, left);
        return;
    }
    for (i64 i = first; i < n && i < first + W; i++) narrow(&y[i], f(widen(a[i]), widen(b[i])));
}

// Phi(x), the normal distribution function. It is computed with erfc, which keeps the precision of the lower tail.
INLINE float normal_cdf(float x) { return 0.5f * erfcf(x * -0.70710678f); }
INLINE float gelu(float x) { return x * normal_cdf(x); }
INLINE float gelu_slope(float x) { return fmaf(x, 0.39894228f * expf(-0.5f * x * x), normal_cdf(x)); }

// y[row, j] = f(s), where s is a[row, j] + b[j] rounded to type U. Stores s in `sums` if `sums` is not null.
template <class T, class U, class F>
INLINE void map_suffix(const T* a, const T* b, U* sums, U* y, i64 n, i64 width, F f) {
    constexpr int W = CommonWidth<T, U>::value;
    const i64 first = global_thread() * W;
    if (first >= n) return;
    i64 column = first % width;
    if (width % W == 0 && aligned(a) && aligned(b) && aligned(y) && aligned(sums)) {
        float left[W], right[W];
        load<W>(left, a + first);
        load<W>(right, b + column);
#pragma unroll
        for (int j = 0; j < W; j++) left[j] += right[j];
        if (sums) store<W>(sums + first, left);
#pragma unroll
        for (int j = 0; j < W; j++) left[j] = f(stored<U>(left[j]));
        store<W>(y + first, left);
        return;
    }
    for (i64 i = first; i < n && i < first + W; i++) {
        const float sum = stored<U>(widen(a[i]) + widen(b[column]));
        if (sums) narrow(&sums[i], sum);
        narrow(&y[i], f(sum));
        column = column + 1 == width ? 0 : column + 1;
    }
}

extern "C" __global__ void __launch_bounds__(256) add_f32(const float* a, const float* b, float* y, i64 n) {
    map2(a, b, y, n, [](float a, float b) { return a + b; });
}

extern "C" __global__ void __launch_bounds__(256) add_bf16(const bf16* a, const bf16* b, bf16* y, i64 n) {
    map2(a, b, y, n, [](float a, float b) { return a + b; });
}

extern "C" __global__ void __launch_bounds__(256) add_bf16_f32(const bf16* a, const bf16* b, float* y, i64 n) {
    map2(a, b, y, n, [](float a, float b) { return a + b; });
}

extern "C" __global__ void __launch_bounds__(256)
    add_suffix_f32(const float* a, const float* b, float* y, i64 n, i64 width) {
    map_suffix(a, b, (float*)nullptr, y, n, width, [](float x) { return x; });
}

extern "C" __global__ void __launch_bounds__(256)
    add_suffix_bf16(const bf16* a, const bf16* b, bf16* y, i64 n, i64 width) {
    map_suffix(a, b, (bf16*)nullptr, y, n, width, [](float x) { return x; });
}

extern "C" __global__ void __launch_bounds__(256)
    add_suffix_bf16_f32(const bf16* a, const bf16* b, float* y, i64 n, i64 width) {
    map_suffix(a, b, (float*)nullptr, y, n, width, [](float x) { return x; });
}

// Bias and GELU in one kernel; the backward pass needs `sums`.
extern "C" __global__ void __launch_bounds__(256)
    bias_gelu_f32(const float* x, const float* bias, float* sums, float* y, i64 n, i64 width) {
    map_suffix(x, bias, sums, y, n, width, [](float x) { return gelu(x); });
}

extern "C" __global__ void __launch_bounds__(256)
    bias_gelu_bf16(const bf16* x, const bf16* bias, bf16* sums, bf16* y, i64 n, i64 width) {
    map_suffix(x, bias, sums, y, n, width, [](float x) { return gelu(x); });
}

extern "C" __global__ void __launch_bounds__(256) add_to_f32(const float* x, float* y, i64 n) {
    map2(y, x, y, n, [](float y, float x) { return y + x; });
}

extern "C" __global__ void __launch_bounds__(256) scale_f32(const float* x, float* y, i64 n, float factor) {
    map1(x, y, n, [factor](float x) { return factor * x; });
}

extern "C" __global__ void __launch_bounds__(256) scale_bf16(const bf16* x, bf16* y, i64 n, float factor) {
    map1(x, y, n, [factor](float x) { return factor * x; });
}

extern "C" __global__ void __launch_bounds__(256) scale_bf16_f32(const bf16* x, float* y, i64 n, float factor) {
    map1(x, y, n, [factor](float x) { return factor * x; });
}

extern "C" __global__ void __launch_bounds__(256) gelu_f32(const float* x, float* y, i64 n) {
    map1(x, y, n, [](float x) { return gelu(x); });
}

extern "C" __global__ void __launch_bounds__(256) gelu_bf16(const bf16* x, bf16* y, i64 n) {
    map1(x, y, n, [](float x) { return gelu(x); });
}

extern "C" __global__ void __launch_bounds__(256) gelu_bf16_f32(const bf16* x, float* y, i64 n) {
    map1(x, y, n, [](float x) { return gelu(x); });
}

extern "C" __global__ void __launch_bounds__(256) gelu_grad_f32(const float* dy, const float* x, float* dx, i64 n) {
    map2(dy, x, dx, n, [](float dy, float x) { return dy * gelu_slope(x); });
}

extern "C" __global__ void __launch_bounds__(256) gelu_grad_bf16(const bf16* dy, const bf16* x, bf16* dx, i64 n) {
    map2(dy, x, dx, n, [](float dy, float x) { return dy * gelu_slope(x); });
}

extern "C" __global__ void __launch_bounds__(256) gelu_grad_bf16_f32(const bf16* dy, const bf16* x, float* dx, i64 n) {
    map2(dy, x, dx, n, [](float dy, float x) { return dy * gelu_slope(x); });
}

extern "C" __global__ void __launch_bounds__(256) cast_f32_bf16(const float* x, bf16* y, i64 n) {
    map1(x, y, n, [](float x) { return x; });
}

extern "C" __global__ void __launch_bounds__(256) cast_bf16_f32(const bf16* x, float* y, i64 n) {
    map1(x, y, n, [](float x) { return x; });
}

extern "C" __global__ void __launch_bounds__(256) fill_bf16(bf16* y, i64 n, float value) {
    constexpr int W = Width<bf16>::value;
    const i64 first = global_thread() * W;
    if (first + W <= n && aligned(y)) {
        float values[W];
#pragma unroll
        for (int j = 0; j < W; j++) values[j] = value;
        store<W>(y + first, values);
        return;
    }
    for (i64 i = first; i < n && i < first + W; i++) narrow(&y[i], value);
}
