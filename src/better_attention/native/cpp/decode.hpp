// A few queries over many keys: the time it takes is the time to read the keys and values, so both are read once, in
// the order in which they lie, and shared out among threads in chunks of keys whose partial sums are combined.
//
// Lanes are columns of q and k while scores are made and keys while they are weighed. How keys are cut follows from
// the shape alone: results do not depend on the number of threads.

namespace BA_ISA {
namespace {

constexpr int64_t FEW = 8;       // queries that share a head's keys
constexpr int64_t CHUNK = 512;   // keys of a task at most
constexpr int64_t STRETCH = 32;  // keys weighed at a time

struct Decode {
    const ba_call* c;
    int64_t group, few, Hp, Wp, state;          // state: floats of one row's partial sums
    int64_t begin, end, chunk, chunks;          // keys that any query sees, and how they are cut
    bool interleaved;                           // the heads of one key lie side by side
    float *q, *parts;                           // queries [B][G][few][Hp], sums [B][G][few][chunks][state]
};

// Sums of products of a key's row with a query, for LANES keys at once.
template <bool BF16>
BA_INLINE V dots(const void* k, int64_t k_s, int64_t n, const float* q, int64_t H) {
    V sum[BA_LANES];
#pragma GCC unroll 16
    for (int j = 0; j < BA_LANES; ++j) sum[j] = V{};
    const int64_t whole = H / LANES * LANES;
    if (n == LANES) {
        for (int64_t h = 0; h < whole; h += LANES) {
            const V x = load(q + h);
#pragma GCC unroll 16
            for (int j = 0; j < BA_LANES; ++j)
                sum[j] += x * (BF16 ? load_bf16(static_cast<const uint16_t*>(k) + j * k_s + h)
                                    : load(static_cast<const float*>(k) + j * k_s + h));
        }
        if (whole < H) {
            const V x = load(q + whole);
            for (int j = 0; j < BA_LANES; ++j)
                sum[j] += x * load_row({shifted(k, j * k_s, BF16), BF16}, whole, H - whole);
        }
    } else {
        for (int64_t j = 0; j < n; ++j)
            for (int64_t h = 0; h < H; h += LANES)
                sum[j] += load(q + h) * load_row({shifted(k, j * k_s, BF16), BF16}, h, H - h);
    }
    turn_over<1>(sum);
    V total = sum[0];
#pragma GCC unroll 16
    for (int j = 1; j < BA_LANES; ++j) total += sum[j];
    return total;
}

// Keys s0 + [0, n), n <= STRETCH, of one head for one query. state: total, shift, and W sums from state + LANES on.
template <bool BF16>
static void stretch(
    const ba_call& c, const Restriction& r, const void* k, const void* v, int64_t l, int64_t s0, int64_t n,
    const float* q, float* state) {
    V z[STRETCH / LANES], bias[STRETCH / LANES];
    float x[STRETCH], mask[STRETCH];
    constexpr int64_t size = BF16 ? 2 : 4;
    const bool softmax = c.score == BA_SOFTMAX;
    const int64_t vectors = (n + LANES - 1) / LANES;
    const bool biased = r.exponent;
    bool hides = n % LANES != 0;
    for (int64_t i = 0; i < vectors; ++i) bias[i] = V{};
    const int64_t begin = first_key(r, l) - s0, end = end_key(r, l) - s0;
    if (hides || r.mask_type != BA_NONE || r.padding_type != BA_NONE || begin > 0 || end < n) {
        for (int64_t s = 0; s < vectors * LANES; ++s) mask[s] = s < n && s >= begin && s < end ? 0.0f : -INF;
        const void* rows[2] = {r.mask, r.padding};
        const int64_t types[2] = {r.mask_type, r.padding_type}, strides[2] = {r.mask_s, r.padding_s};
        for (int i = 0; i < 2; ++i) {
            if (types[i] == BA_NONE) continue;
            const int64_t at = (i ? 0 : l * r.mask_l) + s0 * strides[i];
            const Seen seen = read_mask(
                static_cast<const char*>(rows[i]) + at * size_of(types[i]), types[i], strides[i], n, softmax, x);
            if (!seen.open) return;
            for (int64_t s = 0; s < n; ++s) mask[s] += x[s];
        }
        hides = true;
        for (int64_t i = 0; i < vectors; ++i) bias[i] = load(mask + i * LANES);
    }
    for (int64_t i = 0; i < vectors; ++i) {
        const int64_t s = i * LANES, count = n - s < LANES ? n - s : LANES;
        // What comes next is asked for while this is computed; a prefetch beyond the end does nothing.
        // Of what serves as both, half: the other half is asked for while the values are weighed.
        const int64_t ahead = v == k ? s / 2 : s, asked = v == k ? count / 2 : count;
        soon<2>(shifted(k, (STRETCH + ahead) * c.k_s, BF16), c.k_s * size, asked, c.H * size);
        z[i] = dots<BF16>(shifted(k, s * c.k_s, BF16), c.k_s, count, q, c.H);
        if (hides && softmax) z[i] = select(bias[i] == -INF, fill(-INF), z[i] + bias[i]);
        if (hides && !softmax) z[i] = select(bias[i] == -INF, V{}, z[i]);
    }
    float low = 0.0f;
    if (softmax || biased) {
        V top = fill(state[1]);
        for (int64_t i = 0; i < vectors; ++i) top = larger(softmax ? z[i] : bias[i], top);
        const float high = max_of(top);
        if (high == -INF) {  // nothing to see, unless it is NaN, which no maximum shows
            I nan = {};
            for (int64_t i = 0; i < vectors; ++i) nan |= (z[i] != z[i]) | (bias[i] != bias[i]);
            if (!any(nan)) return;
        }
        if (high != state[1]) {
            if (state[1] != -INF) {
                const float factor = exp_of(fill(state[1] - high))[0];
                state[0] *= factor;
                for (int64_t w = 0; w < c.W; w += LANES)
                    store(state + LANES + w, load(state + LANES + w) * factor);
            }
            state[1] = high;
        }
        low = high == -INF ? 0.0f : high;
    }
    V sum = {};
    for (int64_t i = 0; i < vectors; ++i) {
        if (softmax) {
            z[i] = exp_of(z[i] - low);
        } else {
            const V square = at_most(FAR_SQUARE, z[i] * z[i]);
            z[i] = square * reciprocal(1.0f + square);
            if (biased) z[i] *= exp_of(bias[i] - low);
        }
        sum += z[i];
        store(x + i * LANES, z[i]);
    }
    state[0] += sum_of(sum);
    float* out = state + LANES;
    int64_t w = 0;
    for (; w + 4 * LANES <= c.W; w += 4 * LANES) {
        V a[4];
        for (int i = 0; i < 4; ++i) a[i] = load(out + w + i * LANES);
        for (int64_t s = 0; s < n; ++s) {
            if (w == 0) {
                const int64_t ahead = v == k ? STRETCH / 2 + s / 2 : s;
                if (v != k || s % 2 == 0) soon<2>(shifted(v, (STRETCH + ahead) * c.v_s, BF16), 0, 1, c.W * size);
            }
            for (int i = 0; i < 4; ++i)
                a[i] += x[s] * (BF16 ? load_bf16(static_cast<const uint16_t*>(v) + s * c.v_s + w + i * LANES)
                                     : load(static_cast<const float*>(v) + s * c.v_s + w + i * LANES));
        }
        for (int i = 0; i < 4; ++i) store(out + w + i * LANES, a[i]);
    }
    for (; w < c.W; w += LANES) {
        V a = load(out + w);
        for (int64_t s = 0; s < n; ++s) a += x[s] * load_row({shifted(v, s * c.v_s, BF16), BF16}, w, c.W - w);
        store(out + w, a);
    }
}

static void decode_task(void* context, int64_t task, float*) {
    const Decode& f = *static_cast<const Decode*>(context);
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t heads = f.interleaved ? c.G : 1;
    const int64_t chunk = task % f.chunks, rest = task / f.chunks;
    const int64_t b = f.interleaved ? rest : rest / c.G, first = f.interleaved ? 0 : rest % c.G;
    const int64_t start = f.begin + chunk * f.chunk, end = start + f.chunk < f.end ? start + f.chunk : f.end;
    for (int64_t g = first; g < first + heads; ++g)
        for (int64_t r = 0; r < f.few; ++r) {
            float* state = f.parts + (((b * c.G + g) * f.few + r) * f.chunks + chunk) * f.state;
            memset(state, 0, static_cast<size_t>(f.state) * sizeof(float));
            state[1] = -INF;
        }
    for (int64_t s0 = start; s0 < end; s0 += STRETCH) {
        const int64_t n = end - s0 < STRETCH ? end - s0 : STRETCH;
        for (int64_t g = first; g < first + heads; ++g) {
            const void* k = shifted(c.k, b * c.k_b + g * c.k_g + s0 * c.k_s, bf16);
            const void* v = shifted(c.v, b * c.v_b + g * c.v_g + s0 * c.v_s, bf16);
            for (int64_t r = 0; r < f.few; ++r) {
                const int64_t l = r % c.L, query = g * f.group + r / c.L, row = (b * c.G + g) * f.few + r;
                const Restriction hide = restriction(c, b, query);
                if (s0 >= end_key(hide, l) || s0 + n <= first_key(hide, l)) continue;
                float* state = f.parts + (row * f.chunks + chunk) * f.state;
                bf16 ? stretch<true>(c, hide, k, v, l, s0, n, f.q + row * f.Hp, state)
                     : stretch<false>(c, hide, k, v, l, s0, n, f.q + row * f.Hp, state);
            }
        }
    }
}

// The chunks of one row together.
static void combine(const Decode& f, int64_t b, int64_t g, int64_t r, float* scratch) {
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const float* parts = f.parts + ((b * c.G + g) * f.few + r) * f.chunks * f.state;
    float high = -INF, total = 0.0f;
    for (int64_t i = 0; i < f.chunks; ++i) {
        const float shift = parts[i * f.state + 1];
        high = shift > high ? shift : high;
    }
    for (int64_t w = 0; w < f.Wp; w += LANES) store(scratch + w, V{});
    for (int64_t i = 0; i < f.chunks; ++i) {
        const float* part = parts + i * f.state;
        if (part[0] == 0.0f) continue;
        const float factor = high == -INF ? 1.0f : exp_of(fill(part[1] - high))[0];  // -inf: no exponents at all
        total += part[0] * factor;
        for (int64_t w = 0; w < f.Wp; w += LANES) store(scratch + w, load(scratch + w) + load(part + LANES + w) * factor);
    }
    const int64_t l = r % c.L, n = g * f.group + r / c.L;
    void* out = shifted(c.out, b * c.out_b + n * c.out_n + l * c.out_l, bf16);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t w = 0; w < c.W; w += LANES) store_row(out, bf16, w, load(scratch + w) * inverse, c.W - w);
    if (c.stats != NULL) {
        float* stats = c.stats + 2 * ((b * c.N + n) * c.L + l);
        stats[0] = total == 0.0f ? INF : total;
        stats[1] = high == -INF ? 0.0f : high;
    }
    if (c.score == BA_EXPRESSIVE && total < FAINT) careful_forward(c, b, n, l, scratch);
}

static void combine_task(void* context, int64_t head, float* scratch) {
    const Decode& f = *static_cast<const Decode*>(context);
    for (int64_t r = 0; r < f.few; ++r) combine(f, head / f.c->G, head % f.c->G, r, scratch);
}

static bool is_decode(const ba_call& c) {
    return c.dropout == 0.0 && c.G > 0 && c.N / c.G * c.L <= FEW && c.S >= 2 * LANES;
}

// Backwards, panels serve these too. Their scores differ in the last bits, so the normalisers have to be theirs as well:
// where scores cancel, weights and a normaliser of another rounding would not add up to one.
static int64_t decode_backward(const ba_call& c) {
    const int64_t rows = c.B * c.N * c.L;
    float* memory = ba_allocate(rows * (c.W + 2) + 16);
    if (memory == NULL) return BA_NO_MEMORY;
    ba_call again = c;
    again.stats = memory;
    again.out = memory + ba_padded(2 * rows);
    again.out_l = c.W, again.out_n = c.L * c.W, again.out_b = c.N * c.L * c.W;
    int64_t status = wide_forward(again);
    if (status == BA_OK) status = wide_backward(again);
    ba_release(memory);
    return status;
}

static int64_t decode(const ba_call& c) {
    Decode f = {};
    f.c = &c;
    f.group = c.N / c.G;
    f.few = f.group * c.L;
    f.interleaved = c.G > 1 && c.k_g < c.k_s;
    const Restriction causality = restriction(c, 0, 0);
    f.begin = first_key(causality, 0), f.end = end_key(causality, c.L - 1);
    const int64_t keys = f.end > f.begin ? f.end - f.begin : 0;
    f.chunk = CHUNK;
    if (c.B * (f.interleaved ? 1 : c.G) < PARTS) {  // few heads to share out
        f.chunk = (keys / PARTS + STRETCH) / STRETCH * STRETCH;
        if (f.chunk > CHUNK) f.chunk = CHUNK;
    }
    f.chunks = (keys + f.chunk - 1) / f.chunk;
    f.Hp = (c.H + LANES - 1) / LANES * LANES;
    f.Wp = (c.W + LANES - 1) / LANES * LANES;
    f.state = ba_padded(LANES + f.Wp);
    const int64_t rows = c.B * c.G * f.few;
    if (rows == 0) return BA_OK;
    f.q = ba_allocate(rows * f.Hp + rows * f.chunks * f.state);
    if (f.q == NULL) return BA_NO_MEMORY;
    f.parts = f.q + rows * f.Hp;
    const bool bf16 = c.dtype == BA_BF16;
    const float factor = static_cast<float>(c.scale);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = i % f.few, g = i / f.few % c.G, b = i / f.few / c.G;
        const Row q = {shifted(c.q, b * c.q_b + (g * f.group + r / c.L) * c.q_n + r % c.L * c.q_l, bf16), bf16};
        for (int64_t h = 0; h < f.Hp; h += LANES)
            store(f.q + i * f.Hp + h, (h < c.H ? load_row(q, h, c.H - h) : V{}) * factor);
    }
    int64_t status = ba_parallel(c.threads, c.B * (f.interleaved ? 1 : c.G) * f.chunks, 0, decode_task, &f);
    const int64_t spare = f.Wp > 2 * c.S + 2 ? f.Wp : 2 * c.S + 2;
    if (status == BA_OK)
        status = ba_parallel(1, c.B * c.G, c.score == BA_EXPRESSIVE ? spare : f.Wp, combine_task, &f);
    ba_release(f.q);
    return status;
}

}  // namespace
}  // namespace BA_ISA
