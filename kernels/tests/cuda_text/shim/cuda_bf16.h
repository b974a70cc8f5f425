// As much of CUDA C++ as the kernels use, on the host: a block's threads are fibers, run in random order from barrier to
// barrier, one block at a time. Stands in for the software CUDA device's shim, which checks accesses too.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct float2 { float x, y; } __attribute__((aligned(8)));
struct uint2 { unsigned x, y; } __attribute__((aligned(8)));
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct dim3 { unsigned x, y, z; };

struct __nv_bfloat16 { unsigned short bits; };
static inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t wide = (uint32_t)value.bits << 16;
    float result;
    memcpy(&result, &wide, 4);
    return result;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return {0x7fff};
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace shim {

enum State { NEW, READY, AT_BLOCK, AT_WARP, DONE };
constexpr size_t STACK = 256 << 10;

struct Fiber {
    State state;
    dim3 index;
    jmp_buf here;
    ucontext_t start;
    std::vector<char> stack;
};

struct Machine {
    dim3 grid, block, block_index;
    std::vector<Fiber> fibers;
    size_t threads, current;
    jmp_buf scheduler;
    ucontext_t home;
    void (*body)(const uint64_t*);
    const uint64_t* args;
    std::vector<unsigned char> dynamic;
    size_t dynamic_bytes;
    uint64_t votes[32][32];
    uint64_t random = 88172645463325252ull;
};
inline Machine machine;

inline uint64_t next() {
    uint64_t& x = machine.random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

inline Fiber& self() { return machine.fibers[machine.current]; }

inline void wait(State state) {
    self().state = state;
    if (_setjmp(self().here) == 0) _longjmp(machine.scheduler, 1);
}

inline void enter() {
    machine.body(machine.args);
    self().state = DONE;
    _longjmp(machine.scheduler, 1);
}

inline void resume(size_t thread) {
    machine.current = thread;
    if (_setjmp(machine.scheduler) != 0) return;
    Fiber& fiber = self();
    if (fiber.state != NEW) {
        fiber.state = READY;
        _longjmp(fiber.here, 1);
    }
    fiber.stack.resize(STACK);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    fiber.state = READY;
    setcontext(&fiber.start);
}

// Lets those go on of whom all others of the group wait too, or have ended.
inline bool release(size_t begin, size_t end, State state) {
    bool some = false;
    for (size_t i = begin; i < end; i++) {
        const State other = machine.fibers[i].state;
        if (other != state && other != DONE) return false;
        some |= other == state;
    }
    for (size_t i = begin; some && i < end; i++) {
        if (machine.fibers[i].state == state) machine.fibers[i].state = READY;
    }
    return some;
}

inline void run_block() {
    const size_t threads = machine.threads;
    for (size_t i = 0; i < threads; i++) {
        const unsigned x = machine.block.x, y = machine.block.y;
        machine.fibers[i].state = NEW;
        machine.fibers[i].index = {(unsigned)i % x, (unsigned)i / x % y, (unsigned)i / (x * y)};
    }
    std::fill(machine.dynamic.begin(), machine.dynamic.end(), 0xff);
    std::vector<size_t> order(threads);
    for (size_t i = 0; i < threads; i++) order[i] = i;
    // One warp is held back until nothing else can go on: what waits for it by luck alone then does not.
    const size_t warps = (threads + 31) / 32;
    size_t held = next() % (warps + 1);
    for (;;) {
        for (size_t i = threads; i > 1; i--) std::swap(order[i - 1], order[next() % i]);
        bool ran = false, holding = false;
        for (const size_t i : order) {
            const State state = machine.fibers[i].state;
            if (state != NEW && state != READY) continue;
            if (i / 32 == held) {
                holding = true;
                continue;
            }
            resume(i);
            ran = true;
        }
        bool released = false;
        for (size_t warp = 0; warp < threads; warp += 32) {
            released |= release(warp, warp + 32 < threads ? warp + 32 : threads, AT_WARP);
        }
        released |= release(0, threads, AT_BLOCK);
        if (ran || released) continue;
        if (holding) {
            held = (held + 1 + next() % warps) % (warps + 1);
            continue;
        }
        for (size_t i = 0; i < threads; i++) {
            if (machine.fibers[i].state == DONE) continue;
            fprintf(stderr, "deadlock: thread %zu waits at a barrier that others never reach\n", i);
            exit(3);
        }
        break;
    }
    for (size_t i = machine.dynamic_bytes; i < machine.dynamic.size(); i++) {
        if (machine.dynamic[i] == 0xff) continue;
        fprintf(stderr, "a write to byte %zu of %zu bytes of shared memory\n", i, machine.dynamic_bytes);
        exit(3);
    }
}

inline unsigned lane() { return machine.current % 32; }

template <class T>
T exchange(T value, unsigned from) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    auto& votes = machine.votes[machine.current / 32];
    votes[lane()] = bits;
    wait(AT_WARP);
    bits = votes[from];
    wait(AT_WARP);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

inline unsigned char* dynamic() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(machine.dynamic.data()) + 127) / 128 * 128);
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), const uint64_t* args, std::index_sequence<I...>) {
    std::tuple<A...> values;
    (memcpy(&std::get<I>(values), &args[I], sizeof(A)), ...);
    kernel(std::get<I>(values)...);
}

