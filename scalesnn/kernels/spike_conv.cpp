// Convolutions of spikes on the CPU: sums are looked up instead of multiplied.
//
// What four spikes add to an output is one of the 16 sums of their four weights. A table holds these sums for 32 spikes
// (8 groups of four) and WIDTH outputs: 16 KB, which stay in the first cache while many outputs are made with them, eight
// additions of a vector each where a product takes 32 (the "four Russians" of Arlazarov, Dinic, Kronrod and Faradzhev
// 1970). The forward pass looks weights up by the bits of 32 channels; the weight's gradient looks gradients up by the
// bits of 32 positions.
//
// Images are channels_last. Spikes are bits, 32 channels a word, in the order of memory: [positions][channels / 32].
// y and its gradient are [positions][outputs]; the weight has any strides. channels and outputs are multiples of 32.

#include <cstring>
#include <vector>

typedef long long i64;
typedef unsigned long long u64;

constexpr int WIDTH = 32;          // outputs at a time
constexpr int SPIKES = 32;         // of a table: one word
constexpr int GROUP = 4, SUMS = 16, GROUPS = SPIKES / GROUP;
constexpr i64 TILE = 1024;         // output positions that share a table in the forward pass: y stays in the second cache

struct Convolution {
    i64 images, height, width, channels, outputs, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
    i64 dilation_h, dilation_w, out_height, out_width;
    i64 weight_o, weight_c, weight_h, weight_w;  // the weight's strides

    i64 words() const { return channels / SPIKES; }  // of a position
    i64 taps() const { return kernel_h * kernel_w; }
    i64 blocks() const { return outputs / WIDTH; }
    i64 positions() const { return images * out_height * out_width; }
    i64 tap_offset(i64 tap) const { return tap / kernel_w * weight_h + tap % kernel_w * weight_w; }
};

template <class real> struct Vector;  // the compiler makes what the processor has of it
template <> struct Vector<float> { typedef float type __attribute__((vector_size(64), aligned(4), may_alias)); };
template <> struct Vector<double> { typedef double type __attribute__((vector_size(64), aligned(8), may_alias)); };

template <class real> struct alignas(64) Table { real sums[GROUPS][SUMS][WIDTH]; };

// The sums of every group of four of 32 rows: each is the one without its lowest bit, and that bit's row. Zero times
// every row is in all of them, so that NaN and inf spread as in products.
template <class real>
static void fill(Table<real>& table, const real (*rows)[WIDTH]) {
    for (int group = 0; group < GROUPS; group++) {
        const real(*row)[WIDTH] = rows + group * GROUP;
        real(*sums)[WIDTH] = table.sums[group];
        for (int l = 0; l < WIDTH; l++) {
            real sum[SUMS] = {};
            _Pragma("GCC unroll 4")
            for (int bit = 0; bit < GROUP; bit++) sum[0] += row[bit][l] * 0;
            _Pragma("GCC unroll 16")
            for (int s = 1; s < SUMS; s++) sum[s] = sum[s & (s - 1)] + row[__builtin_ctz(s)][l];
            _Pragma("GCC unroll 16")
            for (int s = 0; s < SUMS; s++) sums[s][l] = sum[s];
        }
    }
}

// total += the sums that the bits of `word` choose
template <class real>
static inline void look_up(const Table<real>& table, unsigned word, real* total) {
    typedef typename Vector<real>::type vector;
    constexpr int parts = WIDTH * sizeof(real) / sizeof(vector), shift = sizeof(real) == 4 ? 7 : 8;
    static_assert(WIDTH * sizeof(real) == 1 << shift, "the bytes of a row of sums");
    vector* out = (vector*)total;
    vector sum[parts];
    for (int part = 0; part < parts; part++) sum[part] = out[part];
    const char* group = (const char*)table.sums;
    const u64 offsets = (u64)word << shift;  // four bits of it, masked, are the offset of a row of sums
    _Pragma("GCC unroll 8")
    for (int g = 0; g < GROUPS; g++, group += sizeof(table.sums[0])) {
        const vector* row = (const vector*)(group + (offsets >> (GROUP * g) & (u64)(SUMS - 1) << shift));
        for (int part = 0; part < parts; part++) sum[part] += row[part];
    }
    for (int part = 0; part < parts; part++) out[part] = sum[part];
}

