// f16 numbers. Only conversions exist, because the project computes in bf16 and f32.
#pragma once
struct alignas(2) __half {
    _Float16 value;
    __half() = default;
    __half(float x) : value((_Float16)x) {}
    operator float() const { return (float)value; }
};
typedef __half half;
struct alignas(4) __half2 {
    __half x, y;
};
typedef __half2 half2;
static inline float __half2float(__half h) { return (float)h.value; }
static inline __half __float2half(float f) { return __half(f); }
static inline __half __float2half_rn(float f) { return __half(f); }
static inline float2 __half22float2(__half2 v) { return float2{(float)v.x.value, (float)v.y.value}; }
static inline __half2 __floats2half2_rn(float x, float y) { return __half2{__half(x), __half(y)}; }
