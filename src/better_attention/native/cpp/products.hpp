// Small matrix products with one operand in registers' width: the only inner loops there are.
//
//     C[r][lane] (+)= sum_k A(r, k) * B[k][lane]        A(r, k) = COLUMNS ? a[k * as + r] : a[r * as + k]
//
// A is read number by number and spread over the lanes, so it needs no packing and no particular width; B and C have
// NV vectors to a row. A tile of MR x NV sums stays in registers.

#include "lanes.hpp"

namespace BA_ISA {
namespace {

#if BA_LANES == 16 || defined(__aarch64__)
constexpr int tile_rows(int nv) { return nv >= 4 ? 6 : nv == 3 ? 8 : 12; }  // 32 registers
#else
constexpr int tile_rows(int nv) { return nv >= 2 ? 6 : 12; }  // 16 registers
#endif

template <int MR, int NV, bool COLUMNS>
BA_INLINE void tile(int64_t K, const float* a, int64_t as, const float* b, int64_t bs, float* c, int64_t cs, bool add) {
    V sum[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) sum[r][v] = V{};
#pragma GCC unroll 1
    for (int64_t k = 0; k < K; ++k) {
        V x[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) x[v] = load(b + k * bs + v * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r) {
            const float s = COLUMNS ? a[k * as + r] : a[r * as + k];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) sum[r][v] += x[v] * s;
        }
    }
    if (add) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                float* p = c + r * cs + v * LANES;
                store(p, load(p) + sum[r][v]);
            }
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) store(c + r * cs + v * LANES, sum[r][v]);
    }
}

// All rows: full tiles, then what is left in 4, 2 and 1.
template <int NV, bool COLUMNS>
static __attribute__((noinline)) void product(
    int64_t rows, int64_t K, const float* a, int64_t as, const float* b, int64_t bs, float* c, int64_t cs, bool add) {
    constexpr int MR = tile_rows(NV);
    const int64_t step = COLUMNS ? 1 : as;
    int64_t r = 0;
    for (; r + MR <= rows; r += MR) tile<MR, NV, COLUMNS>(K, a + r * step, as, b, bs, c + r * cs, cs, add);
    if constexpr (MR > 8)
        if (rows - r >= 8) {
            tile<8, NV, COLUMNS>(K, a + r * step, as, b, bs, c + r * cs, cs, add);
            r += 8;
        }
    if (rows - r >= 4) {
        tile<4, NV, COLUMNS>(K, a + r * step, as, b, bs, c + r * cs, cs, add);
        r += 4;
    }
    if (rows - r >= 2) {
        tile<2, NV, COLUMNS>(K, a + r * step, as, b, bs, c + r * cs, cs, add);
        r += 2;
    }
    if (rows - r >= 1) tile<1, NV, COLUMNS>(K, a + r * step, as, b, bs, c + r * cs, cs, add);
}

// The same for any number of vectors in a row of B and C, in panels of at most BA_WIDE.
template <bool COLUMNS>
static void wide_product(
    int64_t vectors, int64_t rows, int64_t K, const float* a, int64_t as, const float* b, int64_t bs, float* c,
    int64_t cs, bool add) {
    for (int64_t v = 0; v < vectors;) {
        const int64_t left = vectors - v;
        const float* bv = b + v * LANES;
        float* cv = c + v * LANES;
#if BA_WIDE == 4
        if (left >= 4 && left != 5) {
            product<4, COLUMNS>(rows, K, a, as, bv, bs, cv, cs, add);
            v += 4;
            continue;
        }
        if (left >= 3) {  // five as three and two
            product<3, COLUMNS>(rows, K, a, as, bv, bs, cv, cs, add);
            v += 3;
            continue;
        }
#endif
        if (left >= 2) {
            product<2, COLUMNS>(rows, K, a, as, bv, bs, cv, cs, add);
            v += 2;
        } else {
            product<1, COLUMNS>(rows, K, a, as, bv, bs, cv, cs, add);
            v += 1;
        }
    }
}

