// The kernels of a CPU: tiles over threads, and sums over slabs of them. Goes on from neuron.cu.

// ------------------------------------------------------------------------------------------------ CPU drivers
// A channel's coefficient for every lane of the tile that starts at element i.
template <class real>
DEVICE void spread(const Unit& u, const void* of_channel, i64 i, int n, real* lanes) {
    const real* coefficient = (const real*)of_channel;
    for (int l = 0; coefficient && l < n;) {
        const i64 c = ((i + l) / u.inner) % u.channels, left = u.inner == 1 ? u.channels - c : u.inner - (i + l) % u.inner;
        const int end = left < n - l ? l + (int)left : n;
        if (u.inner == 1) for (int j = l; j < end; j++) lanes[j] = coefficient[c + j - l];
        else for (int j = l; j < end; j++) lanes[j] = coefficient[c];
        l = end;
    }
}

// Adds the lanes' sums to those of their channels.
DEVICE void gather(const Unit& u, i64 i, int n, const double (*sums)[LANES], double* partial) {
    for (int k = 0; k < 3; k++)
        for (int l = 0; l < n;) {
            const i64 c = ((i + l) / u.inner) % u.channels;
            const i64 left = u.inner == 1 ? u.channels - c : u.inner - (i + l) % u.inner;
            const int end = left < n - l ? l + (int)left : n;
            double* channel = partial + k * u.channels + c;
            if (u.inner == 1 && u.channels > 1) for (int j = l; j < end; j++) channel[j - l] += sums[k][j];
            else for (int j = l; j < end; j++) *channel += sums[k][j];
            l = end;
        }
}

// Tiles in parallel; `body` gets the tile's first element i and its number of lanes n.
template <class Body>
static void for_tiles(const Unit& u, int threads, Body body) {
    _Pragma("omp parallel for schedule(static) num_threads(threads)")
    for (i64 i = 0; i < u.size; i += LANES) body(i, u.size - i < LANES ? (int)(u.size - i) : LANES);
}

// Slabs of tiles in parallel, each with sums of its own: the result does not depend on the number of threads.
template <class Body>
static void for_tiles_of_slabs(const Unit& u, int threads, Body body) {
    const i64 tiles = (u.size + LANES - 1) / LANES;
    _Pragma("omp parallel for schedule(static) num_threads(threads)")
    for (i64 slab = 0; slab < u.slabs; slab++) {
        double* partial = (double*)u.partial + slab * 3 * u.channels;
        for (i64 k = 0; k < 3 * u.channels; k++) partial[k] = 0;
        for (i64 tile = slab * tiles / u.slabs; tile < (slab + 1) * tiles / u.slabs; tile++) {
            const i64 i = tile * LANES;
            const int n = u.size - i < LANES ? (int)(u.size - i) : LANES;
            double sums[3][LANES];
            body(i, n, sums);
            gather(u, i, n, sums, partial);
        }
    }
}

#ifdef SURROGATE
template <class scalar, class real = typename RealOf<scalar>::type>
static void backward_cpu(const Unit& u, int threads) {
    for_tiles_of_slabs(u, threads, [&](i64 i, int n, double (*sums)[LANES]) {
        real mean[LANES], scale[LANES], bias[LANES];
        spread(u, u.mean, i, n, mean), spread(u, u.scale, i, n, scale), spread(u, u.bias, i, n, bias);
        backward_tile<scalar>(u, i, n, mean, scale, bias, sums);
    });
}
#else
template <class scalar, class real = typename RealOf<scalar>::type>
static void forward_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) {
        real mean[LANES], scale[LANES], bias[LANES];
        spread(u, u.mean, i, n, mean), spread(u, u.scale, i, n, scale), spread(u, u.bias, i, n, bias);
        forward_tile<scalar>(u, i, n, mean, scale, bias);
    });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void statistics_cpu(const Unit& u, int threads) {
    for_tiles_of_slabs(u, threads, [&](i64 i, int n, double (*sums)[LANES]) {
        statistics_tile<scalar, real>(u, i, n, sums);
    });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void normalise_backward_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) {
        real mean[LANES], scale[LANES], mean_grad[LANES], slope_grad[LANES];
        spread(u, u.mean, i, n, mean), spread(u, u.scale, i, n, scale);
        spread(u, u.mean_grad, i, n, mean_grad), spread(u, u.slope_grad, i, n, slope_grad);
        normalise_backward_tile<scalar>(u, i, n, mean, scale, mean_grad, slope_grad);
    });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void pack_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) {
        real y[LANES];
        for (i64 plane = 0; plane < u.steps; plane++) {
            FOR_LANES y[l] = real((int)plane_bit(((const scalar*)u.x)[i + l], plane));
            store_bits((unsigned*)u.bits + plane * ((u.size + 31) / 32), i, n, y);
        }
    });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void unpack_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) { unpack_tile<scalar, real>(u, i, n); });
}
#endif

// Entry points: `type` is 0 float, 1 double, 2 bfloat16, 3 half.
#define ENTRY(name)                                                                \
    extern "C" void scalesnn_##name(int type, int threads FIELDS(AS_PARAMETER)) {  \
        const Unit u = {0 FIELDS(AS_VALUE)};                                       \
        if (type == 0) name##_cpu<float>(u, threads);                              \
        else if (type == 1) name##_cpu<double>(u, threads);                        \
        else if (type == 2) name##_cpu<bf16>(u, threads);                          \
        else name##_cpu<fp16>(u, threads);                                         \
    }
#ifdef SURROGATE
ENTRY(backward)
#else
ENTRY(forward)
ENTRY(statistics)
ENTRY(normalise_backward)
ENTRY(pack)
ENTRY(unpack)
#endif
