// Checks each memory access. Kernels are compiled for the thread sanitizer, so they call __tsan_* before each access.
// Global memory is checked as in src/shadow.rs, with the same layouts and the same function `conflict`. Shared memory
// is checked here.
#pragma once

namespace software_cuda {
typedef unsigned int u32;
typedef unsigned long u64;
enum { READ = 0, WRITE = 1, ATOMIC = 2 };

struct Cell {
    u32 writer, reader, bits, region;
    u64 writer_thread, reader_thread;
};
struct Entry {
    u32 agent, number;
};
struct Checker {
    size_t base, bytes;
    Cell* shadow;
    const Entry* entries;
    const u32* clock;
    u32 operation, readers_from, readers_to, fenced;
    u32 regions[16];
    u32 (*slow)(Checker*, size_t address, size_t bytes, u32 access, u64 thread);
    void (*report)(Checker*, const char* kind, const char* what);
    void* user;
    size_t stacks, stack_bytes, scratch, shared_cells;
    u64 seed, generation;
};
// A cell of shared memory. It is valid only for the block whose number is `generation`.
struct SharedCell {
    u64 generation, writer_thread, reader_thread;
    u32 bits, unused;
};

static constexpr u32 INIT = 4, WRITTEN = 8, READ_BY = 12, ATOMICALLY = 1u << 16, SET = 1u << 31;
static constexpr u64 LANE = 0x7ffull << 32;

// All data of the shim is in .data, so that .bss holds only the kernel's shared memory.
#define SC_DATA __attribute__((section(".data.software_cuda")))
SC_DATA static Checker* checker = (Checker*)1;
// Bit fields of the running thread, highest first: 1, block, thread, number of block barriers, number of warp barriers.
SC_DATA static u64 thread_now = 1;
SC_DATA static u64 block_generation = 1;
SC_DATA static size_t dynamic_bytes = 1;

extern "C" char __bss_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));
extern "C" {
__attribute__((visibility("hidden"), used, aligned(1024))) unsigned char software_cuda_dynamic_shared[227 << 10];
}

[[noreturn]] SC_RAW static void fail();

SC_RAW static inline __attribute__((always_inline)) bool conflict(u64 before, u64 now, bool fenced) {
    if (before == 0) return false;
    if ((before >> 43) != (now >> 43)) return !fenced;
    u64 a = before >> 32 & 0x7ff, b = now >> 32 & 0x7ff;
    if (a == b || (before >> 16 & 0xffff) != (now >> 16 & 0xffff)) return false;
    u64 warp = a < 1024 ? a >> 5 : a - 1024;
    return a == 2047 || warp != b >> 5 || (before & 0xffff) == (now & 0xffff);
}
SC_RAW static inline __attribute__((always_inline)) u64 merged(u64 before, u64 now) {
    if (before == 0 || before == now) return now;
    if ((before >> 43) != (now >> 43)) return now | 0xfffffull << 43 | LANE;
    u64 a = before >> 32 & 0x7ff, b = now >> 32 & 0x7ff;
    if (a == b || (before >> 16 & 0xffff) != (now >> 16 & 0xffff)) return now;
    u64 warp = a < 1024 ? a >> 5 : a - 1024;
    if (a == 2047 || warp != b >> 5) return now | LANE;
    return (before & 0xffff) == (now & 0xffff) ? (now & ~LANE) | (1024 + warp) << 32 : now;
}

SC_RAW static inline __attribute__((always_inline)) bool is_before(u32 operation) {
    Entry entry = checker->entries[operation];
    return checker->clock[entry.agent] >= entry.number;
}

