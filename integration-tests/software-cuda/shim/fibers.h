// Runs the threads of a block as fibers, in an order derived from the seed. A fiber switches to another one only at a
// barrier, in a warp function or at its end. This file also has the barriers of blocks and warps, and the exchanges
// between the lanes of a warp.
#pragma once

namespace software_cuda {
enum State : unsigned char { FRESH, READY, AT_BARRIER, AT_WARP, DONE };
struct Fiber {
    void* stack;
    unsigned x, y, z, room;
    State state;
};
// Collective functions of a warp. The last lane that arrives executes the function for all lanes.
enum Exchange : unsigned char { SYNC, SHUFFLE, BALLOT, MATRIX };
struct Warp {
    u32 arrived, alive, epoch;
    u32 mask[32];
    unsigned char source[32];
    Exchange what[32];
    u64 value[32], result[32];
};
struct Block {
    unsigned grid[3], block[3], index[3];
    u32 threads, alive, waiting, epoch, now, next, ready_count, room_count, failed;
    u64 number, random, votes, voted;
    void* home;
    void (*invoke)(void**);
    void** arguments;
    Fiber fiber[1024];
    Warp warp[32];
    u32 order[1024], ready[1024], rooms[1024];
};
SC_DATA static Block block = {{1}};

extern "C" void software_cuda_swap(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden software_cuda_swap
.globl software_cuda_swap
software_cuda_swap:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");

SC_RAW static inline u64 random_number() {
    u64 x = block.random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return block.random = x;
}
SC_RAW static inline u32 random_below(u32 n) { return (u32)((random_number() >> 32) * n >> 32); }
SC_RAW static inline void note_thread() {
    u64 lane = block.now, warp = block.warp[block.now >> 5].epoch & 0xffff;
    thread_now = 1ull << 63 | block.number % 0xfffff << 43 | lane << 32 | (u64)(block.epoch & 0xffff) << 16 | warp;
}
[[noreturn]] SC_RAW static void go_home() {
    void* lost;
    software_cuda_swap(&lost, block.home);
    __builtin_unreachable();
}
[[noreturn]] SC_RAW static void fail() {
    block.failed = 1;
    go_home();
}
SC_RAW static void fiber_main();
SC_RAW static inline void make_ready(u32 thread) {
    block.fiber[thread].state = READY;
    block.ready[block.ready_count++] = thread;
}
SC_RAW static inline void start_fiber(u32 thread) {
    u32 room = block.rooms[--block.room_count];
    void** stack = (void**)(checker->stacks + (size_t)(room + 1) * checker->stack_bytes - 64);
    *--stack = nullptr;
    *--stack = (void*)&fiber_main;
    for (int i = 0; i < 6; i++) *--stack = nullptr;
    block.fiber[thread].stack = stack;
    block.fiber[thread].room = room;
    block.fiber[thread].state = READY;
}
SC_RAW static inline u32 take_ready() {
    u32 at = random_below(block.ready_count), thread = block.ready[at];
    block.ready[at] = block.ready[--block.ready_count];
    return thread;
}
// Suspends the running fiber. Switches to another fiber, or to the block's loop if no fiber can run.
SC_RAW static __attribute__((noinline)) void yield() {
    u32 me = block.now, next;
    if (block.next < block.threads && (!block.ready_count || random_number() & 1)) {
        next = block.order[block.next++];
        start_fiber(next);
    } else if (block.ready_count) {
        next = take_ready();
        if (next == me) return note_thread();
    } else {
        software_cuda_swap(&block.fiber[me].stack, block.home);
        block.now = me;
        return note_thread();
    }
    block.now = next;
    software_cuda_swap(&block.fiber[me].stack, block.fiber[next].stack);
    block.now = me;
    note_thread();
}
SC_RAW static void release_block(u32 except) {
    block.waiting = 0;
    block.epoch++;
    // All threads read `voted` before any thread reaches the next barrier.
    block.voted = block.votes;
    block.votes = 0;
    for (u32 i = 0; i < block.threads; i++)
        if (block.fiber[i].state == AT_BARRIER && i != except) make_ready(i);
}
SC_RAW static __attribute__((noinline)) void block_barrier() {
    u32 me = block.now;
    block.fiber[me].state = AT_BARRIER;
    if (++block.waiting == block.alive) {
        release_block(me);
        block.fiber[me].state = READY;
        return note_thread();
    }
    yield();
}
SC_RAW static void exchange(Warp& warp, u32 mask) {
    u32 ballot = 0;
    for (u32 l = 0; l < 32; l++)
        if (mask >> l & 1) ballot |= (warp.value[l] & 1) << l;
    for (u32 l = 0; l < 32; l++)
        if (mask >> l & 1) {
            if (warp.what[l] == BALLOT) warp.result[l] = ballot;
            if (warp.what[l] == SHUFFLE) {
                if (!(mask >> warp.source[l] & 1))
                    checker->report(checker, "warp", "a lane reads the value of a lane that does not take part");
                warp.result[l] = warp.value[warp.source[l]];
            }
        }
    // A barrier (`SYNC`) orders memory accesses, but a shuffle does not.
    if (warp.what[__builtin_ctz(mask)] == SYNC) warp.epoch++;
}
SC_RAW static bool release_warp(u32 number, u32 mask, u32 except) {
    Warp& warp = block.warp[number];
    u32 need = mask & warp.alive;
    if (!need || (warp.arrived & need) != need) return false;
    const Exchange what = warp.what[__builtin_ctz(need)];
    for (u32 l = 0; l < 32; l++)
        if ((need >> l & 1) && (warp.mask[l] != mask || warp.what[l] != what)) {
            checker->report(checker, "warp", warp.mask[l] != mask ? "lanes of a warp synchronise with different masks" : "lanes of a warp synchronise in different functions");
            return false;
        }
    exchange(warp, need);
    warp.arrived &= ~need;
    for (u32 l = 0; l < 32; l++)
        if ((need >> l & 1) && number * 32 + l != except) make_ready(number * 32 + l);
    return true;
}
SC_RAW static __attribute__((noinline)) u64 meet(u32 mask, Exchange what, u64 value, u32 source) {
    u32 me = block.now, number = me >> 5, lane = me & 31;
    Warp& warp = block.warp[number];
    if (!(mask >> lane & 1)) {
        checker->report(checker, "warp", "a lane that is not in its mask calls a warp function");
        fail();
    }
    warp.mask[lane] = mask;
    warp.what[lane] = what;
    warp.value[lane] = value;
    warp.source[lane] = (unsigned char)source;
    warp.arrived |= 1u << lane;
    if (release_warp(number, mask, me)) {
        note_thread();
    } else {
        block.fiber[me].state = AT_WARP;
        yield();
    }
    return warp.result[lane];
}
SC_RAW static void fiber_main() {
    for (;;) {
        note_thread();
        block.invoke(block.arguments);
        u32 me = block.now, number = me >> 5;
        Warp& warp = block.warp[number];
        block.fiber[me].state = DONE;
        block.alive--;
        warp.alive &= ~(1u << (me & 31));
        if (block.alive && block.waiting == block.alive) release_block(~0u);
        for (u32 left = warp.arrived; left; left &= left - 1) {
            u32 lane = __builtin_ctz(left);
            if (warp.arrived >> lane & 1) release_warp(number, warp.mask[lane], ~0u);
        }
        // A thread that has not started may run next, on the stack of this fiber.
        if (block.next < block.threads && (!block.ready_count || random_number() & 1)) {
            u32 next = block.order[block.next++];
            block.fiber[next].room = block.fiber[me].room;
            block.fiber[next].state = READY;
            block.now = next;
            continue;
        }
        block.rooms[block.room_count++] = block.fiber[me].room;
        void* lost;
        u32 next = block.ready_count ? take_ready() : ~0u;
        block.now = next;
        software_cuda_swap(&lost, next == ~0u ? block.home : block.fiber[next].stack);
    }
}
SC_RAW static void begin_block() {
    Block& b = block;
    b.alive = b.threads;
    b.waiting = b.next = b.ready_count = b.failed = 0;
    b.epoch = 1;
    b.votes = 0;
    for (u32 i = 0, x = 0, y = 0, z = 0; i < b.threads; i++) {
        b.order[i] = i;
        b.rooms[i] = b.threads - 1 - i;
        b.fiber[i] = Fiber{nullptr, x, y, z, 0, FRESH};
        if (++x == b.block[0]) x = 0, y++;
        if (y == b.block[1]) y = 0, z++;
    }
    b.room_count = b.threads;
    for (u32 i = b.threads - 1; i > 0; i--) {
        u32 j = random_below(i + 1), t = b.order[i];
        b.order[i] = b.order[j];
        b.order[j] = t;
    }
    for (u32 w = 0; w * 32 < b.threads; w++) {
        u32 lanes = b.threads - w * 32;
        b.warp[w].arrived = 0;
        b.warp[w].epoch = 1;
        b.warp[w].alive = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    }
}
// Runs one block to its end. Returns false if the block cannot end or has failed.
SC_RAW static bool run_block() {
    begin_block();
    while (block.alive) {
        u32 next;
        if (block.ready_count) {
            next = take_ready();
        } else if (block.next < block.threads) {
            next = block.order[block.next++];
            start_fiber(next);
        } else {
            checker->report(checker, "barrier", "threads wait at a barrier that other threads never reach");
            return false;
        }
        block.now = next;
        software_cuda_swap(&block.home, block.fiber[next].stack);
        if (block.failed) return false;
    }
    return true;
}
} // namespace software_cuda
