// The kernels of a GPU: tiles in registers, which thread has which, and sums over a block. Goes on from neuron.cu.
//
// A thread takes LANES neighbours by one load of up to 16 bytes, and asks for all steps of a chunk before it uses or
// writes the first. LANES is 1 where rows are not whole vectors. What a variant knows before is set by KNOWN; a variant
// has one kernel.

// ------------------------------------------------------------------------------------------------ memory
template <class scalar>
struct Pair { static constexpr bool is_half = false; };
template <> struct Pair<bf16> { static constexpr bool is_half = LANES > 1; };
template <> struct Pair<fp16> { static constexpr bool is_half = LANES > 1; };

DEVICE constexpr int alignment(int bytes) { return bytes < 16 ? bytes : 16; }

// The place up to which a load has been sent: compilers would put it off until its value is used.
DEVICE void sent(float& value) {
#ifdef __CUDACC__
    asm volatile("" : "+f"(value));
#endif
}
DEVICE void sent(double& value) {
#ifdef __CUDACC__
    asm volatile("" : "+d"(value));
#endif
}
DEVICE void sent(unsigned& value) {
#ifdef __CUDACC__
    asm volatile("" : "+r"(value));
#endif
}
template <class half> DEVICE void sent(half& value) {
#ifdef __CUDACC__
    asm volatile("" : "+h"(value.bits));
#endif
}

// A tile's lanes as they lie in memory.
template <class scalar, bool is_half = Pair<scalar>::is_half>
struct alignas(alignment(LANES * sizeof(scalar))) Pack {
    scalar lane[LANES];
    DEVICE auto at(int l) const { return to_real(lane[l]); }
    template <class real> DEVICE void set(const real* y) { FOR_LANES from_real(y[l], lane[l]); }
    DEVICE void is_sent() { FOR_LANES sent(lane[l]); }
};

DEVICE unsigned pair_of(float low, float high, bf16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    bf16 first, second;
    from_real(low, first), from_real(high, second);
    return first.bits | (unsigned)second.bits << 16;
#endif
}
DEVICE unsigned pair_of(float low, float high, fp16) {
    fp16 first, second;
    from_real(low, first), from_real(high, second);
    return first.bits | (unsigned)second.bits << 16;
}

template <class scalar>
struct alignas(alignment(LANES * 2)) Pack<scalar, true> {
    unsigned pair[(LANES + 1) / 2];
    DEVICE float at(int l) const {
        return to_real(scalar{(unsigned short)(l % 2 ? pair[l / 2] >> 16 : pair[l / 2])});
    }
    DEVICE void set(const float* y) {
        UNROLL for (int l = 0; l < LANES; l += 2) pair[l / 2] = pair_of(y[l], y[l + 1], scalar());
    }
    DEVICE void is_sent() { UNROLL for (int l = 0; l < LANES; l += 2) sent(pair[l / 2]); }
};

template <class scalar>
struct Sequence {
    Pack<scalar> pack[STEPS];
    DEVICE void load(const void* tensor, i64 first, i64 size, offset i, int steps, int n) {
        const scalar* from = (const scalar*)tensor + i;
        UNROLL for (int k = 0; k < STEPS; k++)
            if (n > 0 && k < steps) pack[k] = *(const Pack<scalar>*)(from + (offset)(first + k) * (offset)size);
        UNROLL for (int k = 0; k < STEPS; k++) pack[k].is_sent();
    }
    DEVICE auto at(int k, int l) const { return pack[k].at(l); }
};

// What the forward sweep made of x and h is computed again in the backward sweep, rather than kept in registers.
template <class sequence, class real>
DEVICE void forget_derived(sequence& x, real (*h)[LANES]) {
    UNROLL for (int k = 0; k < STEPS; k++) {
        x.pack[k].is_sent();
        FOR_LANES sent(h[k][l]);
    }
}

template <class scalar, class real>
DEVICE void load(const scalar* from, int n, real* y) {
    if (n > 0) {
        const Pack<scalar> pack = *(const Pack<scalar>*)from;
        FOR_LANES y[l] = pack.at(l);
    }
}

template <class scalar, class real>
DEVICE void store(scalar* to, int n, const real* y) {
    Pack<scalar> pack;
    pack.set(y);
    if (n > 0) *(Pack<scalar>*)to = pack;
}

