// Reductions over the members of a group that share a GPU.

// y = ((x0 + x1) + ..) + x[members - 1], or the maximum if `largest` is set. The last input may be y itself.
extern "C" __global__ void combine_members_f32(
    float* y, const float* x0, const float* x1, const float* x2, const float* x3, const float* x4, const float* x5,
    const float* x6, const float* x7, const float* x8, const float* x9, const float* x10, const float* x11,
    const float* x12, const float* x13, const float* x14, const float* x15, int members, int largest, i64 n) {
    const float* all[16] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        float sum = x0[i];
        for (int m = 1; m < members; m++) {
            const float next = all[m][i];
            // Of a number and a NaN, fmaxf returns the number, like Rust's `max`.
            sum = largest ? fmaxf(sum, next) : sum + next;
        }
        y[i] = sum;
    }
}
