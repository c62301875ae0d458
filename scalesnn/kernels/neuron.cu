// The fused ops of scalesnn: conv output -> batch norm -> (+ residual) -> spiking neuron, forward and backward.
//
// One source, three ways to run it. A "tile" is LANES neighbouring neurons over all T time-steps; the tile functions
// hold all the arithmetic. On a GPU a tile is one neuron and one thread (LANES = 1, its loops over lanes vanish); on a
// CPU it is a strip of memory that the compiler vectorises. neuron_gpu.cu and neuron_cpu.cpp, thin sets of drivers, go on
// from here.
//
// A tensor is [steps][size] with size = N * C * spatial in memory order; element i of a step belongs to channel
// (i / inner) % channels: inner = H * W for contiguous tensors, 1 for channels_last. Without a normalisation
// channels = 1. `scalar` is the type in memory, `real` that of the arithmetic: float, or double for double.
// The macros that choose a variant are written by source.py. Equations: docs/kernels.md.

#if defined(__CUDACC__) || defined(CUDA_SHIM)  // the shim of tests/kernels runs the GPU's drivers on a CPU
#define GPU 1
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define FOR_LANES for (int l = 0; l < 1 && n > 0; l++)
constexpr int LANES = 1;
#else
#define GPU 0
#define DEVICE static inline
#define UNROLL
#define FOR_LANES _Pragma("GCC ivdep") for (int l = 0; l < n; l++)
constexpr int LANES = 512;
#pragma omp declare simd notinbranch
extern "C" float expf(float) noexcept;  // vectorised by libmvec, which the system's header offers only to fast-math
#pragma omp declare simd notinbranch
extern "C" double exp(double) noexcept;
#endif

#ifndef __CUDACC__
#include <cmath>
#include <cstring>
#endif
#ifndef M_PI
#define M_PI 3.14159265358979323846
#endif
#ifndef STEPS
#define STEPS 32  // charges held at a time in the backward sweep: registers on a GPU, the first cache on a CPU
#endif

typedef long long i64;
constexpr int THREADS = 256;      // of a block on a GPU
enum Charge { IDENTITY, INTEGRATE, LEAKY_WITH_INPUT, LEAKY };

// What the kernels are told, all eight bytes wide so that ctypes and CuPy pass it alike. A null pointer: not there.
#define FIELDS(F)                                                                                                    \
    F(i64, steps) F(i64, size) F(i64, channels) F(i64, inner)                                                        \
    F(i64, slabs)                /* rows of `partial` */                                                             \
    F(i64, charge)               /* enum Charge */                                                                   \
    F(i64, hard_reset) F(i64, detach_reset)                                                                          \
    F(i64, x_repeated)           /* x is one step, the same at all times */                                          \
    F(i64, v_every_step)         /* v and grad_v are [steps][size], else the last step only */                       \
    F(const void*, x) F(const void*, mean) F(const void*, scale) F(const void*, bias)  /* y = (x-mean)*scale+bias */ \
    F(const void*, residual) F(const void*, residual_bits)                                                           \
    F(const void*, v_start) F(const void*, decay)   /* decay: 1/tau as a tensor (PLIF) */                            \
    F(void*, spikes) F(void*, v) F(void*, bits)                                                                      \
    F(const void*, grad_spikes) F(const void*, grad_v) F(void*, grad_x) F(void*, grad_v_start)                       \
    F(const void*, mean_grad) F(const void*, slope_grad)                                                             \
    F(void*, partial)            /* double [slabs][3][channels] */                                                   \
    F(void*, chunk_v)            /* v at the start of every chunk of STEPS steps, [chunks][size] */                  \
    F(double, v_init) F(double, tau) F(double, v_threshold) F(double, v_reset)                                       \
    F(double, p0) F(double, p1) F(double, p2) F(double, p3)                 /* the surrogate's parameters */
#define AS_FIELD(type, name) type name;
#define AS_PARAMETER(type, name) , type name
#define AS_VALUE(type, name) , name
struct Unit {
    int unused;
    FIELDS(AS_FIELD)
};

// ------------------------------------------------------------------------------------------------ numbers
struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
template <class scalar> struct RealOf { typedef float type; };
template <> struct RealOf<double> { typedef double type; };