template <class real>
DEVICE void add_bits(const unsigned* row, offset i, int n, real value, real* y) {
    const unsigned word = n > 0 ? row[i / 32] >> (i % 32) : 0;
    FOR_LANES y[l] += ((word >> l) & 1) ? value : real(0);
}

template <class real>
struct BitSequence {
    unsigned word[STEPS];
    DEVICE void load(const Unit& u, i64 first, offset i, int steps, int n) {
        const unsigned* row = (const unsigned*)u.residual_bits + i / 32;
        UNROLL for (int k = 0; k < STEPS; k++)
            if (n > 0 && k < steps) word[k] = row[(offset)(first + k) * (offset)words(u)] >> (i % 32);
    }
    DEVICE void add(int k, int, real* y) const { FOR_LANES y[l] += ((word[k] >> l) & 1) ? real(1) : real(0); }
};

// With one lane a ballot makes a word of a step. With four, eight threads have the words of eight steps, each thread four
// bits of every word: the 8 x 8 nibbles are transposed in three exchanges, after which each thread has the word of one
// step. All threads of a warp take part.
template <class real>
struct Bits {
    unsigned nibbles[(STEPS + 7) / 8] = {};

    DEVICE void put(const Unit& u, i64 first, int k, offset i, int n, const real* y) {
        static_assert(sizeof(real) > 0 && (LANES == 1 || LANES == 4), "eight threads make a word");
        if (LANES == 1) {
            const unsigned word = __ballot_sync(~0u, n > 0 && y[0] != 0);
            if (n > 0 && i % 32 == 0) ((unsigned*)u.bits)[(offset)(first + k) * (offset)words(u) + i / 32] = word;
        } else FOR_LANES nibbles[k / 8] |= (n > 0 && y[l] != 0 ? 1u : 0u) << (k % 8 * 4 + l);
    }

    DEVICE void flush(const Unit& u, i64 first, offset i) {
        if (LANES == 1) return;
        UNROLL for (int k = 0; k < STEPS; k += 8) {
            const int own = threadIdx.x % 8;
            unsigned word = nibbles[k / 8];
            UNROLL for (int distance = 4; distance > 0; distance /= 2) {
                const unsigned low = distance == 4 ? 0x0000ffff : distance == 2 ? 0x00ff00ff : 0x0f0f0f0f;
                const unsigned other = __shfl_xor_sync(~0u, word, distance);
                word = own & distance ? (word & ~low) | (other >> (4 * distance) & low)
                                      : (word & low) | (other << (4 * distance) & ~low);
            }
            if (first + k + own < u.steps && k + own < STEPS && i / 32 * 32 < u.size)
                ((unsigned*)u.bits)[(offset)(first + k + own) * (offset)words(u) + i / 32] = word;
        }
    }
};

// ------------------------------------------------------------------------------------------------ places
// Every thread's tiles, a stride apart, in memory order; whole warps walk together. `c` is the channel of the first lane:
// carried along, as a division takes longer than a tile.
struct Tiles {
    offset i, stride, inner, channels, c, q, step_c, step_q;

    DEVICE Tiles(const Unit& u) : inner((offset)u.inner), channels((offset)u.channels) {
        i = (offset)(blockIdx.x * THREADS + threadIdx.x) * LANES, stride = (offset)gridDim.x * THREADS * LANES;
        q = i % inner, c = i / inner % channels, step_q = stride % inner, step_c = stride / inner % channels;
    }
    DEVICE bool inside(const Unit& u) const { return i < (offset)(words(u) + LANES - 1) / LANES * LANES * 32; }
    DEVICE int lanes(const Unit& u) const { return i < (offset)u.size ? LANES : 0; }
    DEVICE void next() {
        i += stride, q += step_q, c += step_c;
        if (q >= inner) q -= inner, c++;
        if (c >= channels) c -= channels;
    }
};

// Every thread's tiles of one channel, or in channels_last of LANES channels: a block takes 64 neighbouring channels (else
// one), and every gridDim.y-th group of their positions.
struct Positions {
    static constexpr int COLUMNS = CHANNELS_LAST ? 64 / LANES : 1, ROWS = THREADS / COLUMNS;
    offset c, p, end, stride, inner, channels, image, q, step_image, step_q;