// Checks accessed bytes of one word. Returns false if `slow` must check them.
template <u32 ACCESS> SC_RAW static inline __attribute__((always_inline)) bool quick(Cell& cell, u32 mask) {
    Checker* x = checker;
    const u32 me = x->operation, bits = cell.bits;
    const u32 need = ACCESS == WRITE ? mask : mask | mask << INIT;
    if ((bits & need) != need || x->regions[cell.region & 15] != cell.region) return false;
    const u32 same = bits >> WRITTEN & mask;
    if (cell.writer != me) {
        if (!is_before(cell.writer)) return false;
    } else if (same && conflict(cell.writer_thread, thread_now, x->fenced)) {
        if (!(ACCESS == ATOMIC && bits & ATOMICALLY)) return false;
    }
    const u32 reader = cell.reader;
    if (ACCESS == READ) {
        if (reader == me || (reader && reader == x->readers_to)) {
            if (bits >> READ_BY & mask) {
                cell.reader_thread = merged(cell.reader_thread, thread_now);
                cell.bits = bits | mask << READ_BY;
                return true;
            }
        } else if (reader == 0 || (!(reader & SET) && is_before(reader))) {
            cell.reader = me;
        } else if (reader == x->readers_from) {
            cell.reader = x->readers_to;
        } else {
            return false;
        }
        cell.reader_thread = thread_now;
        cell.bits = (bits & ~(0xfu << READ_BY)) | mask << READ_BY;
        return true;
    }
    if (reader == me) {
        if ((bits >> READ_BY & mask) && conflict(cell.reader_thread, thread_now, x->fenced)) return false;
    } else if (reader) {
        if (reader & SET || !is_before(reader)) return false;
        cell.reader = 0;
    }
    const u32 others = cell.writer == me && same ? bits & 0xfu << WRITTEN : 0;
    cell.bits = (bits & ~(0xfu << WRITTEN | ATOMICALLY)) | others | mask << WRITTEN | mask << INIT |
                (ACCESS == ATOMIC ? ATOMICALLY : 0);
    cell.writer = me;
    cell.writer_thread = thread_now;
    return true;
}

template <u32 ACCESS> SC_RAW static __attribute__((noinline)) void shared_access(size_t offset, size_t bytes) {
    for (size_t at = offset, end = offset + bytes; at < end;) {
        size_t stop = (at / 4 + 1) * 4 < end ? (at / 4 + 1) * 4 : end;
        u32 mask = ((1u << (stop - at)) - 1) << at % 4;
        if (at >= 2u << 20) return;
        SharedCell& cell = ((SharedCell*)checker->shared_cells)[at / 4];
        at = stop;
        if (cell.generation != block_generation) cell = SharedCell{block_generation, 0, 0, 0, 0};
        u32 bits = cell.bits;
        if (ACCESS != WRITE && (bits >> INIT & mask) != mask) {
            checker->report(checker, "uninitialised", "a thread reads shared memory that no thread of its block wrote");
            bits |= mask << INIT;
        }
        bool both_atomic = ACCESS == ATOMIC && bits & ATOMICALLY;
        if ((bits >> WRITTEN & mask) && !both_atomic && conflict(cell.writer_thread, thread_now, false))
            checker->report(checker, "shared-race",
                            ACCESS == READ
                                ? "a thread reads shared memory that another thread writes, with no barrier in between"
                                : "two threads write the same shared memory, with no barrier in between");
        if (ACCESS == READ) {
            bool overlaps = bits >> READ_BY & mask;
            cell.reader_thread = overlaps ? merged(cell.reader_thread, thread_now) : thread_now;
            cell.bits = overlaps ? bits | mask << READ_BY : (bits & ~(0xfu << READ_BY)) | mask << READ_BY;
            continue;
        }
        if ((bits >> READ_BY & mask) && !both_atomic && conflict(cell.reader_thread, thread_now, false))
            checker->report(checker, "shared-race",
                            "a thread writes shared memory that another thread reads, with no barrier in between");
        bool overlaps = bits >> WRITTEN & mask;
        bits = overlaps ? bits : bits & ~(0xfu << WRITTEN);
        cell.bits = (bits & ~ATOMICALLY) | mask << WRITTEN | mask << INIT | (ACCESS == ATOMIC ? ATOMICALLY : 0);
        cell.writer_thread = thread_now;
    }
}

