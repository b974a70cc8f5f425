// Mathematical functions and bit operations.
#pragma once
extern "C" {
#define SC_MATH1(NAME)                                                                                                 \
    double NAME(double) noexcept;                                                                                      \
    float NAME##f(float) noexcept;
#define SC_MATH2(NAME)                                                                                                 \
    double NAME(double, double) noexcept;                                                                              \
    float NAME##f(float, float) noexcept;
SC_MATH1(exp) SC_MATH1(exp2) SC_MATH1(exp10) SC_MATH1(expm1) SC_MATH1(log) SC_MATH1(log2) SC_MATH1(log10) SC_MATH1(log1p)
SC_MATH1(sqrt) SC_MATH1(cbrt) SC_MATH1(sin) SC_MATH1(cos) SC_MATH1(tan) SC_MATH1(asin) SC_MATH1(acos) SC_MATH1(atan)
SC_MATH1(sinh) SC_MATH1(cosh) SC_MATH1(tanh) SC_MATH1(erf) SC_MATH1(erfc) SC_MATH1(floor) SC_MATH1(ceil) SC_MATH1(trunc)
SC_MATH1(round) SC_MATH1(rint) SC_MATH1(nearbyint) SC_MATH1(fabs)
SC_MATH2(pow) SC_MATH2(fmod) SC_MATH2(fmax) SC_MATH2(fmin) SC_MATH2(atan2) SC_MATH2(copysign) SC_MATH2(hypot) SC_MATH2(remainder)
#undef SC_MATH1
#undef SC_MATH2
double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
double ldexp(double, int) noexcept;
float ldexpf(float, int) noexcept;
long lrintf(float) noexcept;
int printf(const char*, ...);
}
static inline float exp(float x) { return expf(x); }
static inline float log(float x) { return logf(x); }
static inline float sqrt(float x) { return sqrtf(x); }
static inline float fabs(float x) { return fabsf(x); }
static inline float tanh(float x) { return tanhf(x); }
static inline float pow(float x, float y) { return powf(x, y); }
static inline float floor(float x) { return floorf(x); }
static inline float ceil(float x) { return ceilf(x); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __expf(float x) { return expf(x); }
static inline float __exp10f(float x) { return exp10f(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __sinf(float x) { return sinf(x); }
static inline float __cosf(float x) { return cosf(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
#define SC_ROUNDED(SUFFIX)                                                                                             \
    static inline float __fadd_##SUFFIX(float x, float y) { return x + y; }                                            \
    static inline float __fsub_##SUFFIX(float x, float y) { return x - y; }                                            \
    static inline float __fmul_##SUFFIX(float x, float y) { return x * y; }                                            \
    static inline float __fdiv_##SUFFIX(float x, float y) { return x / y; }                                            \
    static inline float __frcp_##SUFFIX(float x) { return 1.0f / x; }                                                  \
    static inline float __fsqrt_##SUFFIX(float x) { return sqrtf(x); }                                                 \
    static inline float __fmaf_##SUFFIX(float x, float y, float z) { return fmaf(x, y, z); }                           \
    static inline float __int2float_##SUFFIX(int x) { return (float)x; }                                               \
    static inline float __uint2float_##SUFFIX(unsigned x) { return (float)x; }
SC_ROUNDED(rn)
#undef SC_ROUNDED
static inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
static inline int __float2int_rn(float x) { return (int)lrintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
static inline float __int_as_float(int x) { float y; __builtin_memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(unsigned x) { float y; __builtin_memcpy(&y, &x, 4); return y; }
static inline int __float_as_int(float x) { int y; __builtin_memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; __builtin_memcpy(&y, &x, 4); return y; }
static inline long long __double_as_longlong(double x) { long long y; __builtin_memcpy(&y, &x, 8); return y; }
static inline double __longlong_as_double(long long x) { double y; __builtin_memcpy(&y, &x, 8); return y; }
static inline bool isnan(float x) { return __builtin_isnan(x); }
static inline bool isnan(double x) { return __builtin_isnan(x); }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isinf(double x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
static inline bool isfinite(double x) { return __builtin_isfinite(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
static inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((unsigned long long)x * y >> 32); }
static inline int __mulhi(int x, int y) { return (int)((long long)x * y >> 32); }
static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned long long)((unsigned __int128)x * y >> 64);
}
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
    by &= 31;
    return by ? hi << by | lo >> (32 - by) : hi;
}
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
    by &= 31;
    return by ? lo >> by | hi << (32 - by) : lo;
}
#define SC_MINMAX(T)                                                                                                   \
    static inline T min(T a, T b) { return a < b ? a : b; }                                                            \
    static inline T max(T a, T b) { return a > b ? a : b; }
SC_MINMAX(int)
SC_MINMAX(unsigned)
SC_MINMAX(long)
SC_MINMAX(unsigned long)
SC_MINMAX(long long)
SC_MINMAX(unsigned long long)
#undef SC_MINMAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
static inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
static inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
static inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
static inline int abs(int x) { return x < 0 ? -x : x; }
static inline long long llabs(long long x) { return x < 0 ? -x : x; }
