// From scores z = q.k to weights, and their derivative: what tells the softmax from the expressive score.
//
// Lanes are queries, so a row's maximum and sum are plain vector operations.
// arXiv 2407.18601: expressive weights are z^2 / (1 + z^2), normalised; they need no exponential and no maximum.

namespace BA_ISA {
namespace {

enum { FREE, EDGE, HIDING, BIASED };  // what restricts a block: nothing, causality alone, a tile, a tile with biases

// What causality leaves of a block. The tile knows nothing of it.
struct Edge {
    bool any;       // whether it hides anything here
    int32_t query;  // the first lane's place among the block's keys: lane i sees keys s with 0 <= query + i - s < width
    uint32_t width;
};

static Edge edge_of(const Restriction& r, int64_t query, int64_t last, int64_t s0, int64_t n) {
    Edge e = {};
    if (!r.causal) return e;
    const int64_t here = query + r.offset;
    e.any = here < s0 + n - 1 || (r.window && last + r.offset - r.window >= s0);
    e.query = static_cast<int32_t>(here - s0);
    e.width = r.window ? static_cast<uint32_t>(r.window) : 0x7fffffffu;
    return e;
}

BA_INLINE I within(I query, int64_t s, uint32_t width) {  // a negative distance is a large unsigned one
    return reinterpret_cast<I>(reinterpret_cast<U>(query - static_cast<int32_t>(s)) < width);
}

constexpr float FAR_SQUARE = 2.126764793255866e37f;  // 2^124: beyond, a weight is 1, its slope 0, and inf / inf must not arise

// From here on a key has all the weight of its row, but for rounding. Of the two terms of its derivative nothing is left
// then: they come from different sums, and what rounding leaves of them would be multiplied by 1 / z.
constexpr float ALL = 1.0f - 4.76837158203125e-7f;  // 2^-21

// Below this a row's sum of z^2 has lost digits to underflow: the row is computed again in double precision.
constexpr float FAINT = 1e-24f;

// One block of scores z[s][lane] of n keys: replaced by weights, before normalisation. total and shift
// (LANES * NV each) are the rows' running sums and the constant taken out of their exponents; `rescale` says by what
// earlier sums have to be multiplied. Returns whether any has to be.
template <int NV, int SCORE, int MODE>
BA_INLINE bool weigh(
    float* z, int64_t n, int64_t pitch, const float* tile, const Edge& edge, float* total, float* shift, float* rescale) {
    constexpr bool EXPONENT = SCORE == BA_SOFTMAX || MODE == BIASED;
    V sum[NV], low[NV], top[NV];
    I query[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        sum[v] = V{};
        low[v] = fill(0.0f);
        query[v] = first_lanes() + static_cast<int32_t>(edge.query + v * LANES);
    }
    bool changed = false;
    if constexpr (EXPONENT) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) top[v] = load(shift + v * LANES);
        for (int64_t s = 0; s < n; ++s)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                V x;
                if constexpr (SCORE == BA_SOFTMAX) {
                    x = load(z + s * pitch + v * LANES);
                    if constexpr (MODE >= HIDING) x += load(tile + s * pitch + v * LANES);
                } else {
                    x = load(tile + s * pitch + v * LANES);
                }
                if (MODE == EDGE || (MODE >= HIDING && edge.any))
                    x = select(within(query[v], s, edge.width), x, fill(-INF));
                if constexpr (SCORE == BA_SOFTMAX && MODE != FREE) store(z + s * pitch + v * LANES, x);
                top[v] = larger(x, top[v]);
            }
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const V before = load(shift + v * LANES);
            // A row that has seen no key yet has shift -inf and nothing to rescale.
            const V old = select(before == -INF, V{}, before);
            low[v] = select(top[v] == -INF, V{}, top[v]);
            const V factor = exp_of(old - low[v]);
            const I moved = (top[v] != before) & (before != -INF);
            changed |= any(moved);
            store(rescale + v * LANES, select(moved, factor, fill(1.0f)));
            store(shift + v * LANES, top[v]);
        }
    }
    for (int64_t s = 0; s < n; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            float* p = z + s * pitch + v * LANES;
            V w = load(p);
            if constexpr (SCORE == BA_SOFTMAX) {
                w = exp_of(w - low[v]);
            } else {
                if (MODE == EDGE || (MODE >= HIDING && edge.any))
                    w = select(within(query[v], s, edge.width), w, V{});
                V bias;
                if constexpr (MODE >= HIDING) {
                    bias = load(tile + s * pitch + v * LANES);
                    w = select(bias == -INF, V{}, w);  // z = 0 is weight 0
                }
                const V square = at_most(FAR_SQUARE, w * w);
                w = square * reciprocal(1.0f + square);
                if constexpr (MODE == BIASED) w *= exp_of(bias - low[v]);
            }
            sum[v] += w;
            store(p, w);
        }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        V t = load(total + v * LANES);
        if constexpr (EXPONENT) t *= load(rescale + v * LANES);
        store(total + v * LANES, t + sum[v]);
    }
    return changed;
}

// Backwards: scores z and dp[s][lane] = dL/dw become the normalised weights and dL/d(q.k). `inverse` is 1 / normaliser
// (0 for rows without weight), delta the normaliser's share, sum over keys of w dL/dw.
template <int NV, int SCORE, int MODE>
BA_INLINE void slope(
    float* z, float* dp, int64_t n, int64_t pitch, const float* tile, const Edge& edge, const float* inverse,
    const float* shift, const float* delta, float scale) {
    V inv[NV], low[NV], del[NV];
    I query[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        inv[v] = load(inverse + v * LANES);
        low[v] = load(shift + v * LANES);
        del[v] = load(delta + v * LANES);
        query[v] = first_lanes() + static_cast<int32_t>(edge.query + v * LANES);
    }
    for (int64_t s = 0; s < n; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            float* pz = z + s * pitch + v * LANES;
            float* pd = dp + s * pitch + v * LANES;
            V x = load(pz), bias = {};
            I hidden = {};
            if (MODE == EDGE || (MODE >= HIDING && edge.any))
                hidden = ~within(query[v], s, edge.width);
            if constexpr (MODE >= HIDING) {
                bias = load(tile + s * pitch + v * LANES);
                hidden |= bias == -INF;
            }
            const V g = (load(pd) - del[v]) * scale;
            if constexpr (SCORE == BA_SOFTMAX) {
                if constexpr (MODE == BIASED) x += bias;
                V w = exp_of(x - low[v]) * inv[v];
                if constexpr (MODE != FREE) w = select(hidden, V{}, w);
                store(pz, w);
                store(pd, select(w >= 1.0f, V{}, w * g));
            } else {
                if constexpr (MODE != FREE) x = select(hidden, V{}, x);
                const V square = at_most(FAR_SQUARE, x * x);
                const V r = reciprocal(1.0f + square);
                V factor = inv[v];
                if constexpr (MODE == BIASED) factor *= select(hidden, V{}, exp_of(bias - low[v]));
                const V w = square * r * factor;
                store(pz, w);
                // The slope falls with z^-3; a bounded square would leave it far too large for what it is multiplied by.
                store(pd, select((square >= FAR_SQUARE) | (w >= ALL), V{}, 2.0f * (x * r) * (r * factor)) * g);
            }
        }
}

}  // namespace
}  // namespace BA_ISA
