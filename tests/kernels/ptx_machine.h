// What PTX instructions compute, in C++ (PTX ISA 9): ptx_to_cpp.py makes one statement of every instruction, on registers
// that are bits. A block's threads are the fibres of cuda_shim.h. What a GPU would refuse ends the process with a message:
// accesses that are not aligned to their size, null pointers, divisions by nought, read-only loads of what the launch
// itself has written, warp operations of part of a warp.
#pragma once
#include "cuda_shim.h"
#undef __shared__

#include <bit>
#include <cfenv>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <unordered_set>

using u8 = unsigned char;
using s8 = signed char;
using u16 = unsigned short;
using s16 = short;
using u32 = unsigned;
using s32 = int;
using u64 = unsigned long long;
using s64 = long long;

namespace ptx {
using shim::fail;

// ---- registers
template <class T, class R>
T as(R bits) {  // the operand of type T that a register or a literal holds
    if constexpr (std::is_floating_point_v<T>) {
        static_assert(sizeof(T) == sizeof(R));
        return std::bit_cast<T>(bits);
    } else return (T)bits;
}
template <class R, class T>
void put(R& to, T value) {  // narrower integers are extended by their sign
    if constexpr (std::is_floating_point_v<T>) {
        static_assert(sizeof(T) == sizeof(R));
        to = std::bit_cast<R>(value);
    } else to = (R)value;
}

// ---- memory
alignas(256) inline u8 shared_memory[1 << 17];  // of the block that runs
inline std::unordered_set<u64> written;         // pairs of bytes that this launch has stored
inline bool watch_writes = false;               // a module with read-only loads

inline void check(u64 address, u64 size) {
    if (address < 4096) fail("an access to a null pointer");
    if (address % size) fail("an access that is not aligned to its size");
}
template <class T>
T load(u64 address) {
    T value;
    std::memcpy(&value, (const void*)address, sizeof(T));
    return value;
}
template <class T>
T load_read_only(u64 address) {
    if (written.count(address / 2)) fail("a read-only load of what the same launch has written");
    return load<T>(address);
}
template <class T>
void store(u64 address, T value) { std::memcpy((void*)address, &value, sizeof(T)); }
template <class T>
void store_global(u64 address, T value) {
    if (watch_writes)
        for (u64 i = 0; i < (sizeof(T) + 1) / 2; i++) written.insert(address / 2 + i);
    store<T>(address, value);
}
template <class T, class Change>
T atomic(u64 address, Change change) {  // threads take turns: nothing comes between
    check(address, sizeof(T));
    T before = load<T>(address);
    store<T>(address, change(before));
    return before;
}

// ---- floating point
template <bool FTZ>
float fz(float x) { return FTZ && std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
template <bool FTZ>
double fz(double x) {
    static_assert(!FTZ);
    return x;
}
template <class T>
T saturate(T x) { return x > 0 ? (x < 1 ? x : T(1)) : T(0); }  // NaN becomes 0
template <int MODE, class T>
__attribute__((noinline)) T fma_rounded(volatile T a, volatile T b, volatile T c) {
    const int before = std::fegetround();
    std::fesetround(MODE);
    volatile T result = std::fma(a, b, c);
    std::fesetround(before);
    return result;
}
template <class T>
T minimum(T a, T b) {  // -0 is less than 0; of NaN and a number, the number
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T maximum(T a, T b) {
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) ? b : a;
    return a > b || (a == b && std::signbit(b)) ? a : b;
}
template <class To, class From>
To to_integer(From rounded) {  // beyond the range: its end; NaN: 0, or the highest bit alone where 64 bits are involved
    using Limits = std::numeric_limits<To>;
    if (std::isnan(rounded)) return sizeof(From) == 8 || sizeof(To) == 8 ? (To)(1ull << (sizeof(To) * 8 - 1)) : To(0);
    if (rounded < (From)Limits::min()) return Limits::min();
    if (rounded >= std::ldexp(From(1), Limits::digits)) return Limits::max();
    return (To)rounded;
}
inline float from_f16(u16 bits) { return (float)std::bit_cast<_Float16>(bits); }
inline u16 to_f16(float x) { return std::isnan(x) ? 0x7fff : std::bit_cast<u16>((_Float16)x); }
inline float from_bf16(u16 bits) { return std::bit_cast<float>((u32)bits << 16); }
inline u16 to_bf16(float x) {
    const u32 bits = std::bit_cast<u32>(x);
    return std::isnan(x) ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- integers
template <class T>
T shift_left(T a, u32 n) { return n >= sizeof(T) * 8 ? T(0) : (T)(a << n); }
template <class T>
T shift_right(T a, u32 n) {
    const u32 most = sizeof(T) * 8 - 1;
    return n > most ? (std::is_signed_v<T> ? (T)(a >> most) : T(0)) : (T)(a >> n);
}
inline u32 funnel(u32 low, u32 high, u32 n, bool left, bool wrap) {
    const u64 both = (u64)high << 32 | low;
    n = wrap ? n & 31 : (n > 32 ? 32 : n);
    return left ? (u32)(n == 0 ? high : both >> (32 - n)) : (u32)(both >> n);
}
template <class T>
T divide(T a, T b) {
    if (b == 0) fail("a division by nought");
    return std::is_signed_v<T> && b == T(-1) ? (T)(0 - (u64)a) : (T)(a / b);
}
template <class T>
T remainder(T a, T b) {
    if (b == 0) fail("a division by nought");
    return std::is_signed_v<T> && b == T(-1) ? T(0) : (T)(a % b);
}
template <class T>
T multiply_high(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return (T)((Wide)a * (Wide)b >> (sizeof(T) * 8));
}
template <class T>
T extract(T a, u32 position, u32 length) {  // bfe
    position &= 255, length &= 255;
    T field = 0;
    const u32 bits = sizeof(T) * 8, last = position + length - 1 < bits ? position + length - 1 : bits - 1;
    const bool sign = std::is_signed_v<T> && length && (a >> last & 1);
    for (u32 i = 0; i < bits; i++) {
        const bool bit = i < length && position + i < bits ? (a >> (position + i) & 1) : sign;
        field |= (T)((u64)bit << i);
    }
    return field;
}
template <class T>
T insert(T a, T b, u32 position, u32 length) {  // bfi
    position &= 255, length &= 255;
    for (u32 i = 0; i < length && position + i < sizeof(T) * 8; i++) {
        const u32 at = position + i;
        b = (T)((b & ~(T(1) << at)) | ((a >> i & 1) << at));
    }
    return b;
}
inline u32 permute(u32 a, u32 b, u32 selector) {  // prmt
    const u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 select = selector >> (4 * i) & 15;
        u32 byte = (u32)(both >> (8 * (select & 7))) & 255;
        if (select & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline u32 logic(u32 a, u32 b, u32 c, u32 table) {  // lop3
    u32 result = 0;
    for (u32 row = 0; row < 8; row++)
        if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    return result;
}
template <class T>
T reverse(T a) {
    T result = 0;
    for (u32 i = 0; i < sizeof(T) * 8; i++) result |= (a >> i & 1) << (sizeof(T) * 8 - 1 - i);
    return result;
}

// ---- warps: every lane posts a word, and all go on when all have
struct Lanes {
    const u32* words;
    u32 operator[](u32 lane) const { return words[lane]; }
};
inline u32 posted[2][1024];
inline u8 turn[1024];

inline Lanes exchange(u32 word, u32 mask, int instruction) {
    if (mask != ~0u) fail("an operation of part of a warp");
    const u32 me = shim::current, slot = turn[me]++ & 1;
    posted[slot][me] = word;
    shim::wait(2 + instruction);
    return {posted[slot] + me / 32 * 32};
}
inline u32 ballot(bool predicate, u32 mask, int instruction) {
    const Lanes lanes = exchange(predicate, mask, instruction);
    u32 word = 0;
    for (u32 lane = 0; lane < 32; lane++) word |= lanes[lane] << lane;
    return word;
}
enum Shuffle { up, down, bfly, idx };
inline u32 shuffle(Shuffle mode, u32 a, u32 b, u32 c, u32 mask, int instruction, bool& inside) {
    const Lanes lanes = exchange(a, mask, instruction);
    const u32 lane = shim::current % 32, segment = c >> 8 & 31, clamp = c & 31, shift = b & 31;
    const int last = (int)((lane & segment) | (clamp & ~segment)), first = (int)(lane & segment);
    int from = 0;
    if (mode == up) from = (int)lane - (int)shift, inside = from >= last;
    else if (mode == down) from = (int)lane + (int)shift, inside = from <= last;
    else if (mode == bfly) from = (int)(lane ^ shift), inside = from <= last;
    else from = first | (int)(shift & ~segment), inside = from <= last;
    return lanes[inside ? (u32)from : lane];
}
template <class T, class Join>
T reduce(T value, u32 mask, int instruction, Join join) {
    const Lanes lanes = exchange((u32)value, mask, instruction);
    T total = (T)lanes[0];
    for (u32 lane = 1; lane < 32; lane++) total = join(total, (T)lanes[lane]);
    return total;
}

// ---- launches
template <int SIZE, int ALIGNMENT>
struct Bytes { alignas(ALIGNMENT) u8 bytes[SIZE]; };

template <class Kernel>
void launch(int columns, int rows, unsigned threads, unsigned shared_bytes, bool watch, Kernel kernel) {
    watch_writes = watch;
    written.clear();
    shim::run_grid(columns, rows, threads, [=] {
        if (threadIdx.x == 0) std::memset(shared_memory, 0xff, shared_bytes);  // NaN, not what the block before left
        kernel();
    });
}
}  // namespace ptx
