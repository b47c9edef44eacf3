// The same as decode_rows.hpp for int8 rows, by products of integers, where the processor has them (AVX-512 VNNI, VBMI).
//
// What multiplies the codes is rounded to 16 bits: a query to a multiple of its largest number, the weights of LANES keys to
// multiples of the largest of them. Both are some 250 times finer than the codes themselves. A product of 16 by 8 bits
// is two of 8 by 8 (VPDPBUSD), or one of 16 by 16 where two features are summed (VPDPWSSD).

bool ba_has_byte_products();  // dispatch.cpp

namespace BA_ISA {
namespace {

constexpr int64_t WIDEST_CODED = 256;  // features of a head: sums of products stay below 2^31

struct CodedQuery {
    float scale;     // of the products
    float factor;    // of what is rounded, where keys are turned
    int32_t excess;  // by which products with codes + 128 exceed those with codes
    int32_t unused;
    int8_t digits[2 * WIDEST_CODED];  // numbers hi * 256 + lo: all hi, then all lo, zeros behind each
};

#if BA_LANES == 16 && defined(__AVX512F__)
#define BA_VNNI __attribute__((target("avx512vnni,avx512vbmi")))

constexpr int CODED = CODES;             // how codes are read where these products serve
constexpr int64_t BYTES = 64;            // codes of a vector
constexpr float QUERY_STEPS = 32639.0f;  // 127 * 256 + 127: the largest number of two signed digits
constexpr float TURNED_STEPS = 32760.0f;
constexpr float WEIGHT_STEPS = 65535.0f;

// Whether integer products serve a cache of codes with H features for keys and W for values.
static bool codes_serve(const ba_call& c) {
    const bool whole = c.rotary_cos == NULL || c.H % (2 * LANES) == 0;
    return whole && c.H <= WIDEST_CODED && ba_has_byte_products();
}

BA_INLINE __mmask64 first_bytes(int64_t n) { return n >= BYTES ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }

// The largest of a query's numbers, or of its pairs' lengths, which turning leaves as they are: never 0, NaN if one is NaN.
static float largest_of(const float* q, int64_t H, bool pairs) {
    float most = 1e-30f, longest = 1.0f;
    const auto keep = [](float* best, float x) {
        if (x > *best || x != x) *best = x;
    };
    for (int64_t h = 0; h < H; ++h) keep(&most, fabsf(q[h]));
    for (int64_t p = 0; pairs && p < H / 2; ++p) {
        const float x = q[p] / most, y = q[H / 2 + p] / most;
        keep(&longest, sqrtf(x * x + y * y));
    }
    return most * longest;
}

static void code_query(const ba_call& c, const float* q, CodedQuery* coded) {
    const float most = largest_of(q, c.H, c.rotary_cos != NULL);
    memset(coded, 0, sizeof(*coded));
    if (c.rotary_cos != NULL) {
        coded->factor = TURNED_STEPS / most;
        coded->scale = most / TURNED_STEPS / 256.0f;  // codes are in the upper bytes of words
        return;
    }
    coded->scale = most / QUERY_STEPS;
    int32_t sum = 0;
    for (int64_t h = 0; h < c.H; ++h) {
        const float steps = q[h] * (QUERY_STEPS / most);
        const int32_t x = steps == steps ? static_cast<int32_t>(rintf(steps)) : 0, low = static_cast<int8_t>(x);
        coded->digits[h] = static_cast<int8_t>((x - low) >> 8);
        coded->digits[WIDEST_CODED + h] = static_cast<int8_t>(low);
        sum += x;
    }
    coded->excess = 128 * sum;
}

// As products().
template <int ASK, int WIDTH>
BA_VNNI static V coded_products(const Rows& k, int64_t n, const CodedQuery& q, int64_t width) {
    const int64_t H = WIDTH == 0 ? width : WIDTH;
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    I sum[BA_LANES];
    const char *p = k.p, *asked = k.ask;
#pragma GCC unroll 16
    for (int j = 0; j < BA_LANES; ++j, asked += k.ask_row) {
        __m512i high = _mm512_setzero_si512(), low = high;
        for (int64_t h = 0; h < H; h += BYTES) {
            if (is_asked(ASK, j, h)) ask(asked + h);
            // Codes with 128 added are unsigned, which the instruction wants of one factor.
            const __m512i x = _mm512_xor_si512(_mm512_maskz_loadu_epi8(first_bytes(H - h), p + h), flip);
            high = _mm512_dpbusd_epi32(high, x, _mm512_loadu_si512(q.digits + h));
            low = _mm512_dpbusd_epi32(low, x, _mm512_loadu_si512(q.digits + WIDEST_CODED + h));
        }
        sum[j] = (reinterpret_cast<I>(high) << 8) + reinterpret_cast<I>(low);
        if (j + 1 < n) p += k.row;
    }
    return __builtin_convertvector(row_sums<1>(sum) - q.excess, V) * q.scale;
}

// What multiplies pairs of codes, (a, b) and (b, -a) in 16 bits each, from a turned query.
BA_VNNI static void code_pairs(const float* first, const float* second, int64_t P, float factor, char* pairs) {
    const __m512i half = _mm512_set1_epi32(0xffff);
    for (int64_t p = 0; p < P; p += LANES, pairs += 2 * BYTES) {
        const __m512i a = _mm512_cvtps_epi32(reinterpret_cast<__m512>(load(first + p) * factor));
        const __m512i b = _mm512_cvtps_epi32(reinterpret_cast<__m512>(load(second + p) * factor));
        const __m512i minus = _mm512_sub_epi32(_mm512_setzero_si512(), a);
        _mm512_storeu_si512(pairs, _mm512_or_si512(_mm512_and_si512(a, half), _mm512_slli_epi32(b, 16)));
        _mm512_storeu_si512(pairs + BYTES, _mm512_or_si512(_mm512_and_si512(b, half), _mm512_slli_epi32(minus, 16)));
    }
}

// Words of which the upper byte is a code, in turn one from the lower half of a vector and one from the upper: two
// vectors of places for VPERMB.
struct Interleaved {
    alignas(64) uint8_t bytes[2 * BYTES];
    constexpr Interleaved() : bytes() {
        for (int i = 0; i < 2 * BYTES; ++i) bytes[i] = static_cast<uint8_t>(i / 4 + (i % 4 == 3 ? BYTES / 2 : 0));
    }
};
constexpr Interleaved INTERLEAVED;

// As rotated_products(); a multiple of 16 pairs.
template <int ASK, int WIDTH>
BA_VNNI static V coded_rotated(const Rows& k, int64_t n, const Angles& a, const CodedQuery& query) {
    alignas(64) char pairs[4 * WIDEST_CODED];
    const int64_t P = WIDTH == 0 ? a.P : WIDTH / 2;
    code_pairs(a.first, a.second, P, query.factor, pairs);
    const __m512i left = _mm512_load_si512(INTERLEAVED.bytes), right = _mm512_load_si512(INTERLEAVED.bytes + BYTES);
    const __mmask64 upper = 0xaaaaaaaaaaaaaaaa;
    V sum[BA_LANES];
    const char *p = k.p, *asked = k.ask;
#pragma GCC unroll 16
    for (int j = 0; j < BA_LANES; ++j, asked += k.ask_row) {
        V s = {};
        const char* q = pairs;
        for (int64_t i = 0; i < P; i += 2 * LANES, q += 4 * BYTES) {
            if (is_asked(ASK, j, i)) ask(asked + i);
            if (is_asked(ASK, j, P + i)) ask(asked + P + i);
            const bool whole = P - i > LANES;
            __m512i x;
            if (P == 2 * LANES) x = _mm512_loadu_si512(p);
            else {
                const __mmask32 mask = whole ? ~__mmask32{0} : 0xffff;
                x = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(mask, p + i)),
                    _mm256_maskz_loadu_epi8(mask, p + P + i), 1);
            }
            for (int m = 0; m < (whole ? 2 : 1); ++m) {
                const __m512i words = _mm512_maskz_permutexvar_epi8(upper, m == 0 ? left : right, x);
                const char* factors = q + 2 * m * BYTES;
                const __m512i zero = _mm512_setzero_si512();
                const __m512i x1 = _mm512_dpwssd_epi32(zero, words, _mm512_loadu_si512(factors));
                const __m512i x2 = _mm512_dpwssd_epi32(zero, words, _mm512_loadu_si512(factors + BYTES));
                const int64_t at = j * P + i + m * LANES;
                s += reinterpret_cast<V>(_mm512_cvtepi32_ps(x1)) * load(a.cosine + at);
                s += reinterpret_cast<V>(_mm512_cvtepi32_ps(x2)) * load(a.sine + at);
            }
        }
        sum[j] = s;
        if (j + 1 < n) p += k.row;
    }
    return row_sums<1>(sum) * query.scale;
}

