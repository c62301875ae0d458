// The fused ops of scalesnn: conv output -> batch norm -> (+ residual) -> spiking neuron, forward and backward.
//
// One source, three ways to run it. A "tile" is LANES neighbouring neurons over all T time-steps; the tile functions
// hold all the arithmetic. On a GPU a tile is one thread's, of up to 4 neurons, and LANES, STEPS and what else is known
// before are constants of the variant; on a CPU it is a strip of memory that the compiler vectorises. neuron_gpu.cu and
// neuron_cpu.cpp go on from here: how a tile meets memory, and the kernels.
//
// A tensor is [steps][size] with size = N * C * spatial in memory order; element i of a step belongs to channel
// (i / inner) % channels: inner = H * W for contiguous tensors, 1 for channels_last. Without a normalisation
// channels = 1. `scalar` is the type in memory, `real` that of the arithmetic: float, or double for double.
// The macros that choose a variant are written by source.py. Equations: docs/kernels.md.

#if defined(__CUDACC__) || defined(CUDA_SHIM)  // the shim of tests/kernels runs the GPU's drivers on a CPU
#define GPU 1
#define DEVICE __device__ __forceinline__
#define MEMBER DEVICE
#define UNROLL _Pragma("unroll")
#define FOR_LANES UNROLL for (int l = 0; l < LANES; l++)
#else
#define GPU 0
#define DEVICE static inline
#define MEMBER
#define UNROLL
#define FOR_LANES _Pragma("GCC ivdep") for (int l = 0; l < n; l++)
#define OFFSET long long
constexpr int LANES = 512;
constexpr bool TAU_IS_POWER_OF_2 = false;
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
typedef OFFSET offset;            // of an element: 32 bits on a GPU where they suffice
constexpr int THREADS = 256;      // of a block on a GPU
enum Charge { IDENTITY, INTEGRATE, LEAKY_WITH_INPUT, LEAKY };

// What the kernels are told, all eight bytes wide: the host packs them in this order behind eight bytes of padding, which
// is the layout of `Unit` and of a kernel's parameters alike. A null pointer: not there.
#define FIELDS(F)                                                                                                    \
    F(i64, steps) F(i64, size) F(i64, channels) F(i64, inner)                                                        \
    F(i64, slabs)                /* rows of `partial` */                                                             \
    F(i64, charge)               /* enum Charge */                                                                   \
    F(i64, hard_reset) F(i64, detach_reset)                                                                          \
    F(i64, x_repeated)           /* x is one step, the same at all times */                                          \
    F(i64, repeats)              /* of x, which is in the sums of a channel once */                                  \
    F(i64, v_every_step)         /* v and grad_v are [steps][size], else the last step only */                       \
    F(i64, parameter_type) F(i64, running_type)                             /* of weight and running_mean, as ENTRY */ \
    F(double, v_init) F(double, tau) F(double, v_threshold) F(double, v_reset)                                       \
    F(double, p0) F(double, p1) F(double, p2) F(double, p3)                 /* the surrogate's parameters */         \
    F(double, values)            /* values of a channel; negative: what stands behind `partial` */                   \
    F(double, eps) F(double, momentum)  /* negative: 1 / batches */                                                  \
    F(const void*, x) F(const void*, mean) F(const void*, scale) F(const void*, bias)  /* y = (x-mean)*scale+bias */ \
    F(const void*, residual) F(const void*, residual_bits)                                                           \
    F(const void*, v_start) F(const void*, decay)   /* decay: 1/tau as a tensor (PLIF) */                            \
    F(void*, spikes) F(void*, v) F(void*, bits)                                                                      \
    F(const void*, grad_spikes) F(const void*, grad_v) F(void*, grad_x) F(void*, grad_v_start)                       \
    F(const void*, mean_grad) F(const void*, slope_grad)                                                             \
    F(void*, partial)            /* double [slabs][3][channels] */                                                   \
    F(void*, chunk_v)            /* v at the start of every chunk of STEPS steps, [chunks][size] */                  \
    F(const void*, weight) F(const void*, shift)    /* BatchNorm's parameters */                                     \
    F(void*, running_mean) F(void*, running_var) F(void*, batches)                                                   \
    F(void*, all_sums)           /* double [3][channels], and the count behind them */                               \
    F(void*, affine)             /* real [4][channels]: mean, scale, bias, 1 / deviation */                          \
    F(void*, statistics)         /* double [channels]: 1 / (variance + eps), and the count behind them */            \
    F(void*, coefficients)       /* real [2][channels]: mean_grad and slope_grad */                                  \
    F(void*, grad_weight) F(void*, grad_shift)
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
// How a tile meets memory: each build has its own. `n` lanes are there; on a GPU all or none. `k` counts the steps of a
// chunk of STEPS, `t` those of the tensor.
template <class scalar> struct Sequence;  // the tile's part of a tensor in a chunk: load, then at(k, lane)
template <class real> struct BitSequence;  // the same of bits: load, then add(k, …) adds 1 where a bit is 1
template <class real> struct Bits;         // bits to be written: put(k, …) for every step of a chunk, then flush
template <class scalar, class real> DEVICE void load(const scalar* from, int n, real* y);
template <class scalar, class real> DEVICE void store(scalar* to, int n, const real* y);

