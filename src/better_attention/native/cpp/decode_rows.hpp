// What decoding does with LANES rows of the cache: multiply keys with a query, add weighted values to a sum.
//
// Sums stay in registers for all of the rows. With each vector that is read one cache line is asked for elsewhere, so
// that requests to memory are spread evenly over the work.

namespace BA_ISA {
namespace {

constexpr int PIECE = 4;  // vectors of a row in registers at a time

constexpr int INT8 = -1;  // beside BA_F32 and BA_BF16: numbers of a cache that has a scale for each row

constexpr int CODES = -2;  // the same by products of integers

constexpr int64_t bytes_of(int type) { return type == BA_F32 ? 4 : type == BA_BF16 ? 2 : 1; }

template <int TYPE> BA_INLINE V load_whole(const char* row, int64_t i) {
    if constexpr (TYPE == BA_F32) return load(reinterpret_cast<const float*>(row) + i);
    else if constexpr (TYPE == BA_BF16) return load_bf16(reinterpret_cast<const uint16_t*>(row) + i);
    else return load_int8(reinterpret_cast<const int8_t*>(row) + i);
}

template <int TYPE> BA_INLINE V load_piece(const char* row, int64_t i, int64_t n) {  // n of LANES, zeros behind
    if (n >= LANES) return load_whole<TYPE>(row, i);
    if constexpr (TYPE != INT8) {
        return load_row({row, TYPE == BA_BF16}, i, n);
    } else {
        V x = {};
        for (int64_t j = 0; j < n; ++j) x[j] = static_cast<float>(reinterpret_cast<const int8_t*>(row)[i + j]);
        return x;
    }
}

constexpr int64_t LINE = 64;  // bytes that come from memory together

// Into the second-level cache: what is asked for lies up to a row of all heads and LANES keys ahead, which would push out
// of the first what is still to be read there.
BA_INLINE void ask(const char* p) { __builtin_prefetch(p, 0, 2); }

// Which of LANES rows are asked for: products take the even ones and values the odd ones where both read the same.
enum { ASK_NONE, ASK_EVEN, ASK_ODD, ASK_ALL };

BA_INLINE bool is_asked(int which, int64_t j, int64_t byte) {
    return (which >> j % 2 & 1) != 0 && byte % LINE == 0;
}

// Rows p, p + row, ..., in bytes. Meanwhile rows `ask`, `ask + ask_row`, ... are asked for.
struct Rows {
    const char* p;
    int64_t row;
    const char* ask;
    int64_t ask_row;
};

// Features from h on of LANES rows, times those of a query; TAIL: fewer than LANES of them.
template <int TYPE, int ASK, bool WHOLE, bool TAIL>
BA_INLINE void multiply(const Rows& k, int64_t n, const float* q, int64_t H, int64_t h, V (&sum)[BA_LANES]) {
    const V x = load(q + h);
    const int64_t at = h * bytes_of(TYPE);
    const char *p = k.p, *asked = k.ask + at;
#pragma GCC unroll 16
    for (int j = 0; j < BA_LANES; ++j, asked += k.ask_row) {
        if (is_asked(ASK, j, at)) ask(asked);
        sum[j] += x * (TAIL ? load_piece<TYPE>(p, h, H - h) : load_whole<TYPE>(p, h));
        if (WHOLE || j + 1 < n) p += k.row;
    }
}

// Lane j: the product of row j with a query that is padded with zeros. Rows from n on are not read (WHOLE: there are
// none): row n - 1 stands for them.
template <int TYPE, int ASK, bool WHOLE> BA_INLINE V products(const Rows& k, int64_t n, const float* q, int64_t H) {
    V sum[BA_LANES];
#pragma GCC unroll 16
    for (int j = 0; j < BA_LANES; ++j) sum[j] = V{};
    int64_t h = 0;
    for (; h + LANES <= H; h += LANES) multiply<TYPE, ASK, WHOLE, false>(k, n, q, H, h, sum);
    if (h < H) multiply<TYPE, ASK, WHOLE, true>(k, n, q, H, h, sum);
    return row_sums<1>(sum);
}

// Cosine and sine of what the angles of LANES keys have more than that of the first: rows of Pp, zeros behind P. They are the
// same for any keys, so that of all angles only every LANES-th is read, to turn the query back by it.
struct Angles {
    int64_t P, Pp;
    float *cosine, *sine;
    float *first, *second;  // the halves of the query, Pp each
};

static int64_t angle_floats(const ba_call& c) {
    return c.rotary_cos == NULL ? 0 : (2 * LANES + 4) * ((c.H / 2 + LANES - 1) / LANES * LANES);
}

// A query turned back by the angle whose cosine and sine are given, in whole vectors: its first half and its second one.
BA_INLINE void turn_back(const float* q, int64_t P, const float* cosine, const float* sine, float* first, float* second) {
    for (int64_t h = 0; h < P; h += LANES) {
        const auto at = [&](const float* x) { return P - h < LANES ? load_some(x + h, P - h) : load(x + h); };
        const V q1 = at(q), q2 = at(q + P), c = at(cosine), s = at(sine);
        store(first + h, q1 * c + q2 * s);
        store(second + h, q2 * c - q1 * s);
    }
}

// As products(), with keys that are turned first, features p and p + P of row j by an angle with cosine c and sine s:
// (k1 c - k2 s, k2 c + k1 s). Here c and s are factored out, so that nothing is turned.
template <int TYPE, int ASK> BA_INLINE V rotated_products(const Rows& k, int64_t n, const Angles& a) {
    V sum[BA_LANES];
#pragma GCC unroll 16
    for (int j = 0; j < BA_LANES; ++j) sum[j] = V{};
    const int64_t P = a.P;
    for (int64_t h = 0; h < P; h += LANES) {
        const int64_t width = P - h;
        const V q1 = load(a.first + h), q2 = load(a.second + h);
        const char *p = k.p, *asked = k.ask + h * bytes_of(TYPE);
#pragma GCC unroll 16
        for (int j = 0; j < BA_LANES; ++j) {
            if (is_asked(ASK, j, h * bytes_of(TYPE))) ask(asked), ask(asked + P * bytes_of(TYPE));
            asked += k.ask_row;
            const V k1 = load_piece<TYPE>(p, h, width), k2 = load_piece<TYPE>(p, P + h, width);
            sum[j] += load(a.cosine + j * a.Pp + h) * (q1 * k1 + q2 * k2);
            sum[j] += load(a.sine + j * a.Pp + h) * (q2 * k1 - q1 * k2);
            if (j + 1 < n) p += k.row;
        }
    }
    return row_sums<1>(sum);
}

// Adds n rows of values, times their weights, to `out`.
template <int TYPE, int ASK, bool WHOLE>
BA_INLINE void add_values(const Rows& v, int64_t n, const float* weights, int64_t W, float* out) {
    int64_t w = 0;
    for (; w + PIECE * LANES <= W; w += PIECE * LANES) {
        V a[PIECE];
#pragma GCC unroll 4
        for (int i = 0; i < PIECE; ++i) a[i] = load(out + w + i * LANES);
        const char *p = v.p, *asked = v.ask + w * bytes_of(TYPE);
#pragma GCC unroll 16
        for (int j = 0; j < (WHOLE ? BA_LANES : n); ++j, p += v.row, asked += v.ask_row) {
            const V x = fill(weights[j]);
#pragma GCC unroll 4
            for (int i = 0; i < PIECE; ++i) {
                if (is_asked(ASK, j, i * LANES * bytes_of(TYPE))) ask(asked + i * LANES * bytes_of(TYPE));
                a[i] += x * load_whole<TYPE>(p, w + i * LANES);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < PIECE; ++i) store(out + w + i * LANES, a[i]);
    }
    for (; w < W; w += LANES) {
        V a = load(out + w);
        const char *p = v.p, *asked = v.ask + w * bytes_of(TYPE);
        for (int64_t j = 0; j < n; ++j, p += v.row, asked += v.ask_row) {
            if (is_asked(ASK, j, w * bytes_of(TYPE))) ask(asked);
            a += weights[j] * load_piece<TYPE>(p, w, W - w);
        }
        store(out + w, a);
    }
}

}  // namespace
}  // namespace BA_ISA