// ------------------------------------------------------------------------------------------------ forward
// y of WIDTH outputs for the rows `first` to `last` of all images' rows.
template <class real>
static void forward_rows(const Convolution& c, i64 first, i64 last, i64 block, const unsigned* bits, const real* weight,
                         const real* bias, real* y) {
    Table<real> table;
    alignas(64) real rows[SPIKES][WIDTH];
    std::vector<i64> from((last - first) * c.out_width), to(from.size());  // words of bits, elements of y
    const i64 start = block * WIDTH;
    for (i64 p = first * c.out_width; p < last * c.out_width; p++)
        for (int l = 0; l < WIDTH; l++) y[p * c.outputs + start + l] = bias ? bias[start + l] : real(0);
    for (i64 tap = 0; tap < c.taps(); tap++) {
        const i64 down = tap / c.kernel_w * c.dilation_h - c.padding_h, right = tap % c.kernel_w * c.dilation_w - c.padding_w;
        int count = 0;
        for (i64 row = first; row < last; row++) {
            const i64 image = row / c.out_height, h = row % c.out_height * c.stride_h + down;
            if (h < 0 || h >= c.height) continue;
            for (i64 column = 0; column < c.out_width; column++) {
                const i64 w = column * c.stride_w + right;
                if (w < 0 || w >= c.width) continue;
                from[count] = ((image * c.height + h) * c.width + w) * c.words();
                to[count++] = (row * c.out_width + column) * c.outputs + start;
            }
        }
        for (i64 word = 0; count > 0 && word < c.words(); word++) {
            const real* of_word = weight + start * c.weight_o + word * SPIKES * c.weight_c + c.tap_offset(tap);
            for (int l = 0; l < WIDTH; l++)
                for (int s = 0; s < SPIKES; s++) rows[s][l] = of_word[l * c.weight_o + s * c.weight_c];
            fill(table, rows);
            for (int k = 0; k < count; k++) look_up(table, bits[from[k] + word], y + to[k]);
        }
    }
}

template <class real>
static void forward(const Convolution& c, int threads, const unsigned* bits, const real* weight, const real* bias, real* y) {
    const i64 rows = c.images * c.out_height, at_a_time = c.out_width < TILE ? TILE / c.out_width : 1;
    const i64 tiles = (rows + at_a_time - 1) / at_a_time;
    _Pragma("omp parallel for collapse(2) schedule(dynamic) num_threads(threads)")
    for (i64 tile = 0; tile < tiles; tile++)
        for (i64 block = 0; block < c.blocks(); block++) {
            const i64 first = tile * at_a_time, last = first + at_a_time < rows ? first + at_a_time : rows;
            forward_rows(c, first, last, block, bits, weight, bias, y);
        }
}

// ------------------------------------------------------------------------------------------------ the weight's gradient
// The bits under every tap of 32 output positions from `first` on, turned: in turned[s][m] the bits of the 32 positions for
// channel s of the m-th word, words of a tap together.
static void turn(const Convolution& c, i64 first, const unsigned* bits, unsigned* turned) {
    const i64 matrices = c.taps() * c.words();
    for (i64 q = 0; q < SPIKES; q++) {
        const i64 position = first + q, row = position / c.out_width, image = row / c.out_height;
        for (i64 tap = 0; tap < c.taps(); tap++) {
            const i64 h = row % c.out_height * c.stride_h + tap / c.kernel_w * c.dilation_h - c.padding_h;
            const i64 w = position % c.out_width * c.stride_w + tap % c.kernel_w * c.dilation_w - c.padding_w;
            const bool inside = position < c.positions() && h >= 0 && h < c.height && w >= 0 && w < c.width;
            unsigned* out = turned + q * matrices + tap * c.words();
            const unsigned* in = bits + ((image * c.height + h) * c.width + w) * c.words();
            for (i64 word = 0; word < c.words(); word++) out[word] = inside ? in[word] : 0;
        }
    }
    unsigned mask = 0x0000ffff;  // the transpose of 32 x 32 bits by halves (Warren, Hacker's Delight), all matrices at once
    for (int half = 16; half; half >>= 1, mask ^= mask << half)
        for (int s = 0; s < SPIKES; s = ((s | half) + 1) & ~half) {
            unsigned *a = turned + s * matrices, *b = turned + (s | half) * matrices;
            for (i64 m = 0; m < matrices; m++) {
                const unsigned swapped = ((a[m] >> half) ^ b[m]) & mask;
                a[m] ^= swapped << half, b[m] ^= swapped;
            }
        }
}