// As add_values().
template <int ASK, int WIDTH>
BA_VNNI static void add_coded(const Rows& v, int64_t n, const float* weights, int64_t width, float* out) {
    const int64_t W = WIDTH == 0 ? width : WIDTH;
    V w = load(weights);
    if (n < LANES) w = select(first_lanes() < static_cast<int32_t>(n), w, V{});
    float top = _mm512_reduce_max_ps(reinterpret_cast<__m512>(w));
    if (any(w != w)) top = __builtin_nanf("");
    const float factor = top > 1e-33f ? WEIGHT_STEPS / top : 0.0f;
    const V unit = fill(top / WEIGHT_STEPS);
    const __m512i steps = _mm512_cvtps_epi32(reinterpret_cast<__m512>(w * factor));
    alignas(64) uint8_t digits[2][BA_LANES];
    _mm_store_si128(reinterpret_cast<__m128i*>(digits[0]), _mm512_cvtepi32_epi8(_mm512_srli_epi32(steps, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(digits[1]), _mm512_cvtepi32_epi8(steps));
    for (int64_t i = 0; i < W; i += BYTES) {
        const __mmask64 mask = first_bytes(W - i);
        __m512i high[4], low[4];
        for (int m = 0; m < 4; ++m) high[m] = low[m] = _mm512_setzero_si512();
        const char *p = v.p + i, *asked = v.ask + i;
#pragma GCC unroll 4
        for (int j = 0; j < BA_LANES; j += 4) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r, asked += v.ask_row) {
                if (is_asked(ASK, j + r, i)) ask(asked);
                x[r] = _mm512_maskz_loadu_epi8(mask, p);
                if (j + r + 1 < n) p += v.row;
            }
            // Four keys' codes of a feature side by side.
            const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpackhi_epi8(x[0], x[1]);
            const __m512i c = _mm512_unpacklo_epi8(x[2], x[3]), d = _mm512_unpackhi_epi8(x[2], x[3]);
            const __m512i quads[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c),
                _mm512_unpacklo_epi16(b, d), _mm512_unpackhi_epi16(b, d)};
            int32_t h, l;
            memcpy(&h, digits[0] + j, 4), memcpy(&l, digits[1] + j, 4);
            const __m512i first = _mm512_set1_epi32(h), second = _mm512_set1_epi32(l);
#pragma GCC unroll 4
            for (int m = 0; m < 4; ++m) {
                high[m] = _mm512_dpbusd_epi32(high[m], first, quads[m]);
                low[m] = _mm512_dpbusd_epi32(low[m], second, quads[m]);
            }
        }
        __m512i y[4];
        for (int m = 0; m < 4; ++m) y[m] = _mm512_add_epi32(_mm512_slli_epi32(high[m], 8), low[m]);
        // y[m] has features 4 m ... 4 m + 3 of each 16: four by four parts of 128 bits turned over.
        const __m512i a = _mm512_shuffle_i32x4(y[0], y[1], 0x44), b = _mm512_shuffle_i32x4(y[0], y[1], 0xee);
        const __m512i c = _mm512_shuffle_i32x4(y[2], y[3], 0x44), d = _mm512_shuffle_i32x4(y[2], y[3], 0xee);
        const __m512i z[4] = {_mm512_shuffle_i32x4(a, c, 0x88), _mm512_shuffle_i32x4(a, c, 0xdd),
            _mm512_shuffle_i32x4(b, d, 0x88), _mm512_shuffle_i32x4(b, d, 0xdd)};
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m) {
            if (i + m * LANES >= W) break;
            float* to = out + i + m * LANES;
            store(to, load(to) + unit * reinterpret_cast<V>(_mm512_cvtepi32_ps(z[m])));
        }
    }
}

