// The kernels of a GPU: which thread has which tiles, and sums over a block. Goes on from neuron.cu.

// ------------------------------------------------------------------------------------------------ GPU drivers
#define KERNEL(name) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) scalesnn_##name(int unused FIELDS(AS_PARAMETER))
#ifdef VARIANT  // what is known when the module is compiled; the branches on it vanish
#define MAKE_UNIT                                                                                                   \
    Unit u = {unused FIELDS(AS_VALUE)};                                                                             \
    u.charge = CHARGE, u.hard_reset = HARD_RESET, u.detach_reset = DETACH_RESET;                                    \
    if (!PARAMETRIC) u.decay = nullptr;                                                                             \
    if (!NORMALISED) u.mean = nullptr;
#else
#define MAKE_UNIT Unit u = {unused FIELDS(AS_VALUE)};
#endif

#ifndef SURROGATE
// Whole warps walk the elements together, so that a warp's 32 neighbours make one word of bits.
KERNEL(forward) {
    MAKE_UNIT
    const i64 stride = (i64)gridDim.x * THREADS, rounded = (u.size + 31) / 32 * 32;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < rounded; i += stride) {
        const i64 c = (i / u.inner) % u.channels;
        const bool inside = i < u.size, norm = u.mean && inside;
        REAL mean = norm ? ((const REAL*)u.mean)[c] : REAL(0), scale = norm ? ((const REAL*)u.scale)[c] : REAL(1);
        REAL bias = norm ? ((const REAL*)u.bias)[c] : REAL(0);
        forward_tile<SCALAR>(u, i, inside ? 1 : 0, &mean, &scale, &bias);
    }
}

KERNEL(normalise_backward) {
    MAKE_UNIT
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < u.size; i += (i64)gridDim.x * THREADS) {
        const i64 c = (i / u.inner) % u.channels;
        REAL mean_grad = u.mean_grad ? ((const REAL*)u.mean_grad)[c] : REAL(0);
        REAL slope_grad = u.mean_grad ? ((const REAL*)u.slope_grad)[c] : REAL(0);
        normalise_backward_tile<SCALAR>(u, i, 1, (const REAL*)u.mean + c, (const REAL*)u.scale + c, &mean_grad,
                                        &slope_grad);
    }
}

#endif

// Sums over a channel: a block takes `width` neighbouring channels (32 in channels_last, where they are neighbours in
// memory; else 1) and every gridDim.y-th group of their positions; a thread keeps to one channel. The block's tree of
// additions has a fixed order: the result is the same in every run.
#define FOR_POSITIONS                                                                                               \
    const int width = u.inner == 1 && u.channels > 1 ? 32 : 1;                                                      \
    const i64 c = (i64)blockIdx.x * width + threadIdx.x % width, positions = u.size / u.channels;                   \
    const i64 rows = THREADS / width;                                                                               \
    double total[3] = {0, 0, 0};                                                                                    \
    if (c < u.channels)                                                                                             \
        for (i64 p = blockIdx.y * rows + threadIdx.x / width; p < positions; p += gridDim.y * rows)

#define ELEMENT_OF_POSITION (p / u.inner * u.channels + c) * u.inner + p % u.inner

DEVICE void store_totals(const Unit& u, i64 c, int width, const double* total) {
    __shared__ double shared[THREADS];
    for (int k = 0; k < 3; k++) {
        shared[threadIdx.x] = total[k];
        __syncthreads();
        for (int half = THREADS / 2; half >= width; half /= 2) {
            if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
            __syncthreads();
        }
        if (threadIdx.x < width && c < u.channels)
            ((double*)u.partial)[(blockIdx.y * 3 + k) * u.channels + c] = shared[threadIdx.x];
        __syncthreads();
    }
}

#ifdef SURROGATE  // a module of its own: the surrogate and the unrolled steps concern the backward sweep alone
KERNEL(backward) {
    MAKE_UNIT
    FOR_POSITIONS {
        double sums[3][LANES];
        const i64 k = u.mean ? c : 0;
        backward_tile<SCALAR>(u, ELEMENT_OF_POSITION, 1, (const REAL*)u.mean + k, (const REAL*)u.scale + k,
                              (const REAL*)u.bias + k, sums);
        for (int q = 0; q < 3; q++) total[q] += sums[q][0];
    }
    store_totals(u, c, width, total);
}
#else
KERNEL(statistics) {
    MAKE_UNIT
    FOR_POSITIONS {
        double sums[3][LANES];
        statistics_tile<SCALAR, REAL>(u, ELEMENT_OF_POSITION, 1, sums);
        for (int k = 0; k < 3; k++) total[k] += sums[k][0];
    }
    store_totals(u, c, width, total);
}

KERNEL(pack) {
    MAKE_UNIT
    const i64 words = (u.size + 31) / 32;
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < words * 32; i += (i64)gridDim.x * THREADS)
        for (i64 plane = 0; plane < u.steps; plane++) {
            unsigned bit = i < u.size ? plane_bit(((const SCALAR*)u.x)[i], plane) : 0;
            unsigned word = __ballot_sync(~0u, bit);
            if (i % 32 == 0) ((unsigned*)u.bits)[plane * words + i / 32] = word;
        }
}

KERNEL(unpack) {
    MAKE_UNIT
    for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < u.size; i += (i64)gridDim.x * THREADS)
        unpack_tile<SCALAR, REAL>(u, i, 1);
}
#endif