    DEVICE Positions(const Unit& u) : channels((offset)u.channels) {
        c = (blockIdx.x * COLUMNS + threadIdx.x % COLUMNS) * (CHANNELS_LAST ? LANES : 1);
        p = blockIdx.y * ROWS + threadIdx.x / COLUMNS, stride = gridDim.y * ROWS;
        end = c < channels ? (offset)u.size / channels / (CHANNELS_LAST ? 1 : LANES) : 0;
        if (!CHANNELS_LAST) {
            inner = (offset)u.inner / LANES;
            image = p / inner, q = p % inner, step_image = stride / inner, step_q = stride % inner;
        }
    }
    DEVICE bool inside() const { return p < end; }
    DEVICE offset element() const {
        return CHANNELS_LAST ? p * channels + c : ((image * channels + c) * inner + q) * LANES;
    }
    DEVICE void next() {
        p += stride;
        if (CHANNELS_LAST) return;
        image += step_image, q += step_q;
        if (q >= inner) q -= inner, image++;
    }
};

// The coefficients of a tile's lanes, from those of the channels.
template <class real>
DEVICE void of_lanes(const void* of_channel, offset c, real* lanes) {
    if (!of_channel) return;
    if (CHANNELS_LAST) load((const real*)of_channel + c, LANES, lanes);
    else FOR_LANES lanes[l] = ((const real*)of_channel)[c];
}

// Sums of a block's threads, by a tree of fixed order: the result is the same in every run.
template <class real>
DEVICE void store_totals(const Unit& u, offset c, const real (*totals)[LANES]) {
    constexpr int WIDTH = CHANNELS_LAST ? LANES : 1, COLUMNS = Positions::COLUMNS;
    __shared__ double shared[WIDTH][THREADS];
    const int own = threadIdx.x;
    for (int k = 0; k < 3; k++) {
        UNROLL for (int w = 0; w < WIDTH; w++) shared[w][own] = 0;
        FOR_LANES shared[l % WIDTH][own] += totals[k][l];
        __syncthreads();
        for (int half = THREADS / 2; half >= COLUMNS; half /= 2) {
            if (own < half) UNROLL for (int w = 0; w < WIDTH; w++) shared[w][own] += shared[w][own + half];
            __syncthreads();
        }
        if (own < COLUMNS && c < (offset)u.channels) UNROLL for (int w = 0; w < WIDTH; w++)
            ((double*)u.partial)[(blockIdx.y * 3 + k) * u.channels + c + w] = shared[w][own];
        __syncthreads();
    }
}

// ------------------------------------------------------------------------------------------------ kernels
#if defined(KERNEL_backward) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200 && STEPS > 8
#undef MIN_BLOCKS
#define MIN_BLOCKS 1  // an SM has little bandwidth there: a few threads without spills use it
#endif
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scalesnn_##name(int unused FIELDS(AS_PARAMETER))
#define THERE(pointer) if (!(pointer)) __builtin_unreachable()
#define MAKE_UNIT                        \
    Unit u = {unused FIELDS(AS_VALUE)};  \
    KNOWN                                \
    [[maybe_unused]] const REAL rate = u.decay ? *(const REAL*)u.decay : REAL(0);

#ifdef KERNEL_forward
KERNEL(forward) {
    MAKE_UNIT
    for (Tiles at(u); at.inside(u); at.next()) {
        REAL mean[LANES], scale[LANES], bias[LANES];
        of_lanes(u.mean, at.c, mean), of_lanes(u.scale, at.c, scale), of_lanes(u.bias, at.c, bias);
        forward_tile<SCALAR>(u, at.i, at.lanes(u), rate, mean, scale, bias);
    }
}
#endif

#ifdef KERNEL_normalise_backward
KERNEL(normalise_backward) {
    MAKE_UNIT
    for (Tiles at(u); at.inside(u); at.next()) {
        REAL mean[LANES], scale[LANES], mean_grad[LANES], slope_grad[LANES];
        of_lanes(u.mean, at.c, mean), of_lanes(u.scale, at.c, scale);
        of_lanes(u.mean_grad, at.c, mean_grad), of_lanes(u.slope_grad, at.c, slope_grad);
        normalise_backward_tile<SCALAR>(u, at.i, at.lanes(u), mean, scale, mean_grad, slope_grad);
    }
}
#endif