template <class sequence, class real> DEVICE void forget_derived(sequence& x, real (*h)[LANES]);  // saves registers
template <class real> DEVICE void add_bits(const unsigned* row, offset i, int n, real value, real* y);

DEVICE i64 words(const Unit& u) { return (u.size + 31) / 32; }

DEVICE int steps_of_chunk(const Unit& u, i64 first) { return u.steps - first < STEPS ? (int)(u.steps - first) : STEPS; }

// A tile's input in a chunk: normalised, residual added.
template <class scalar, class real>
struct Input {
    Sequence<scalar> x, residual;
    BitSequence<real> residual_bits;

    MEMBER void load(const Unit& u, i64 first, offset i, int n) {
        const int steps = steps_of_chunk(u, first);
        x.load(u.x, u.x_repeated ? 0 : first, u.x_repeated ? 0 : u.size, i, steps, n);
        if (u.residual) residual.load(u.residual, first, u.size, i, steps, n);
        if (u.residual_bits) residual_bits.load(u, first, i, steps, n);
    }

    MEMBER void at(const Unit& u, int k, int n, const real* mean, const real* scale, const real* bias, real* y) const {
        if (u.mean) FOR_LANES y[l] = (x.at(k, l) - mean[l]) * scale[l] + bias[l];
        else FOR_LANES y[l] = x.at(k, l);
        if (u.residual) FOR_LANES y[l] += residual.at(k, l);
        if (u.residual_bits) residual_bits.add(k, n, y);
    }
};

template <class real>
DEVICE real over_tau(const Unit& u, real value) {  // the same number either way where 1 / tau is exact
    return TAU_IS_POWER_OF_2 ? value * (1 / real(u.tau)) : value / real(u.tau);
}

// h = charge(v, y); `decay`: 1 / tau where it is learned
template <class real>
DEVICE void charge(const Unit& u, int n, real decay, const real* v, const real* y, real* h) {
    const real resting = u.hard_reset ? real(u.v_reset) : real(0);
    if (u.charge == INTEGRATE) FOR_LANES h[l] = v[l] + y[l];
    else if (u.charge == LEAKY_WITH_INPUT && u.decay) FOR_LANES h[l] = v[l] + (y[l] - (v[l] - resting)) * decay;
    else if (u.charge == LEAKY_WITH_INPUT) FOR_LANES h[l] = v[l] + over_tau(u, y[l] - (v[l] - resting));
    else if (u.decay) FOR_LANES h[l] = v[l] - (v[l] - resting) * decay + y[l];
    else FOR_LANES h[l] = v[l] - over_tau(u, v[l] - resting) + y[l];
}

// v after the spike, from h: (1 - s) h + v_reset s or h - v_threshold s, multiplied as torch does it, so that inf and NaN
// spread alike
template <class real>
DEVICE void reset(const Unit& u, int n, const real* h, real* v) {
    const real threshold = real(u.v_threshold), value = real(u.v_reset);
    const real no_value = value * real(0), no_threshold = threshold * real(0);
    if (u.hard_reset) FOR_LANES {
        const bool fires = h[l] - threshold >= 0;
        v[l] = (fires ? real(0) : real(1)) * h[l] + (fires ? value : no_value);
    }
    else FOR_LANES v[l] = h[l] - (h[l] - threshold >= 0 ? threshold : no_threshold);
}

template <class real>
DEVICE void load_start(const Unit& u, offset i, int n, real* v) {
    if (u.v_start) load((const real*)u.v_start + i, n, v);
    else FOR_LANES v[l] = real(u.v_init);
}

