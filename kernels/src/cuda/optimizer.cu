// AdamW with decoupled weight decay, in place. Sums of squares and the clipping factor are in reduce.cu.

// Number of packs of four elements per thread. A block computes the powers of the two betas once for all its elements.
#define PACKS_PER_THREAD 4

struct Update {
    float beta1, beta2, eps, scale, keep, step_size, root_correction;

    INLINE void apply(float grad, float& param, float& m, float& v) const {
        const float g = scale * grad;
        m = beta1 * m + (1.0f - beta1) * g;
        v = beta2 * v + (1.0f - beta2) * g * g;
        param = param * keep - step_size * m / (sqrtf(v) * root_correction + eps);
    }
};

// `hyper` holds the learning rate and the step. The kernel computes 1 - beta^step from `ln_beta1` and `ln_beta2`, the
// logarithms of the betas. The kernel changes nothing if the scale or the learning rate is Inf or NaN.
extern "C" __global__ void __launch_bounds__(256, 4)
    adamw_f32(const float* grad, const float* hyper, const float* scale, float* param, float* m, float* v, i64 n,
              float beta1, float beta2, double ln_beta1, double ln_beta2, float eps, float weight_decay) {
    constexpr int W = 4;
    __shared__ double corrections[2];
    const float rate = hyper[0], factor = *scale;
    if (!(fabsf(rate) < -MINUS_INFINITY) || !(fabsf(factor) < -MINUS_INFINITY)) return;
    if (threadIdx.x < 2) corrections[threadIdx.x] = -expm1((double)hyper[1] * (threadIdx.x ? ln_beta2 : ln_beta1));
    __syncthreads();
    const Update update = {beta1,
                           beta2,
                           eps,
                           factor,
                           1.0f - rate * weight_decay,
                           (float)((double)rate / corrections[0]),
                           (float)(1.0 / sqrt(corrections[1]))};
    const bool whole = aligned(grad) && aligned(param) && aligned(m) && aligned(v);
#pragma unroll
    for (int p = 0; p < PACKS_PER_THREAD; p++) {
        const i64 first = (((i64)blockIdx.x * PACKS_PER_THREAD + p) * blockDim.x + threadIdx.x) * W;
        if (whole && first + W <= n) {
            float grads[W], params[W], ms[W], vs[W];
            load<W>(grads, grad + first);
            load<W>(params, param + first);
            load<W>(ms, m + first);
            load<W>(vs, v + first);
#pragma unroll
            for (int j = 0; j < W; j++) update.apply(grads[j], params[j], ms[j], vs[j]);
            store<W>(param + first, params);
            store<W>(m + first, ms);
            store<W>(v + first, vs);
            continue;
        }
        for (i64 i = first; i < n && i < first + W; i++) update.apply(grad[i], param[i], m[i], v[i]);
    }
}
