// Ops on regions of larger tensors: copies and dropout. A region's arguments are its number of units, the sizes of dims
// 1 to 3 and, for each tensor, the strides of dims 0 to 2.

// Copies or adds a region; a unit is W adjacent elements. Sizes and strides count units.
template <int W, bool ADD, class T>
INLINE void region(const T* x, T* y, i64 count, Box from, Box to) {
    const i64 unit = global_thread();
    if (unit >= count) return;
    x += from.place(unit) * W;
    y += to.place(unit) * W;
    if constexpr (W * sizeof(T) == 16) {
        if (aligned(x) && aligned(y)) {
            uint4 bits = *reinterpret_cast<const uint4*>(x);
            if constexpr (ADD) {
                T left[W], right[W];
                copy_bits(left, bits);
                const uint4 there = *reinterpret_cast<const uint4*>(y);
                copy_bits(right, there);
#pragma unroll
                for (int j = 0; j < W; j++) right[j] += left[j];
                copy_bits(bits, right);
            }
            *reinterpret_cast<uint4*>(y) = bits;
            return;
        }
    }
#pragma unroll
    for (int j = 0; j < W; j++) {
        if constexpr (ADD) {
            y[j] += x[j];
        } else {
            y[j] = x[j];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    copy_region_words(const u32* x, u32* y, i64 count, u64 size1, u64 size2, u64 size3, u64 x_step0, u64 x_step1,
                      u64 x_step2, u64 y_step0, u64 y_step1, u64 y_step2) {
    region<1, false>(x, y, count, {size1, size2, size3, x_step0, x_step1, x_step2},
                     {size1, size2, size3, y_step0, y_step1, y_step2});
}

extern "C" __global__ void __launch_bounds__(256)
    copy_region_packs(const u32* x, u32* y, i64 count, u64 size1, u64 size2, u64 size3, u64 x_step0, u64 x_step1,
                      u64 x_step2, u64 y_step0, u64 y_step1, u64 y_step2) {
    region<4, false>(x, y, count, {size1, size2, size3, x_step0, x_step1, x_step2},
                     {size1, size2, size3, y_step0, y_step1, y_step2});
}

extern "C" __global__ void __launch_bounds__(256)
    copy_region_halves(const unsigned short* x, unsigned short* y, i64 count, u64 size1, u64 size2, u64 size3,
                       u64 x_step0, u64 x_step1, u64 x_step2, u64 y_step0, u64 y_step1, u64 y_step2) {
    region<1, false>(x, y, count, {size1, size2, size3, x_step0, x_step1, x_step2},
                     {size1, size2, size3, y_step0, y_step1, y_step2});
}

extern "C" __global__ void __launch_bounds__(256)
    copy_region_half_packs(const unsigned short* x, unsigned short* y, i64 count, u64 size1, u64 size2, u64 size3,
                           u64 x_step0, u64 x_step1, u64 x_step2, u64 y_step0, u64 y_step1, u64 y_step2) {
    region<8, false>(x, y, count, {size1, size2, size3, x_step0, x_step1, x_step2},
                     {size1, size2, size3, y_step0, y_step1, y_step2});
}

extern "C" __global__ void __launch_bounds__(256)
    add_region_words(const float* x, float* y, i64 count, u64 size1, u64 size2, u64 size3, u64 x_step0, u64 x_step1,
                     u64 x_step2, u64 y_step0, u64 y_step1, u64 y_step2) {
    region<1, true>(x, y, count, {size1, size2, size3, x_step0, x_step1, x_step2},
                    {size1, size2, size3, y_step0, y_step1, y_step2});
}

extern "C" __global__ void __launch_bounds__(256)
    add_region_packs(const float* x, float* y, i64 count, u64 size1, u64 size2, u64 size3, u64 x_step0, u64 x_step1,
                     u64 x_step2, u64 y_step0, u64 y_step1, u64 y_step2) {
    region<4, true>(x, y, count, {size1, size2, size3, x_step0, x_step1, x_step2},
                    {size1, size2, size3, y_step0, y_step1, y_step2});
}

// SplitMix64's finalizer and lowbias32, as on the CPU: see kernels/src/cpu/dropout.rs.
INLINE u64 mix64(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

INLINE u32 mix32(u32 x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

INLINE float apply_dropout(u64 key, u64 place, u32 threshold, float keep_scale, float x) {
    u32 bits = mix32((u32)place ^ (u32)key);
    bits = mix32(bits + (u32)(key >> 32) + (u32)(place >> 32));
    return bits >= threshold ? x * keep_scale : 0.0f;
}

// In the tensor of the whole step (all micro-batches), x begins at element rng[1] * stride + start.
template <class T, class U>
INLINE void dropout(const T* x, const int* rng, U* y, i64 count, Box box, u64 start, u64 stride, u64 seed, u32 threshold,
                    float keep_scale) {
    constexpr int W = 4;
    const i64 first = global_thread() * W;
    if (first >= count) return;
    const u64 key = mix64(seed + mix64((u64)(u32)rng[0] + 0x9e3779b97f4a7c15ull));
    const u64 origin = (u64)(u32)rng[1] * stride + start;
    if (first + W <= count && box.size3 % W == 0 && aligned(x) && aligned(y)) {
        float values[W];
        load<W>(values, x + first);
        const u64 place = origin + box.place(first);
#pragma unroll
        for (int j = 0; j < W; j++) values[j] = apply_dropout(key, place + j, threshold, keep_scale, values[j]);
        store<W>(y + first, values);
        return;
    }
    for (i64 i = first; i < count && i < first + W; i++) {
        narrow(&y[i], apply_dropout(key, origin + box.place(i), threshold, keep_scale, widen(x[i])));
    }
}

extern "C" __global__ void __launch_bounds__(256)
    dropout_f32(const float* x, const int* rng, float* y, i64 count, u64 size1, u64 size2, u64 size3, u64 step0,
                u64 step1, u64 step2, u64 start, u64 stride, u64 seed, u32 threshold, float keep_scale) {
    dropout(x, rng, y, count, {size1, size2, size3, step0, step1, step2}, start, stride, seed, threshold, keep_scale);
}

extern "C" __global__ void __launch_bounds__(256)
    dropout_bf16(const bf16* x, const int* rng, bf16* y, i64 count, u64 size1, u64 size2, u64 size3, u64 step0,
                 u64 step1, u64 step2, u64 start, u64 stride, u64 seed, u32 threshold, float keep_scale) {
    dropout(x, rng, y, count, {size1, size2, size3, step0, step1, step2}, start, stride, seed, threshold, keep_scale);
}

extern "C" __global__ void __launch_bounds__(256)
    dropout_bf16_f32(const bf16* x, const int* rng, float* y, i64 count, u64 size1, u64 size2, u64 size3, u64 step0,
                     u64 step1, u64 step2, u64 start, u64 stride, u64 seed, u32 threshold, float keep_scale) {
    dropout(x, rng, y, count, {size1, size2, size3, step0, step1, step2}, start, stride, seed, threshold, keep_scale);
}