template <class scalar, class real>
DEVICE void forward_tile(const Unit& u, offset i, int n, real decay, const real* mean, const real* scale,
                         const real* bias) {
    real v[LANES] = {}, y[LANES] = {}, h[LANES] = {};
    const real threshold = real(u.v_threshold);
    load_start(u, i, n, v);
    for (i64 first = 0; first < u.steps; first += STEPS) {
        Input<scalar, real> input;
        Bits<real> bits;
        input.load(u, first, i, n);
        UNROLL for (int k = 0; k < STEPS; k++) if (k < steps_of_chunk(u, first)) {
            const offset t = (offset)(first + k);
            input.at(u, k, n, mean, scale, bias, y);
            if (u.charge != IDENTITY) {
                charge(u, n, decay, v, y, h);
                FOR_LANES y[l] = h[l] - threshold >= 0 ? real(1) : real(0);
                reset(u, n, h, v);
            }
            store((scalar*)u.spikes + t * (offset)u.size + i, n, y);
            if (u.bits) bits.put(u, first, k, i, n, y);
            if (u.v && (u.v_every_step || t == u.steps - 1)) {
                store((real*)u.v + (u.v_every_step ? t * (offset)u.size : 0) + i, n, v);
            }
        }
        if (u.bits) bits.flush(u, first, i);
    }
}

// The second pass of the normalisation's backward: grad_x = scale * (grad_y - mean_grad - (x - mean) * slope_grad),
// where grad_y stands in grad_spikes. Without mean_grad (statistics that are constants): grad_x = scale * grad_y.
template <class scalar, class real>
DEVICE void normalise_backward_tile(const Unit& u, offset i, int n, const real* mean, const real* scale,
                                    const real* mean_grad, const real* slope_grad) {
    for (i64 first = 0; first < u.steps; first += STEPS) {
        const int steps = steps_of_chunk(u, first);
        Sequence<scalar> x, grad;
        if (u.mean_grad) x.load(u.x, first, u.size, i, steps, n);
        grad.load(u.grad_spikes, first, u.size, i, steps, n);
        UNROLL for (int k = 0; k < STEPS; k++) if (k < steps) {
            real y[LANES];
            if (u.mean_grad) FOR_LANES
                y[l] = scale[l] * (grad.at(k, l) - mean_grad[l] - (x.at(k, l) - mean[l]) * slope_grad[l]);
            else FOR_LANES y[l] = scale[l] * grad.at(k, l);
            store((scalar*)u.grad_x + (offset)(first + k) * (offset)u.size + i, n, y);
        }
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

// From the gradients of spikes and v to that of y = bn(x) + residual (into grad_x) and of v_start; adds to each lane's
// `sums` over time those of grad_y, of grad_y * (x - mean), and of the gradient of decay. h comes again from x in a
// forward sweep; where T > STEPS first through all chunks, keeping v at their borders, then chunk by chunk from the last.
template <class scalar, class real>
DEVICE void backward_tile(const Unit& u, offset i, int n, real decay, const real* mean, const real* scale,
                          const real* bias, real (*sums)[LANES]) {
    const real threshold = real(u.v_threshold), value = real(u.v_reset);
    const real resting = u.hard_reset ? value : real(0);
    const real p0 = real(u.p0), p1 = real(u.p1), p2 = real(u.p2), p3 = real(u.p3);
    const i64 chunks = (u.steps + STEPS - 1) / STEPS;
    const offset size = (offset)u.size;
    real h[STEPS][LANES], v[LANES], y[LANES], grad_v[LANES] = {}, grad_y[LANES], grad_y_total[LANES] = {};
    Input<scalar, real> input;
    Sequence<scalar> grad_s;

    if (u.charge != IDENTITY && chunks > 1) {
        load_start(u, i, n, v);
        for (i64 chunk = 0; chunk < chunks - 1; chunk++) {
            input.load(u, chunk * STEPS, i, n);
            UNROLL for (int k = 0; k < STEPS; k++) {
                input.at(u, k, n, mean, scale, bias, y);
                charge(u, n, decay, v, y, h[0]);
                reset(u, n, h[0], v);
            }
            store((real*)u.chunk_v + (offset)chunk * size + i, n, v);
        }
    }
    if (u.grad_v && !u.v_every_step) load((const real*)u.grad_v + i, n, grad_v);

    for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
        const i64 first = chunk * STEPS;
        const int steps = steps_of_chunk(u, first);
        real v_first[LANES];  // v before the chunk
        if (u.charge != IDENTITY || u.mean) input.load(u, first, i, n);
        if (u.grad_spikes) grad_s.load(u.grad_spikes, first, u.size, i, steps, n);
        if (u.charge != IDENTITY) {
            if (chunk == 0) load_start(u, i, n, v_first);
            else load((const real*)u.chunk_v + (offset)(chunk - 1) * size + i, n, v_first);
            FOR_LANES v[l] = v_first[l];
            UNROLL for (int k = 0; k < STEPS; k++) if (k < steps) {
                input.at(u, k, n, mean, scale, bias, y);
                charge(u, n, decay, v, y, h[k]);
                reset(u, n, h[k], v);
            }
        }
        forget_derived(input.x, h);
        UNROLL for (int k = STEPS - 1; k >= 0; k--) if (k < steps) {
            const offset t = (offset)(first + k);
            if (u.grad_spikes) FOR_LANES grad_y[l] = grad_s.at(k, l);
            else FOR_LANES grad_y[l] = 0;
            if (u.charge != IDENTITY) {
                if (u.grad_v && u.v_every_step) {
                    load((const real*)u.grad_v + t * size + i, n, y);
                    FOR_LANES grad_v[l] += y[l];
                }
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
                        input.at(u, k, n, mean, scale, bias, y);
                        FOR_LANES sums[2][l] += grad_y[l] * (y[l] - (v[l] - resting));
                    } else FOR_LANES sums[2][l] -= grad_y[l] * (v[l] - resting);
                }
                if (u.charge == INTEGRATE) FOR_LANES grad_v[l] = grad_y[l];
                else FOR_LANES {
                    const real leak = u.decay ? grad_y[l] * decay : over_tau(u, grad_y[l]);
                    grad_v[l] = grad_y[l] - leak;
                    if (u.charge == LEAKY_WITH_INPUT) grad_y[l] = leak;
                }
            }
            if (u.mean) FOR_LANES {
                sums[0][l] += grad_y[l];
                sums[1][l] += grad_y[l] * (input.x.at(k, l) - mean[l]);
            }
            if (u.x_repeated) FOR_LANES grad_y_total[l] += grad_y[l];
            else store((scalar*)u.grad_x + t * size + i, n, grad_y);
        }
    }
    if (u.x_repeated) store((scalar*)u.grad_x + i, n, grad_y_total);
    if (u.grad_v_start) store((real*)u.grad_v_start + i, n, grad_v);
}
#endif

