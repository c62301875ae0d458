// The CUDA built-ins that the kernels use, for a CPU: a block's threads are fibres that take turns at every barrier,
// ballot and shuffle, so the GPU's drivers run here line by line. Barriers that not all threads reach, and ballots of incomplete
// warps, end the process with a message.
#pragma once
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define CUDA_SHIM 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace shim {
struct Index { unsigned x, y, z; };
struct Fibre {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    int waiting = 0;   // 1 at a barrier, 2 at a ballot or shuffle
    unsigned votes[2] = {0, 0}, turn = 0;
};
inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void fail(const char* what) {
    std::fprintf(stderr, "cuda shim: %s\n", what);
    std::abort();
}
inline void wait(int kind) {
    fibres[current].waiting = kind;
    const unsigned me = current;
    swapcontext(&fibres[me].context, &scheduler);
}
inline void enter() {
    body();
    fibres[current].done = true;
    swapcontext(&fibres[current].context, &scheduler);
}
}  // namespace shim

inline shim::Index threadIdx, blockIdx, gridDim, blockDim;

inline void __syncthreads() { shim::wait(1); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    if (mask != ~0u) shim::fail("a ballot of part of a warp");
    shim::Fibre& own = shim::fibres[shim::current];
    const unsigned turn = own.turn++ % 2, warp = shim::current / 32 * 32;
    own.votes[turn] = predicate != 0;
    shim::wait(2);
    unsigned word = 0;
    for (unsigned lane = 0; lane < 32; lane++) word |= shim::fibres[warp + lane].votes[turn] << lane;
    return word;
}

inline unsigned __shfl_xor_sync(unsigned mask, unsigned value, int distance) {
    if (mask != ~0u) shim::fail("a shuffle of part of a warp");
    shim::Fibre& own = shim::fibres[shim::current];
    const unsigned turn = own.turn++ % 2, lane = shim::current % 32;
    own.votes[turn] = value;
    shim::wait(2);
    return shim::fibres[shim::current - lane + (lane ^ distance)].votes[turn];
}

namespace shim {
inline void run_block(unsigned threads) {
    fibres.clear();
    fibres.resize(threads);
    for (unsigned t = 0; t < threads; t++) {
        Fibre& fibre = fibres[t];
        fibre.stack.resize(1 << 16);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = &scheduler;
        makecontext(&fibre.context, (void (*)())enter, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (unsigned t = 0; t < threads; t++) {
            if (fibres[t].done) continue;
            alive = true;
            current = t;
            threadIdx = {t, 0, 0};
            fibres[t].waiting = 0;
            swapcontext(&scheduler, &fibres[t].context);
        }
        // every barrier must be reached by the whole block, every ballot by the whole warp
        bool barrier = false;
        for (Fibre& f : fibres) barrier = barrier || (!f.done && f.waiting == 1);
        for (unsigned t = 0; t < threads; t++) {
            if (barrier && (fibres[t].done || fibres[t].waiting != 1)) fail("a barrier that some threads miss");
            const Fibre& first = fibres[t / 32 * 32];
            if (first.done != fibres[t].done || first.waiting != fibres[t].waiting) fail("a warp that diverges at a ballot");
        }
    }
}
// Runs the blocks from the first to the last, in the order of their numbers.
inline void run_blocks(unsigned columns, unsigned rows, unsigned threads, unsigned first, unsigned last,
                       std::function<void()> kernel) {
    body = std::move(kernel);
    gridDim = {columns, rows, 1};
    blockDim = {threads, 1, 1};
    for (unsigned block = first; block <= last; block++) {
        blockIdx = {block % columns, block / columns, 0};
        run_block(threads);
    }
}
inline void run_grid(unsigned columns, unsigned rows, unsigned threads, std::function<void()> kernel) {
    run_blocks(columns, rows, threads, 0, columns * rows - 1, std::move(kernel));
}
}  // namespace shim
