// Describes a kernel to the device, and runs its blocks. The layouts match src/kernel.rs.
#pragma once

namespace software_cuda {
struct Kernel {
    void (*invoke)(void**);
    u32 arguments;
    u32 sizes[64];
    unsigned char kinds[64];
    u32 unused, threads_max;
    int (*run)(const Kernel*, void**, const u32*, size_t, Checker*);
};

template <class T> struct KindOf { static constexpr unsigned char value = 0; };
template <class T> struct KindOf<T*> { static constexpr unsigned char value = 1; };
template <class T> struct KindOf<T**> { static constexpr unsigned char value = 2; };
template <class T> struct KindOf<T* const*> { static constexpr unsigned char value = 2; };
SC_RAW inline int run(const Kernel* kernel, void** arguments, const u32* dims, size_t shared_bytes, Checker* x) {
    checker = x;
    block.invoke = kernel->invoke;
    block.arguments = arguments;
    block.random = x->seed;
    block.threads = dims[3] * dims[4] * dims[5];
    dynamic_bytes = shared_bytes;
    for (int i = 0; i < 3; i++) {
        block.grid[i] = dims[i];
        block.block[i] = dims[3 + i];
    }
    u64 blocks = (u64)dims[0] * dims[1] * dims[2], first = random_number() % blocks;
    bool fine = true;
    for (u64 i = 0; i < blocks && fine; i++) {
        u64 number = (first + i) % blocks;
        block.number = number;
        block.index[0] = number % dims[0];
        block.index[1] = number / dims[0] % dims[1];
        block.index[2] = number / dims[0] / dims[1];
        block_generation = x->generation + i;
        x->fenced = 0;
        fine = run_block();
    }
    checker = (Checker*)1;
    return !fine;
}

template <unsigned long... I> struct Indices {};
template <class F> struct Signature;
template <class... A> struct Signature<void(A...)> {
    template <void (*F)(A...), unsigned long... I> SC_RAW static void call_with(void** a, Indices<I...>) {
        F(*(A*)a[I]...);
    }
    template <void (*F)(A...)> SC_RAW static void call(void** a) {
        call_with<F>(a, Indices<__integer_pack(sizeof...(A))...>{});
    }
    template <void (*F)(A...)> static constexpr Kernel describe(u32 threads_max) {
        static_assert(sizeof...(A) <= 64, "a kernel has 64 arguments at most");
        Kernel k{};
        k.invoke = &call<F>;
        k.arguments = sizeof...(A);
        const u32 sizes[] = {(u32)sizeof(A)..., 0};
        const unsigned char kinds[] = {KindOf<A>::value..., 0};
        for (u32 i = 0; i < k.arguments; i++) {
            k.sizes[i] = sizes[i];
            k.kinds[i] = kinds[i];
        }
        k.threads_max = threads_max ? threads_max : 1024;
        k.run = &run;
        return k;
    }
};
} // namespace software_cuda