DEVICE float to_real(float v) { return v; }
DEVICE double to_real(double v) { return v; }
DEVICE float to_real(bf16 v) {
    unsigned bits = (unsigned)v.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
DEVICE void from_real(float v, float& out) { out = v; }
DEVICE void from_real(double v, double& out) { out = v; }
DEVICE void from_real(float v, bf16& out) {  // to the nearest, ties to even, as torch
    unsigned bits;
    memcpy(&bits, &v, 4);
    unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = (unsigned short)(v != v ? 0x7fc0 : rounded);
}
#ifdef __CUDACC__
DEVICE float to_real(fp16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
DEVICE void from_real(float v, fp16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
#else
DEVICE float to_real(fp16 v) {
    _Float16 h;
    memcpy(&h, &v.bits, 2);
    return (float)h;
}
DEVICE void from_real(float v, fp16& out) {
    _Float16 h = (_Float16)v;
    memcpy(&out.bits, &h, 2);
}
#endif

// ------------------------------------------------------------------------------------------------ tiles
// Adds `value` to each lane whose bit is 1. `i` is a multiple of 32 at lane 0 on a CPU, where whole words are taken: the
// lanes from n to the next multiple of 32 change too.
template <class real>
DEVICE void add_bits(const unsigned* row, i64 i, int n, real value, real* y) {
#if GPU
    if (n > 0) y[0] += ((row[i / 32] >> (i % 32)) & 1) ? value : real(0);
#else
    for (int first = 0; first < n; first += 32) {
        const unsigned word = row[(i + first) / 32];
        for (int bit = 0; bit < 32; bit++) y[first + bit] += ((word >> bit) & 1) ? value : real(0);
    }
#endif
}

// The tile's part of one step's input: normalised, residual added.
template <class scalar, class real>
DEVICE void load_input(const Unit& u, i64 t, i64 i, int n, const real* mean, const real* scale, const real* bias,
                       real* y) {
    const scalar* x = (const scalar*)u.x + (u.x_repeated ? 0 : t * u.size) + i;
    if (u.mean) FOR_LANES y[l] = (to_real(x[l]) - mean[l]) * scale[l] + bias[l];
    else FOR_LANES y[l] = to_real(x[l]);
    if (u.residual) {
        const scalar* residual = (const scalar*)u.residual + t * u.size + i;
        FOR_LANES y[l] += to_real(residual[l]);
    }
    if (u.residual_bits) {
        add_bits((const unsigned*)u.residual_bits + t * ((u.size + 31) / 32), i, n, real(1), y);
    }
}

// h = charge(v, y)
template <class real>
DEVICE void charge(const Unit& u, int n, const real* v, const real* y, real* h) {
    const real reset = u.hard_reset ? real(u.v_reset) : real(0), tau = real(u.tau);
    const real decay = u.decay ? *(const real*)u.decay : real(0);
    if (u.charge == INTEGRATE) FOR_LANES h[l] = v[l] + y[l];
    else if (u.charge == LEAKY_WITH_INPUT && u.decay) FOR_LANES h[l] = v[l] + (y[l] - (v[l] - reset)) * decay;
    else if (u.charge == LEAKY_WITH_INPUT) FOR_LANES h[l] = v[l] + (y[l] - (v[l] - reset)) / tau;
    else if (u.decay) FOR_LANES h[l] = v[l] - (v[l] - reset) * decay + y[l];
    else FOR_LANES h[l] = v[l] - (v[l] - reset) / tau + y[l];
}

// v after the spike, from h; multiplied out as torch does it, so that inf and NaN spread alike
template <class real>
DEVICE void reset(const Unit& u, int n, const real* h, real* v) {
    const real threshold = real(u.v_threshold), value = real(u.v_reset);
    if (u.hard_reset) FOR_LANES {
        real s = h[l] - threshold >= 0 ? real(1) : real(0);
        v[l] = (1 - s) * h[l] + value * s;
    }
    else FOR_LANES {
        real s = h[l] - threshold >= 0 ? real(1) : real(0);
        v[l] = h[l] - threshold * s;
    }
}

template <class real>
DEVICE void load_start(const Unit& u, i64 i, int n, real* v) {
    const real* start = (const real*)u.v_start;
    if (start) FOR_LANES v[l] = start[i + l];
    else FOR_LANES v[l] = real(u.v_init);
}

// One bit for each lane that is not 0; `i` is a multiple of 32 at lane 0 (of the warp).
template <class real>
DEVICE void store_bits(unsigned* row, i64 i, int n, real* y) {
#if GPU
    unsigned word = __ballot_sync(~0u, n > 0 && y[0] != 0);
    if (n > 0 && i % 32 == 0) row[i / 32] = word;
#else
    for (int l = n; l % 32; l++) y[l] = 0;
    for (int first = 0; first < n; first += 32) {
        unsigned word = 0;
        for (int bit = 0; bit < 32; bit++) word |= (unsigned)(y[first + bit] != 0) << bit;
        row[(i + first) / 32] = word;
    }
#endif
}

template <class scalar, class real>
DEVICE void forward_tile(const Unit& u, i64 i, int n, const real* mean, const real* scale, const real* bias) {
    real v[LANES] = {}, y[LANES] = {}, h[LANES] = {};
    const real threshold = real(u.v_threshold);
    load_start(u, i, n, v);
    for (i64 t = 0; t < u.steps; t++) {
        scalar* out = (scalar*)u.spikes + t * u.size + i;
        load_input<scalar>(u, t, i, n, mean, scale, bias, y);
        if (u.charge != IDENTITY) {
            charge(u, n, v, y, h);
            FOR_LANES y[l] = h[l] - threshold >= 0 ? real(1) : real(0);
            reset(u, n, h, v);
        }
        FOR_LANES from_real(y[l], out[l]);
        if (u.bits) store_bits((unsigned*)u.bits + t * ((u.size + 31) / 32), i, n, y);
        if (u.v && (u.v_every_step || t == u.steps - 1)) {
            real* v_out = (real*)u.v + (u.v_every_step ? t * u.size : 0) + i;
            FOR_LANES v_out[l] = v[l];
        }
    }
}

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

// The second pass of the normalisation's backward: grad_x = scale * (grad_y - mean_grad - (x - mean) * slope_grad),
// where grad_y stands in grad_spikes. Without mean_grad (statistics that are constants): grad_x = scale * grad_y.
template <class scalar, class real>
DEVICE void normalise_backward_tile(const Unit& u, i64 i, int n, const real* mean, const real* scale,
                                    const real* mean_grad, const real* slope_grad) {
    for (i64 t = 0; t < u.steps; t++) {
        const scalar *x = (const scalar*)u.x + t * u.size + i, *grad = (const scalar*)u.grad_spikes + t * u.size + i;
        scalar* out = (scalar*)u.grad_x + t * u.size + i;
        if (u.mean_grad) FOR_LANES
            from_real(scale[l] * (to_real(grad[l]) - mean_grad[l] - (to_real(x[l]) - mean[l]) * slope_grad[l]), out[l]);
        else FOR_LANES from_real(scale[l] * to_real(grad[l]), out[l]);
    }
}

#ifdef SURROGATE
DEVICE float square(float x) { return x * x; }
DEVICE double square(double x) { return x * x; }

template <class real>
DEVICE real surrogate(real x, real p0, real p1, real p2, real p3) {
#if !defined(__CUDACC__)
    using std::cos, std::exp, std::fabs, std::log, std::sin, std::sqrt;
#endif
    SURROGATE_PARAMETERS
    return SURROGATE;
}

// From the gradients of spikes and v to that of y = bn(x) + residual (into grad_x), of v_start, and per lane the sums
// over time of grad_y, of grad_y * (x - mean), and of the gradient of decay. h comes again from x in a forward sweep;
// where T > STEPS first through all chunks, keeping v at their borders, then chunk by chunk from the last.
template <class scalar, class real>
DEVICE void backward_tile(const Unit& u, i64 i, int n, const real* mean, const real* scale, const real* bias,
                          double (*sums)[LANES]) {
    const real threshold = real(u.v_threshold), value = real(u.v_reset), tau = real(u.tau);
    const real resting = u.hard_reset ? value : real(0);
    const real decay = u.decay ? *(const real*)u.decay : real(0);
    const real p0 = real(u.p0), p1 = real(u.p1), p2 = real(u.p2), p3 = real(u.p3);
    const i64 chunks = (u.steps + STEPS - 1) / STEPS;
    real h[STEPS][LANES], v[LANES], y[LANES], grad_v[LANES], grad_y[LANES], grad_y_total[LANES] = {};
    real sum[LANES] = {}, sum_x[LANES] = {}, sum_decay[LANES] = {};

    if (u.charge != IDENTITY && chunks > 1) {
        load_start(u, i, n, v);
        for (i64 t = 0; t < (chunks - 1) * STEPS; t++) {
            load_input<scalar>(u, t, i, n, mean, scale, bias, y);
            charge(u, n, v, y, h[0]);
            reset(u, n, h[0], v);
            if ((t + 1) % STEPS == 0) {
                real* kept = (real*)u.chunk_v + ((t + 1) / STEPS - 1) * u.size + i;
                FOR_LANES kept[l] = v[l];
            }
        }
    }
    if (u.grad_v && !u.v_every_step) FOR_LANES grad_v[l] = ((const real*)u.grad_v)[i + l];
    else FOR_LANES grad_v[l] = 0;

    for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
        const i64 first = chunk * STEPS;
        real v_first[LANES];  // v before the chunk
        if (u.charge != IDENTITY) {
            if (chunk == 0) load_start(u, i, n, v_first);
            else {
                const real* kept = (const real*)u.chunk_v + (chunk - 1) * u.size + i;
                FOR_LANES v_first[l] = kept[l];
            }
            FOR_LANES v[l] = v_first[l];
            UNROLL for (int k = 0; k < STEPS; k++) if (first + k < u.steps) {
                load_input<scalar>(u, first + k, i, n, mean, scale, bias, y);
                charge(u, n, v, y, h[k]);
                reset(u, n, h[k], v);
            }
        }
        UNROLL for (int k = STEPS - 1; k >= 0; k--) if (first + k < u.steps) {
            const i64 t = first + k;
            const scalar* grad_s = (const scalar*)u.grad_spikes + t * u.size + i;
            if (u.grad_spikes) FOR_LANES grad_y[l] = to_real(grad_s[l]);
            else FOR_LANES grad_y[l] = 0;
            if (u.charge != IDENTITY) {
                if (u.grad_v && u.v_every_step) FOR_LANES grad_v[l] += ((const real*)u.grad_v)[t * u.size + i + l];
                // the gradient of h: through the spike, and through what the reset leaves of h
                const bool v_used = u.grad_v || t < u.steps - 1;  // else not 0 * h, which may be 0 * inf
                if (!u.detach_reset && u.hard_reset && v_used) FOR_LANES
                    grad_y[l] += grad_v[l] * (value - h[k][l]);
                if (!u.detach_reset && !u.hard_reset) FOR_LANES grad_y[l] -= grad_v[l] * threshold;
                FOR_LANES grad_y[l] *= surrogate(h[k][l] - threshold, p0, p1, p2, p3);
                if (u.hard_reset) FOR_LANES
                    grad_y[l] += grad_v[l] * (h[k][l] - threshold >= 0 ? real(0) : real(1));
                else FOR_LANES grad_y[l] += grad_v[l];
                if (u.decay) {  // dh/d(decay) = (y -) (v - resting), with v as it was before this step
                    if (k == 0) FOR_LANES v[l] = v_first[l];
                    else reset(u, n, h[k > 0 ? k - 1 : 0], v);
                    if (u.charge == LEAKY_WITH_INPUT) {
                        load_input<scalar>(u, t, i, n, mean, scale, bias, y);
                        FOR_LANES sum_decay[l] += grad_y[l] * (y[l] - (v[l] - resting));
                    } else FOR_LANES sum_decay[l] -= grad_y[l] * (v[l] - resting);
                }
                if (u.charge == INTEGRATE) FOR_LANES grad_v[l] = grad_y[l];
                else FOR_LANES {
                    real leak = u.decay ? grad_y[l] * decay : grad_y[l] / tau;
                    grad_v[l] = grad_y[l] - leak;
                    if (u.charge == LEAKY_WITH_INPUT) grad_y[l] = leak;
                }
            }
            if (u.mean) {
                const scalar* x = (const scalar*)u.x + (u.x_repeated ? 0 : t * u.size) + i;
                FOR_LANES {
                    sum[l] += grad_y[l];
                    sum_x[l] += grad_y[l] * (to_real(x[l]) - mean[l]);
                }
            }
            if (u.x_repeated) FOR_LANES grad_y_total[l] += grad_y[l];
            else {
                scalar* out = (scalar*)u.grad_x + t * u.size + i;
                FOR_LANES from_real(grad_y[l], out[l]);
            }
        }
    }
    if (u.x_repeated) FOR_LANES from_real(grad_y_total[l], ((scalar*)u.grad_x)[i + l]);
    if (u.grad_v_start) FOR_LANES ((real*)u.grad_v_start)[i + l] = grad_v[l];
    FOR_LANES {
        sums[0][l] = sum[l];
        sums[1][l] = sum_x[l];
        sums[2][l] = sum_decay[l];
    }
}
#endif

// Small whole numbers (spikes: 1 plane; sums of spikes: more) as bits, [planes][words]; `steps` counts the planes.
template <class scalar>
DEVICE unsigned plane_bit(scalar v, i64 plane) { return ((unsigned)(int)to_real(v) >> plane) & 1; }

template <class scalar, class real>
DEVICE void unpack_tile(const Unit& u, i64 i, int n) {
    real y[LANES] = {};
    for (i64 plane = 0; plane < u.steps; plane++)
        add_bits((const unsigned*)u.bits + plane * ((u.size + 31) / 32), i, n, real(1 << plane), y);
    scalar* out = (scalar*)u.spikes + i;
    FOR_LANES from_real(y[l], out[l]);
}