#define BA_WIDTHS(width, name, ...) \
    (width == 64 ? name<ASK, 64>(__VA_ARGS__) : width == 128 ? name<ASK, 128>(__VA_ARGS__) : name<ASK, 0>(__VA_ARGS__))
template <int ASK> BA_INLINE V coded_products_of(const Rows& k, int64_t n, const CodedQuery& q, int64_t H) {
    return BA_WIDTHS(H, coded_products, k, n, q, H);
}
template <int ASK> BA_INLINE V coded_rotated_of(const Rows& k, int64_t n, const Angles& a, const CodedQuery& q) {
    return BA_WIDTHS(2 * a.P, coded_rotated, k, n, a, q);
}
template <int ASK> BA_INLINE void add_coded_of(const Rows& v, int64_t n, const float* weights, int64_t W, float* out) {
    BA_WIDTHS(W, add_coded, v, n, weights, W, out);
}
#else

constexpr int CODED = INT8;  // they never serve

static bool codes_serve(const ba_call&) { return false; }
static void code_query(const ba_call&, const float*, CodedQuery*) {}
template <int ASK> V coded_products_of(const Rows&, int64_t, const CodedQuery&, int64_t);
template <int ASK> V coded_rotated_of(const Rows&, int64_t, const Angles&, const CodedQuery&);
template <int ASK> void add_coded_of(const Rows&, int64_t, const float*, int64_t, float*);

#endif

}  // namespace
}  // namespace BA_ISA
