// Types and attributes of CUDA C++. No system header is included, because NVRTC has none either.
#pragma once
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __constant__
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __attribute__((aligned(n)))
#define SOFTWARE_CUDA 1
// Functions of the shim are not instrumented. They check a kernel's accesses explicitly.
#define SC_RAW __attribute__((no_sanitize("thread")))
#define SC_USED __attribute__((used, visibility("hidden")))

typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

#define SC_VECTORS(T, N, S)                                                                                            \
    struct alignas(S) T##1 { N x; };                                                                                   \
    struct alignas(2 * S) T##2 { N x, y; };                                                                            \
    struct alignas(S) T##3 { N x, y, z; };                                                                             \
    struct alignas(4 * S > 16 ? 16 : 4 * S) T##4 { N x, y, z, w; };                                                    \
    static inline T##1 make_##T##1(N x) { return {x}; }                                                                \
    static inline T##2 make_##T##2(N x, N y) { return {x, y}; }                                                        \
    static inline T##3 make_##T##3(N x, N y, N z) { return {x, y, z}; }                                                \
    static inline T##4 make_##T##4(N x, N y, N z, N w) { return {x, y, z, w}; }
SC_VECTORS(char, signed char, 1)
SC_VECTORS(uchar, unsigned char, 1)
SC_VECTORS(short, short, 2)
SC_VECTORS(ushort, unsigned short, 2)
SC_VECTORS(int, int, 4)
SC_VECTORS(uint, unsigned int, 4)
SC_VECTORS(long, long, 8)
SC_VECTORS(ulong, unsigned long, 8)
SC_VECTORS(longlong, long long, 8)
SC_VECTORS(ulonglong, unsigned long long, 8)
SC_VECTORS(float, float, 4)
SC_VECTORS(double, double, 8)
#undef SC_VECTORS

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
