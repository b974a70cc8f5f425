// Reductions over the members of a group that share a GPU.

// Combines the members' values in the order of `collective/order.rs`. `program` has 4 bits per member: how many times the
// two newest values on the stack become one, after the member's value was pushed. If `largest` is set, the larger of two
// values replaces them, else their sum. Any input may be y itself.
extern "C" __global__ void combine_members_f32(
    float* y, const float* x0, const float* x1, const float* x2, const float* x3, const float* x4, const float* x5,
    const float* x6, const float* x7, const float* x8, const float* x9, const float* x10, const float* x11,
    const float* x12, const float* x13, const float* x14, const float* x15, u64 program, int members, int largest,
    i64 n) {
    const float* all[16] = {x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15};
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        float stack[5];
        int top = -1;
        for (int m = 0; m < members; m++) {
            stack[++top] = all[m][i];
            for (int left = (int)(program >> (4 * m)) & 15; left > 0; left--) {
                const float newest = stack[top--];
                // Of a number and a NaN, fmaxf returns the number, like Rust's `max`.
                stack[top] = largest ? fmaxf(stack[top], newest) : stack[top] + newest;
            }
        }
        y[i] = stack[0];
    }
}