// Small whole numbers (spikes: 1 plane; sums of spikes: more) as bits, [planes][words]; `steps` counts the planes.
template <class scalar, class real>
DEVICE void pack_tile(const Unit& u, offset i, int n) {
    for (i64 first = 0; first < u.steps; first += STEPS) {
        Sequence<scalar> x;
        Bits<real> bits;
        x.load(u.x, 0, 0, i, 1, n);
        UNROLL for (int k = 0; k < STEPS; k++) if (k < steps_of_chunk(u, first)) {
            real y[LANES];
            FOR_LANES y[l] = real(((unsigned)(int)x.at(0, l) >> (first + k)) & 1);
            bits.put(u, first, k, i, n, y);
        }
        bits.flush(u, first, i);
    }
}

template <class scalar, class real>
DEVICE void unpack_tile(const Unit& u, offset i, int n) {
    real y[LANES] = {};
    for (i64 plane = 0; plane < u.steps; plane++)
        add_bits((const unsigned*)u.bits + plane * words(u), i, n, real(1 << plane), y);
    store((scalar*)u.spikes + i, n, y);
}

#ifndef SURROGATE
// ------------------------------------------------------------------------------------------------ sums of channels
// Values whose type is known at run time only: `type` as in ENTRY.
template <class real>
DEVICE real load_any(const void* from, i64 type, i64 i) {
    if (type == 0) return (real)((const float*)from)[i];
    if (type == 1) return (real)((const double*)from)[i];
    return (real)(type == 2 ? to_real(((const bf16*)from)[i]) : to_real(((const fp16*)from)[i]));
}

template <class real>
DEVICE void store_any(real value, void* to, i64 type, i64 i) {
    if (type == 0) ((float*)to)[i] = (float)value;
    else if (type == 1) ((double*)to)[i] = (double)value;
    else if (type == 2) from_real((float)value, ((bf16*)to)[i]);
    else from_real((float)value, ((fp16*)to)[i]);
}