template <class real>
static void weight_gradient(const Convolution& c, int threads, i64 at_a_time, const unsigned* bits, const real* grad,
                            real* grad_weight, unsigned* turned, real* sums) {
    const i64 matrices = c.taps() * c.words(), inputs = matrices * SPIKES, positions = c.positions();
    const i64 wanted = (2 * threads + c.blocks() - 1) / c.blocks(), parts = wanted < matrices ? wanted : matrices;
    _Pragma("omp parallel num_threads(threads)")
    for (i64 slab = 0; slab < positions; slab += at_a_time) {
        const i64 left = positions - slab < at_a_time ? positions - slab : at_a_time, tiles = (left + SPIKES - 1) / SPIKES;
        _Pragma("omp for schedule(static)")
        for (i64 tile = 0; tile < tiles; tile++) turn(c, slab + tile * SPIKES, bits, turned + tile * inputs);
        _Pragma("omp for collapse(2) schedule(dynamic)")
        for (i64 block = 0; block < c.blocks(); block++)
            for (i64 part = 0; part < parts; part++) {
                const i64 start = part * matrices / parts, end = (part + 1) * matrices / parts;
                real* total = sums + block * inputs * WIDTH;
                if (slab == 0) memset(total + start * SPIKES * WIDTH, 0, (end - start) * SPIKES * WIDTH * sizeof(real));
                Table<real> table;
                alignas(64) real rows[SPIKES][WIDTH];
                for (i64 tile = 0; tile < tiles; tile++) {
                    for (i64 q = 0; q < SPIKES; q++) {
                        const i64 position = slab + tile * SPIKES + q;
                        if (position < positions) memcpy(rows[q], grad + position * c.outputs + block * WIDTH, sizeof(rows[q]));
                        else memset(rows[q], 0, sizeof(rows[q]));
                    }
                    fill(table, rows);
                    const unsigned* words = turned + tile * inputs;
                    for (i64 m = start; m < end; m++)
                        for (i64 s = 0; s < SPIKES; s++)
                            look_up(table, words[s * matrices + m], total + (m * SPIKES + s) * WIDTH);
                }
                if (slab + at_a_time < positions) continue;
                for (i64 m = start; m < end; m++) {
                    const i64 word = m % c.words() * SPIKES * c.weight_c + c.tap_offset(m / c.words());
                    for (i64 l = 0; l < WIDTH; l++)
                        for (i64 s = 0; s < SPIKES; s++)
                            grad_weight[(block * WIDTH + l) * c.weight_o + word + s * c.weight_c] =
                                total[(m * SPIKES + s) * WIDTH + l];
                }
            }
    }
}

// Entry points.
extern "C" void forward(int is_double, int threads, const Convolution* c, const unsigned* bits, const void* weight,
                        const void* bias, void* y) {
    if (is_double) forward(*c, threads, bits, (const double*)weight, (const double*)bias, (double*)y);
    else forward(*c, threads, bits, (const float*)weight, (const float*)bias, (float*)y);
}

// The bits of `at_a_time` output positions, a multiple of 32, are turned at a time: `turned` has room for the words of
// kernel * channels spikes of each 32 of them, `sums` for the weight.
extern "C" void weight_gradient(int is_double, int threads, const Convolution* c, i64 at_a_time, const unsigned* bits,
                                const void* grad, void* grad_weight, unsigned* turned, void* sums) {
    if (is_double)
        weight_gradient(*c, threads, at_a_time, bits, (const double*)grad, (double*)grad_weight, turned, (double*)sums);
    else weight_gradient(*c, threads, at_a_time, bits, (const float*)grad, (float*)grad_weight, turned, (float*)sums);
}
