// What decoding does with one row of the cache: multiply a key with a query, add a weighted value to a sum.
//
// Rows are read one after another, in the order of their addresses, which is the order that processors foresee. While a
// row is read the one that lies `ahead` bytes further is asked for; 0 asks for what is there already.

namespace BA_ISA {
namespace {

constexpr int PIECE = 4;  // vectors of a row in registers at a time

constexpr int INT8 = -1;  // beside BA_F32 and BA_BF16: numbers of a cache that has a scale for each row

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

BA_INLINE void ask(const char* p) { __builtin_prefetch(p, 0, 3); }

template <int TYPE> BA_INLINE void ask_piece(const char* p) {
    constexpr int64_t lines = (PIECE * LANES * bytes_of(TYPE) + 63) / 64;
    for (int64_t i = 0; i < lines; ++i) ask(p + 64 * i);
}

// Sums of products of COUNT keys with a query, LANES of them for each key, still to be added up. Keys are read one
// after another, while the query stays in registers.
template <int TYPE, int COUNT>
BA_INLINE void multiply(const char* k, int64_t k_s, int64_t ahead, const float* q, int64_t H, float* sums) {
    V sum[COUNT];
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) sum[j] = V{};
    int64_t h = 0;
    for (; h + PIECE * LANES <= H; h += PIECE * LANES) {
        V x[PIECE];
#pragma GCC unroll 4
        for (int i = 0; i < PIECE; ++i) x[i] = load(q + h + i * LANES);
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) {
            ask_piece<TYPE>(k + j * k_s + ahead + h * bytes_of(TYPE));
#pragma GCC unroll 4
            for (int i = 0; i < PIECE; ++i) sum[j] += x[i] * load_whole<TYPE>(k + j * k_s, h + i * LANES);
        }
    }
    for (; h < H; h += LANES)
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) {
            ask(k + j * k_s + ahead + h * bytes_of(TYPE));
            sum[j] += load(q + h) * load_piece<TYPE>(k + j * k_s, h, H - h);
        }
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) store(sums + j * LANES, sum[j]);
}

// The same with a key that is turned first: features p and p + H/2 by the angle whose cosine and sine are given,
// (k1 c - k2 s, k2 c + k1 s). Here c and s are factored out, so that nothing is turned.
template <int TYPE>
BA_INLINE V multiply_rotated(
    const char* k, int64_t ahead, const float* q, int64_t H, const float* cosine, const float* sine) {
    const int64_t P = H / 2;
    V sum = {};
    for (int64_t p = 0; p < P; p += LANES) {
        const int64_t n = P - p;
        ask(k + ahead + p * bytes_of(TYPE));
        ask(k + ahead + (P + p) * bytes_of(TYPE));
        const V k1 = load_piece<TYPE>(k, p, n), k2 = load_piece<TYPE>(k, P + p, n);
        const V q1 = load_piece<BA_F32>(reinterpret_cast<const char*>(q), p, n);
        const V q2 = load_piece<BA_F32>(reinterpret_cast<const char*>(q), P + p, n);
        sum += load_piece<BA_F32>(reinterpret_cast<const char*>(cosine), p, n) * (q1 * k1 + q2 * k2);
        sum += load_piece<BA_F32>(reinterpret_cast<const char*>(sine), p, n) * (q2 * k1 - q1 * k2);
    }
    return sum;
}

// Adds COUNT rows of values, times their weights, to `out`.
template <int TYPE, bool ASK, int COUNT>
BA_INLINE void add_values(const char* v, int64_t v_s, int64_t ahead, const float* weights, int64_t W, float* out) {
    V x[COUNT];
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) x[j] = fill(weights[j]);
    int64_t w = 0;
    for (; w + PIECE * LANES <= W; w += PIECE * LANES) {
        V a[PIECE];
#pragma GCC unroll 4
        for (int i = 0; i < PIECE; ++i) a[i] = load(out + w + i * LANES);
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) {
            if constexpr (ASK) ask_piece<TYPE>(v + j * v_s + ahead + w * bytes_of(TYPE));
#pragma GCC unroll 4
            for (int i = 0; i < PIECE; ++i) a[i] += x[j] * load_whole<TYPE>(v + j * v_s, w + i * LANES);
        }
#pragma GCC unroll 4
        for (int i = 0; i < PIECE; ++i) store(out + w + i * LANES, a[i]);
    }
    for (; w < W; w += LANES) {
        V a = load(out + w);
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) {
            if constexpr (ASK) ask(v + j * v_s + ahead + w * bytes_of(TYPE));
            a += x[j] * load_piece<TYPE>(v + j * v_s, w, W - w);
        }
        store(out + w, a);
    }
}

}  // namespace
}  // namespace BA_ISA