// Sums to be added to those of other ranks or other time-steps: of x, of its squares about each lane's mean, of those
// means squared, and how many values there were.
DEVICE void finish_channel_sums(const Unit& u, i64 c, const double* total) {
    double* sums = (double*)u.all_sums;
    sums[c] = total[0] * (double)u.steps;
    sums[u.channels + c] = total[1] * (double)u.repeats;
    sums[2 * u.channels + c] = total[2] * (double)u.steps;
    if (c == 0) sums[3 * u.channels] = u.values;
}

// old * (1 - momentum) + value * momentum, the first product in the type of the buffer, as torch
template <class real>
DEVICE void update_running(void* running, i64 type, i64 c, double value, double momentum) {
    const real kept = load_any<real>(running, type, c) * (real)(1 - momentum);
    store_any((real)((double)kept + value * momentum), running, type, c);
}

// From the sums of a channel to its mean and variance, the running ones, and the line that normalises. Without
// `partial` the running mean and variance are the statistics.
template <class real>
DEVICE void finish_coefficients(const Unit& u, i64 c, const double* total) {
#if !defined(__CUDACC__)
    using std::sqrt;
#endif
    real mean, inverse_deviation;
    if (u.partial) {
        const double count = u.values < 0 ? ((const double*)u.partial)[3 * u.channels] : u.values;
        const double wide_mean = total[0] * (double)u.steps / count;
        const double between = total[2] * (double)u.steps / count - wide_mean * wide_mean;
        const double variance = total[1] * (double)u.repeats / count + (between < 0 ? 0 : between);
        const double inverse_variance = 1 / (variance + u.eps);
        mean = (real)wide_mean, inverse_deviation = (real)sqrt(inverse_variance);
        ((double*)u.statistics)[c] = inverse_variance;
        if (c == 0) ((double*)u.statistics)[u.channels] = count;
        if (u.running_mean) {
            const double momentum = u.momentum < 0 ? 1 / (double)*(const i64*)u.batches : u.momentum;
            const double unbiased = variance * (count / (count - 1));
            if (u.running_type == 1) {
                update_running<double>(u.running_mean, 1, c, wide_mean, momentum);
                update_running<double>(u.running_var, 1, c, unbiased, momentum);
            } else {
                update_running<float>(u.running_mean, u.running_type, c, wide_mean, momentum);
                update_running<float>(u.running_var, u.running_type, c, unbiased, momentum);
            }
            if (u.batches && u.momentum >= 0 && c == 0) *(i64*)u.batches += 1;
        }
    } else {
        mean = load_any<real>(u.running_mean, u.running_type, c);
        inverse_deviation = 1 / sqrt(load_any<real>(u.running_var, u.running_type, c) + (real)u.eps);
    }
    real* affine = (real*)u.affine;
    affine[c] = mean;
    affine[u.channels + c] =
        u.weight ? load_any<real>(u.weight, u.parameter_type, c) * inverse_deviation : inverse_deviation;
    affine[2 * u.channels + c] = u.shift ? load_any<real>(u.shift, u.parameter_type, c) : real(0);
    affine[3 * u.channels + c] = inverse_deviation;
}

// From a channel's sums of grad_y and grad_y * (x - mean) to the gradients of weight and shift, and with `statistics`
// to the coefficients of normalise_backward; `sums`, where there are some, are those of all ranks.
template <class real>
DEVICE void finish_channel_gradients(const Unit& u, i64 c, const double* total) {
    if (u.grad_weight) {
        const real gradient = (real)total[1] * ((const real*)u.affine)[3 * u.channels + c];
        store_any(gradient, u.grad_weight, u.parameter_type, c);
    }
    if (u.grad_shift) store_any((real)total[0], u.grad_shift, u.parameter_type, c);
    if (!u.coefficients) return;
    const double *statistics = (const double*)u.statistics, *sums = (const double*)u.all_sums;
    const double share = (double)u.steps / statistics[u.channels];
    const double mean_grad = (sums ? sums[c] : total[0]) * share;
    const double slope_grad = (sums ? sums[u.channels + c] : total[1]) * share;
    ((real*)u.coefficients)[c] = (real)mean_grad;
    ((real*)u.coefficients)[u.channels + c] = (real)(slope_grad * statistics[c]);
}
#endif