template <class... A>
void call(void (*kernel)(A...), const uint64_t* args) {
    call(kernel, args, std::index_sequence_for<A...>{});
}

template <class... A>
constexpr size_t arity(void (*)(A...)) {
    return sizeof...(A);
}

struct Entry {
    const char* name;
    void (*body)(const uint64_t*);
    size_t args;
};

inline void read_exactly(void* to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) exit(feof(stdin) ? 0 : 4);
}

// Each request is a kernel's index, its geometry and arguments, and all memory; the answer is the memory behind it.
inline int serve(const Entry* entries, size_t count) {
    for (;;) {
        uint64_t head[10];
        read_exactly(head, sizeof(head));
        if (head[0] >= count || entries[head[0]].args != head[8]) {
            fprintf(stderr, "kernel %llu does not take %llu arguments\n", (unsigned long long)head[0],
                    (unsigned long long)head[8]);
            return 3;
        }
        std::vector<uint64_t> args(2 * head[8] + 1);
        read_exactly(args.data(), 16 * head[8]);
        std::vector<unsigned char> memory(head[9] + 128);
        unsigned char* base =
            reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
        read_exactly(base, head[9]);
        std::vector<uint64_t> values;
        for (size_t i = 0; i < head[8]; i++) {
            values.push_back(args[2 * i] ? reinterpret_cast<uintptr_t>(base) + args[2 * i + 1] : args[2 * i + 1]);
        }
        machine.grid = {(unsigned)head[1], (unsigned)head[2], (unsigned)head[3]};
        machine.block = {(unsigned)head[4], (unsigned)head[5], (unsigned)head[6]};
        machine.threads = head[4] * head[5] * head[6];
        if (machine.fibers.size() < machine.threads) machine.fibers.resize(machine.threads);
        machine.dynamic.assign(head[7] + 256, 0xff);
        machine.dynamic_bytes = dynamic() - machine.dynamic.data() + head[7];
        machine.body = entries[head[0]].body;
        machine.args = values.data();
        const uint64_t blocks = head[1] * head[2] * head[3], first = blocks ? next() % blocks : 0;
        for (uint64_t i = 0; i < blocks; i++) {
            const unsigned b = (i + first) % blocks;
            machine.block_index = {b % machine.grid.x, b / machine.grid.x % machine.grid.y,
                                   b / machine.grid.x / machine.grid.y};
            run_block();
        }
        fwrite(base, 1, head[9], stdout);
        fflush(stdout);
    }
}

}  // namespace shim

#define threadIdx (shim::self().index)
#define blockIdx (shim::machine.block_index)
#define blockDim (shim::machine.block)
#define gridDim (shim::machine.grid)
#define __syncthreads() shim::wait(shim::AT_BLOCK)
#define __syncwarp() shim::wait(shim::AT_WARP)
#define __popc(bits) __builtin_popcount(bits)
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(shim::dynamic())

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, shim::lane() ^ mask);
}

static inline unsigned __ballot_sync(unsigned, bool vote) {
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; i++) votes |= (unsigned)shim::exchange<int>(vote, i) << i;
    return votes;
}

template <class T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}

static inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
