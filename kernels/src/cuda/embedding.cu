// Embedding tables and their gradients.

// Row i of y is row ids[i] - vocab_start of the table, or zeros if the table does not hold that row.
template <class U>
INLINE void embedding(const int* ids, const float* table, U* y, i64 count, i64 held, i64 width, i64 vocab_start,
                      i64 vocab, u32* record, u32 launch) {
    constexpr int W = Width<float>::value;
    if (blockIdx.x == 0) check_indices(ids, count, vocab, record, launch);
    const i64 packs = (width + W - 1) / W;
    const i64 place = global_thread();
    if (place >= count * packs) return;
    const i64 i = place / packs, column = place % packs * W;
    const i64 row = (i64)ids[i] - vocab_start;
    const bool here = row >= 0 && row < held;
    const float* from = table + row * width + column;
    U* to = y + i * width + column;
    if (width % W == 0 && aligned(table) && aligned(y)) {
        float values[W] = {};
        if (here) load<W>(values, from);
        store<W>(to, values);
        return;
    }
    for (int j = 0; j < W && column + j < width; j++) narrow(&to[j], here ? from[j] : 0.0f);
}

extern "C" __global__ void __launch_bounds__(256)
    embedding_f32(const int* ids, const float* table, float* y, i64 count, i64 held, i64 width, i64 vocab_start,
                  i64 vocab, u32* record, u32 launch) {
    embedding(ids, table, y, count, held, width, vocab_start, vocab, record, launch);
}

extern "C" __global__ void __launch_bounds__(256)
    embedding_f32_bf16(const int* ids, const float* table, bf16* y, i64 count, i64 held, i64 width, i64 vocab_start,
                       i64 vocab, u32* record, u32 launch) {
    embedding(ids, table, y, count, held, width, vocab_start, vocab, record, launch);
}

// Adds each row of dy to the table's row of the same id, in order. Each position of ids has one block. A block
// processes its id only if no earlier position has the same id. So a row has one writer and a fixed order of additions.
template <class T>
INLINE void embedding_grad(const int* ids, const T* dy, float* dtable, i64 count, i64 held, i64 width,
                           i64 vocab_start) {
    // Number of positions that a thread scans at once for its block's id.
    constexpr int PLACES = 8;
    __shared__ int counts[8];
    __shared__ int matches[256];
    const i64 own = blockIdx.x;
    const int id = ids[own];
    const i64 row = (i64)id - vocab_start;
    // The forward kernel has reported ids outside the vocabulary.
    if (row < 0 || row >= held) return;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* sums = dtable + row * width;
    for (i64 begin = 0; begin < count; begin += 256) {
        if (begin % (256 * PLACES) == 0) {
            bool any = false;
#pragma unroll
            for (int p = 0; p < PLACES; p++) {
                const i64 place = begin + 256 * p + threadIdx.x;
                any |= place < count && ids[place] == id;
            }
            // If the scan finds no match, which is the usual case, skip the scanned positions.
            if (!__syncthreads_or(any)) {
                begin += 256 * (PLACES - 1);
                continue;
            }
        }
        const i64 place = begin + threadIdx.x;
        const bool same = place < count && ids[place] == id;
        const u32 votes = __ballot_sync(ALL_LANES, same);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        int total = 0, before = 0;
        for (int i = 0; i < 8; i++) {
            before += i < warp ? counts[i] : 0;
            total += counts[i];
        }
        if (total > 0) {
            if (same) matches[before + __popc(votes & ((1u << lane) - 1))] = threadIdx.x;
            __syncthreads();
            // All threads of the block take the same branch.
            if (begin + matches[0] < own) return;
            for (i64 column = threadIdx.x; column < width; column += 256) {
                float sum = sums[column];
                for (int i = 0; i < total; i++) sum += widen(dy[(begin + matches[i]) * width + column]);
                sums[column] = sum;
            }
        }
        // After this barrier, threads may overwrite counts and matches.
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(256)
    embedding_grad_f32(const int* ids, const float* dy, float* dtable, i64 count, i64 held, i64 width,
                       i64 vocab_start) {
    embedding_grad(ids, dy, dtable, count, held, width, vocab_start);
}

extern "C" __global__ void __launch_bounds__(256)
    embedding_grad_bf16(const int* ids, const bf16* dy, float* dtable, i64 count, i64 held, i64 width,
                        i64 vocab_start) {
    embedding_grad(ids, dy, dtable, count, held, width, vocab_start);
}
