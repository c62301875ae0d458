// The kernels of a CPU: tiles in memory, shared out to threads; sums over slabs of them. Goes on from neuron.cu.

template <class scalar>
struct Sequence {
    const scalar* from;
    i64 stride;
    void load(const void* tensor, i64 first, i64 size, i64 i, int, int) {
        from = (const scalar*)tensor + first * size + i, stride = size;
    }
    auto at(int k, int l) const { return to_real(from[k * stride + l]); }
};

template <class scalar, class real>
DEVICE void load(const scalar* from, int n, real* y) { FOR_LANES y[l] = from[l]; }

template <class scalar, class real>
DEVICE void store(scalar* to, int n, const real* y) { FOR_LANES from_real(y[l], to[l]); }

template <class sequence, class real>
DEVICE void forget_derived(sequence&, real (*)[LANES]) {}

// Adds `value` to each lane whose bit is 1. `i` is a multiple of 32; whole words are taken: the lanes from n to the next
// multiple of 32 change too.
template <class real>
DEVICE void add_bits(const unsigned* row, i64 i, int n, real value, real* y) {
    for (int first = 0; first < n; first += 32) {
        const unsigned word = row[(i + first) / 32];
        for (int bit = 0; bit < 32; bit++) y[first + bit] += ((word >> bit) & 1) ? value : real(0);
    }
}

template <class real>
struct BitSequence {
    const unsigned* row;
    i64 stride, i;
    void load(const Unit& u, i64 first, i64 tile, int, int) {
        row = (const unsigned*)u.residual_bits + first * words(u), stride = words(u), i = tile;
    }
    void add(int k, int n, real* y) const { add_bits(row + k * stride, i, n, real(1), y); }
};

template <class real>
struct Bits {
    void put(const Unit& u, i64 first, int k, i64 i, int n, real* y) {
        unsigned* row = (unsigned*)u.bits + (first + k) * words(u);
        for (int l = n; l % 32; l++) y[l] = 0;
        for (int start = 0; start < n; start += 32) {
            unsigned word = 0;
            for (int bit = 0; bit < 32; bit++) word |= (unsigned)(y[start + bit] != 0) << bit;
            row[(i + start) / 32] = word;
        }
    }
    void flush(const Unit&, i64, i64) {}
};

// Of every lane over time: its mean, its sum of squares about that mean (Welford, of the differences to the lane's first
// value, so that a large mean takes no digits), and the mean squared. Summed over a channel's lanes in double they give
// the channel's mean and variance.
template <class scalar, class real>
DEVICE void statistics_tile(const Unit& u, i64 i, int n, double (*sums)[LANES]) {
    real origin[LANES] = {}, mean[LANES] = {}, squares[LANES] = {};
    FOR_LANES origin[l] = to_real(((const scalar*)u.x)[i + l]);
    for (i64 t = 0; t < u.steps; t++) {
        const scalar* x = (const scalar*)u.x + t * u.size + i;
        const real share = real(1) / real(t + 1);
        FOR_LANES {
            real value = to_real(x[l]) - origin[l], delta = value - mean[l];
            mean[l] += delta * share;
            squares[l] += delta * (value - mean[l]);
        }
    }
    FOR_LANES {
        double lane_mean = (double)origin[l] + (double)mean[l];
        sums[0][l] = lane_mean;
        sums[1][l] = squares[l];
        sums[2][l] = lane_mean * lane_mean;
    }
}

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
template <class number>
DEVICE void gather(const Unit& u, i64 i, int n, const number (*sums)[LANES], double* partial) {
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
template <class number, class Body>
static void for_tiles_of_slabs(const Unit& u, int threads, Body body) {
    const i64 tiles = (u.size + LANES - 1) / LANES;
    _Pragma("omp parallel for schedule(static) num_threads(threads)")
    for (i64 slab = 0; slab < u.slabs; slab++) {
        double* partial = (double*)u.partial + slab * 3 * u.channels;
        for (i64 k = 0; k < 3 * u.channels; k++) partial[k] = 0;
        for (i64 tile = slab * tiles / u.slabs; tile < (slab + 1) * tiles / u.slabs; tile++) {
            const i64 i = tile * LANES;
            const int n = u.size - i < LANES ? (int)(u.size - i) : LANES;
            number sums[3][LANES] = {};
            body(i, n, sums);
            gather(u, i, n, sums, partial);
        }
    }
}

template <class scalar, class real = typename RealOf<scalar>::type>
static real decay_of(const Unit& u) { return u.decay ? *(const real*)u.decay : real(0); }

#ifdef SURROGATE
template <class scalar, class real = typename RealOf<scalar>::type>
static void backward_cpu(const Unit& u, int threads) {
    for_tiles_of_slabs<real>(u, threads, [&](i64 i, int n, real (*sums)[LANES]) {
        real mean[LANES], scale[LANES], bias[LANES];
        spread(u, u.mean, i, n, mean), spread(u, u.scale, i, n, scale), spread(u, u.bias, i, n, bias);
        backward_tile<scalar>(u, i, n, decay_of<scalar>(u), mean, scale, bias, sums);
    });
}
#else
template <class scalar, class real = typename RealOf<scalar>::type>
static void forward_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) {
        real mean[LANES], scale[LANES], bias[LANES];
        spread(u, u.mean, i, n, mean), spread(u, u.scale, i, n, scale), spread(u, u.bias, i, n, bias);
        forward_tile<scalar>(u, i, n, decay_of<scalar>(u), mean, scale, bias);
    });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void statistics_cpu(const Unit& u, int threads) {
    for_tiles_of_slabs<double>(u, threads, [&](i64 i, int n, double (*sums)[LANES]) {
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

// The rows' sums of every channel, a strip of channels at a time.
template <class Finish>
static void for_channels(const Unit& u, Finish finish) {
    for (i64 first = 0; first < u.channels; first += LANES) {
        const int n = u.channels - first < LANES ? (int)(u.channels - first) : LANES;
        double sums[3][LANES] = {};
        for (i64 row = 0; u.partial && row < u.slabs; row++)
            for (int k = 0; k < 3; k++) {
                const double* partial = (const double*)u.partial + (row * 3 + k) * u.channels + first;
                FOR_LANES sums[k][l] += partial[l];
            }
        for (int l = 0; l < n; l++) {
            const double total[3] = {sums[0][l], sums[1][l], sums[2][l]};
            finish(first + l, total);
        }
    }
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void channel_sums_cpu(const Unit& u, int) {
    for_channels(u, [&](i64 c, const double* total) { finish_channel_sums(u, c, total); });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void coefficients_cpu(const Unit& u, int) {
    for_channels(u, [&](i64 c, const double* total) { finish_coefficients<real>(u, c, total); });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void channel_gradients_cpu(const Unit& u, int) {
    for_channels(u, [&](i64 c, const double* total) { finish_channel_gradients<real>(u, c, total); });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void pack_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) { pack_tile<scalar, real>(u, i, n); });
}

template <class scalar, class real = typename RealOf<scalar>::type>
static void unpack_cpu(const Unit& u, int threads) {
    for_tiles(u, threads, [&](i64 i, int n) { unpack_tile<scalar, real>(u, i, n); });
}
#endif

// Entry points: `type` is 0 float, 1 double, 2 bfloat16, 3 half; `unit` the packed fields.
#define ENTRY(name)                                                                \
    extern "C" void scalesnn_##name(int type, int threads, const Unit* unit) {     \
        const Unit& u = *unit;                                                     \
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
ENTRY(channel_sums)
ENTRY(coefficients)
ENTRY(channel_gradients)
ENTRY(pack)
ENTRY(unpack)
#endif