#ifdef KERNEL_backward
KERNEL(backward) {
    MAKE_UNIT
    REAL means[LANES], scales[LANES], biases[LANES], sums[3][LANES] = {};
    Positions at(u);
    if (at.c < at.channels)
        of_lanes(u.mean, at.c, means), of_lanes(u.scale, at.c, scales), of_lanes(u.bias, at.c, biases);
    for (; at.inside(); at.next())
        backward_tile<SCALAR>(u, at.element(), LANES, rate, means, scales, biases, sums);
    store_totals(u, at.c, sums);
}
#endif

// A thread takes differences to its first value, so that a large mean takes no digits, and adds them in `real`; in double
// it does three sums at its end: of its lanes' means, squares about its own mean, and means squared.
#ifdef KERNEL_statistics
KERNEL(statistics) {
    MAKE_UNIT
    REAL origin[LANES] = {}, sum[LANES] = {}, squares[LANES] = {};
    offset count = 0;
    Positions at(u);
    for (; at.inside(); at.next()) {
        for (i64 first = 0; first < u.steps; first += STEPS) {
            Sequence<SCALAR> x;
            x.load(u.x, first, u.size, at.element(), steps_of_chunk(u, first), LANES);
            if (count == 0 && first == 0) FOR_LANES origin[l] = x.at(0, l);
            UNROLL for (int k = 0; k < STEPS; k++) if (k < steps_of_chunk(u, first)) FOR_LANES {
                const REAL value = x.at(k, l) - origin[l];
                sum[l] += value;
                squares[l] += value * value;
            }
        }
        count++;
    }
    double totals[3][LANES] = {};
    if (count > 0) FOR_LANES {
        const REAL from_origin = sum[l] / (REAL)(count * u.steps);
        const double mean = (double)origin[l] + (double)from_origin;
        totals[0][l] = (double)count * mean;
        totals[1][l] = squares[l] - sum[l] * from_origin;
        totals[2][l] = totals[0][l] * mean;
    }
    store_totals(u, at.c, totals);
}
#endif

#if defined(KERNEL_channel_sums) || defined(KERNEL_coefficients) || defined(KERNEL_channel_gradients)
// Few channels and up to thousands of rows: a block takes COLUMNS channels, whose rows its threads share; the tree of
// additions has a fixed order.
constexpr int COLUMNS = 8;
template <class Finish>
DEVICE void for_channels(const Unit& u, Finish finish) {
    __shared__ double shared[3][THREADS];
    const i64 c = (i64)blockIdx.x * COLUMNS + threadIdx.x % COLUMNS;
    double total[3] = {0, 0, 0};
    if (c < u.channels && u.partial)
        for (i64 row = threadIdx.x / COLUMNS; row < u.slabs; row += THREADS / COLUMNS)
            for (int k = 0; k < 3; k++) total[k] += ((const double*)u.partial)[(row * 3 + k) * u.channels + c];
    for (int k = 0; k < 3; k++) shared[k][threadIdx.x] = total[k];
    __syncthreads();
    for (int half = THREADS / 2; half >= COLUMNS; half /= 2) {
        if (threadIdx.x < half)
            for (int k = 0; k < 3; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x >= COLUMNS || c >= u.channels) return;
    for (int k = 0; k < 3; k++) total[k] = shared[k][threadIdx.x];
    finish(c, total);
}
#endif

#ifdef KERNEL_channel_sums
KERNEL(channel_sums) {
    MAKE_UNIT
    for_channels(u, [&](i64 c, const double* total) { finish_channel_sums(u, c, total); });
}
#endif

#ifdef KERNEL_coefficients
KERNEL(coefficients) {
    MAKE_UNIT
    for_channels(u, [&](i64 c, const double* total) { finish_coefficients<REAL>(u, c, total); });
}
#endif

#ifdef KERNEL_channel_gradients
KERNEL(channel_gradients) {
    MAKE_UNIT
    for_channels(u, [&](i64 c, const double* total) { finish_channel_gradients<REAL>(u, c, total); });
}
#endif

#ifdef KERNEL_pack
KERNEL(pack) {
    MAKE_UNIT
    for (Tiles at(u); at.inside(u); at.next()) pack_tile<SCALAR, REAL>(u, at.i, at.lanes(u));
}
#endif

#ifdef KERNEL_unpack
KERNEL(unpack) {
    MAKE_UNIT
    for (Tiles at(u); at.inside(u); at.next()) unpack_tile<SCALAR, REAL>(u, at.i, at.lanes(u));
}
#endif