SC_RAW static __attribute__((noinline)) void shared_bounds(size_t offset, size_t bytes) {
    if (offset + bytes <= dynamic_bytes) return;
    checker->report(checker, "bounds", "a thread accesses more dynamic shared memory than the launch requested");
    fail();
}

// Checks that the address of an access is a multiple of the access's size. On a GPU, any other address is an error.
SC_RAW static inline __attribute__((always_inline)) void check_alignment(const void* address, size_t bytes) {
    if (__builtin_expect((size_t)address % bytes == 0 || (size_t)checker < 4096, 1)) return;
    checker->report(checker, "alignment", "a thread accesses memory at an address that is not a multiple of the access's size");
    fail();
}

// Checks one access by a kernel to any address.
template <u32 ACCESS> SC_RAW static inline __attribute__((always_inline)) void touch(const void* address, size_t bytes) {
    if ((size_t)checker < 4096) return;
    size_t offset = (size_t)address - checker->base;
    if (__builtin_expect(offset < checker->bytes, 1)) {
        bool fine = true;
        for (size_t at = offset, end = offset + bytes; at < end;) {
            size_t stop = (at | 3) + 1 < end ? (at | 3) + 1 : end;
            u32 mask = ((1u << (stop - at)) - 1) << (at & 3);
            fine = fine && quick<ACCESS>(checker->shadow[at >> 2], mask);
            at = stop;
        }
        if (__builtin_expect(!fine, 0) && checker->slow(checker, (size_t)address, bytes, ACCESS, thread_now)) fail();
        return;
    }
    if ((size_t)address - checker->stacks < checker->stack_bytes * 1024) return;
    size_t dynamic = (size_t)address - (size_t)software_cuda_dynamic_shared;
    if (dynamic < sizeof software_cuda_dynamic_shared) shared_bounds(dynamic, bytes);
    size_t shared = (size_t)address - (size_t)__bss_start;
    if (shared < (size_t)(_end - __bss_start)) return shared_access<ACCESS>(shared, bytes);
    // Of all other addresses, such as those of constants, only the first 64 KiB are checked: they are never mapped.
    if ((size_t)address < 1 << 16) {
        checker->slow(checker, (size_t)address, bytes, ACCESS, thread_now);
        fail();
    }
}
} // namespace software_cuda

extern "C" {
#define SC_HOOK(BYTES)                                                                                                 \
    SC_RAW SC_USED inline void __tsan_read##BYTES(void* p) { software_cuda::check_alignment(p, BYTES); software_cuda::touch<0>(p, BYTES); } \
    SC_RAW SC_USED inline void __tsan_write##BYTES(void* p) { software_cuda::check_alignment(p, BYTES); software_cuda::touch<1>(p, BYTES); } \
    SC_RAW SC_USED inline void __tsan_unaligned_read##BYTES(void* p) { software_cuda::touch<0>(p, BYTES); }            \
    SC_RAW SC_USED inline void __tsan_unaligned_write##BYTES(void* p) { software_cuda::touch<1>(p, BYTES); }           \
    SC_RAW SC_USED inline void __tsan_volatile_read##BYTES(void* p) { software_cuda::touch<0>(p, BYTES); }             \
    SC_RAW SC_USED inline void __tsan_volatile_write##BYTES(void* p) { software_cuda::touch<1>(p, BYTES); }
SC_HOOK(1)
SC_HOOK(2)
SC_HOOK(4)
SC_HOOK(8)
SC_HOOK(16)
#undef SC_HOOK
SC_RAW SC_USED inline void __tsan_read_range(void* p, size_t bytes) { software_cuda::touch<0>(p, bytes); }
SC_RAW SC_USED inline void __tsan_write_range(void* p, size_t bytes) { software_cuda::touch<1>(p, bytes); }
SC_RAW SC_USED inline void __tsan_init() {}
SC_RAW SC_USED inline void __tsan_func_entry(void*) {}
SC_RAW SC_USED inline void __tsan_func_exit() {}
SC_RAW SC_USED inline void __tsan_vptr_update(void**, void*) {}
SC_RAW SC_USED inline void __tsan_vptr_read(void**) {}
}