// One square of turn_rows: rows of which n are there and `width` columns, LANES of each if WHOLE.
template <bool BF16, bool WHOLE>
BA_INLINE void turn_square(
    const void* rows, int64_t stride, int64_t n, int64_t width, float factor, float* out, int64_t pitch) {
    V x[BA_LANES];
    if constexpr (WHOLE) {
#pragma GCC unroll 16
        for (int r = 0; r < BA_LANES; ++r)
            x[r] = factor * (BF16 ? load_bf16(static_cast<const uint16_t*>(rows) + r * stride)
                                  : load(static_cast<const float*>(rows) + r * stride));
        turn_over<1>(x);
#pragma GCC unroll 16
        for (int r = 0; r < BA_LANES; ++r) store(out + r * pitch, x[r]);
    } else {
        for (int64_t r = 0; r < LANES; ++r)
            x[r] = r < n ? factor * load_row({shifted(rows, r * stride, BF16), BF16}, 0, width) : V{};
        turn_over<1>(x);
        for (int64_t r = 0; r < (width < LANES ? width : LANES); ++r) store(out + r * pitch, x[r]);
    }
}

template <bool BF16>
BA_INLINE void turn_rows_of(
    const void* rows, int64_t stride, int64_t n, int64_t width, float factor, float* out, int64_t pitch) {
    for (int64_t i = 0; i < width; i += LANES)
        for (int64_t lane = 0; lane < pitch; lane += LANES) {
            const void* from = shifted(rows, lane * stride + i, BF16);
            float* to = out + i * pitch + lane;
            if (lane + LANES <= n && i + LANES <= width)
                turn_square<BF16, true>(from, stride, LANES, LANES, factor, to, pitch);
            else
                turn_square<BF16, false>(from, stride, n - lane, width - i, factor, to, pitch);
        }
}

// Up to n rows of `width` numbers, times `factor`, turned over: out[i][lane] = factor * row(lane)[i], zeros in lanes
// beyond n. `pitch` is the length of a row of out, in floats, a multiple of LANES.
static void turn_rows(Row rows, int64_t stride, int64_t n, int64_t width, float factor, float* out, int64_t pitch) {
    if (rows.bf16) turn_rows_of<true>(rows.p, stride, n, width, factor, out, pitch);
    else turn_rows_of<false>(rows.p, stride, n, width, factor, out, pitch);
}

// The way back: row(lane)[i] = in[i][lane] * by[lane] for lanes below n.
static void turn_back(
    const float* in, int64_t pitch, const float* by, void* rows, bool bf16, int64_t stride, int64_t n, int64_t width) {
    for (int64_t lane = 0; lane < n; lane += LANES)
        for (int64_t i = 0; i < width; i += LANES) {
            V x[BA_LANES];
            const V factor = load(by + lane);
            const float* from = in + i * pitch + lane;
            void* to = shifted(rows, lane * stride + i, bf16);
            if (!bf16 && lane + LANES <= n && i + LANES <= width) {
#pragma GCC unroll 16
                for (int r = 0; r < BA_LANES; ++r) x[r] = load(from + r * pitch) * factor;
                turn_over<1>(x);
#pragma GCC unroll 16
                for (int r = 0; r < BA_LANES; ++r) store(static_cast<float*>(to) + r * stride, x[r]);
            } else {
                for (int64_t r = 0; r < LANES; ++r) x[r] = i + r < width ? load(from + r * pitch) * factor : V{};
                turn_over<1>(x);
                for (int64_t r = 0; r < LANES && lane + r < n; ++r)
                    store_row(shifted(to, r * stride, bf16), bf16, 0, x[r], width - i);
            }
        }
}

// Asks for n rows that will be needed soon, into the cache of that level. Without, a head of a few dozen rows in a
// tensor of many heads waits for memory at every row.
template <int LEVEL> BA_INLINE void soon(const void* rows, int64_t stride, int64_t n, int64_t bytes) {
    for (int64_t r = 0; r < n; ++r)
        for (int64_t i = 0; i < bytes; i += 64)
            __builtin_prefetch(static_cast<const char*>(rows) + r * stride + i, 0, 4 - LEVEL);
}

// n rows as floats, `pitch` apart, zeros behind `width`.
static void copy_rows(Row rows, int64_t stride, int64_t n, int64_t width, float* out, int64_t pitch) {
    for (int64_t r = 0; r < n; ++r) {
        const Row row = {shifted(rows.p, r * stride, rows.bf16), rows.bf16};
        for (int64_t i = 0; i < pitch; i += LANES) {
            const int64_t part = width - i;
            store(out + r * pitch + i, part > 0 ? load_row(row, i, part) : V{});
        }
    }
}

}  // namespace
}  // namespace BA_ISA
