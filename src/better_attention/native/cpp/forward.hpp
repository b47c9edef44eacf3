// The forward pass: panels of queries against blocks of keys.
//
// A panel is up to BA_WIDE vectors of queries, turned over so that lanes are queries; keys and values are read as they
// lie. Scores of a block stay in the first-level cache, weights take their place, and go on into the panel's sums.

namespace BA_ISA {
namespace {

constexpr int64_t TILE_FLOATS = 3072;  // of one block of scores: 12 KiB of the first-level cache
// Of q and k multiplied at a time, for the same reason; and sums of sums lose fewer digits than one long sum, which
// counts where a product is rounded before it is added.
constexpr int64_t DEPTH = LANES == 4 ? 32 : 128;
constexpr int64_t SHORTEST_RUN = 512;                // queries
constexpr int64_t MOST_KEYS = LANES == 4 ? 48 : 96;  // in a block, for that reason too

struct Panels {  // how L queries are cut
    int64_t vectors, count;
};

static Panels panels(int64_t L, int64_t wide) {
    const int64_t vectors = (L + LANES - 1) / LANES;
    return {vectors, (vectors + wide - 1) / wide};
}

// Panels that share one copy of the keys that they see. With a window these are few, and stay in the caches.
static int64_t run_panels(const ba_call& c, const Panels& cut, int64_t wide) {
    if (!c.causal || c.window == 0) return cut.count;
    const int64_t rows = c.window > SHORTEST_RUN ? c.window : SHORTEST_RUN, panels = rows / (wide * LANES);
    return panels < 1 ? 1 : panels < cut.count ? panels : cut.count;
}

// The most keys of such a copy.
static int64_t run_keys(const ba_call& c, const Panels& cut, int64_t wide) {
    const int64_t panels = run_panels(c, cut, wide), keys = panels * wide * LANES + c.window;
    return panels == cut.count || keys > c.S ? c.S : keys;
}

// Keys in a block: all blocks about the same, in whole tiles of 6 rows, about TILE_FLOATS scores of `wide` vectors.
static int64_t block_keys(const ba_call& c, int64_t wide) {
    int64_t ideal = TILE_FLOATS / (wide * LANES);
    if (ideal > MOST_KEYS) ideal = MOST_KEYS;
    int64_t count = (c.S + ideal / 2) / ideal;
    if (count < 1) count = 1;
    return ((c.S + count - 1) / count + 5) / 6 * 6;
}

struct Forward {
    const ba_call* c;
    Panels cut;
    int64_t wide, keys;      // vectors in a panel, keys in a block
    int64_t chunks, run;     // tasks for one head, or heads for one task
    bool copy_k, copy_v;     // whether a task brings keys and values into one piece first
    int64_t Hp, Wp, floats;  // widths in whole vectors, scratch of a thread
};

struct Panel {
    const ba_call* c;
    Restriction hide;
    Drops drops;
    const float *k, *v;
    int64_t k_s, v_s, l0, rows, pitch, keys;
    float *q, *out, *z, *tile, *spare, *total, *shift, *rescale, *numbers;
    bool empty;  // nothing is in `out` yet
    char* rows_out;           // where the panel's rows go
    const char* next_q;       // queries of the panel after it, and how many
    int64_t rows_ahead, asked, span;  // span: keys that the panel sees
    const char *next_k, *next_v;  // of the next head, or NULL
};

template <int NV>
BA_INLINE void scores(const Panel& p, int64_t lane, int64_t s0, int64_t n) {
    const int64_t H = p.c->H;
    for (int64_t h = 0; h < H; h += DEPTH)
        product<NV, false>(n, H - h < DEPTH ? H - h : DEPTH, p.k + s0 * p.k_s + h, p.k_s, p.q + h * p.pitch + lane,
            p.pitch, p.z + lane, p.pitch, h > 0);
}

template <int NV, int SCORE>
static __attribute__((noinline)) bool weigh_any(Panel& p, int mode, const Edge& edge, int64_t lane, int64_t n) {
    float *z = p.z + lane, *total = p.total + lane, *shift = p.shift + lane, *rescale = p.rescale + lane;
    const float* tile = p.tile + lane;
    switch (mode) {
    case FREE: return weigh<NV, SCORE, FREE>(z, n, p.pitch, tile, edge, total, shift, rescale);
    case EDGE: return weigh<NV, SCORE, EDGE>(z, n, p.pitch, tile, edge, total, shift, rescale);
    case HIDING: return weigh<NV, SCORE, HIDING>(z, n, p.pitch, tile, edge, total, shift, rescale);
    default: return weigh<NV, SCORE, BIASED>(z, n, p.pitch, tile, edge, total, shift, rescale);
    }
}

// Asks for what comes after this block and this panel, a share of it with every block: rows that the panel will
// write, the next panel's queries, and during a head's first panel the keys and values of the next head.
static void ask_ahead(Panel& p, int64_t s0, int64_t n) {
    const ba_call& c = *p.c;
    const int64_t size = c.dtype == BA_BF16 ? 2 : 4;
    int64_t to = p.asked + (p.rows * n + p.span - 1) / p.span;
    if (to > p.rows) to = p.rows;
    for (int64_t r = p.asked; r < to; ++r)
        for (int64_t i = 0; i < c.W * size; i += 64) __builtin_prefetch(p.rows_out + r * c.out_l * size + i, 1, 2);
    const int64_t end = to < p.rows_ahead ? to : p.rows_ahead;
    if (end > p.asked) soon<2>(p.next_q + p.asked * c.q_l * size, c.q_l * size, end - p.asked, c.H * size);
    p.asked = to;
    if (p.next_k == NULL) return;
    soon<2>(p.next_k + s0 * c.k_s * size, c.k_s * size, n, c.H * size);
    if (p.next_v != p.next_k) soon<2>(p.next_v + s0 * c.v_s * size, c.v_s * size, n, c.W * size);
}

// Keys s0 + [0, n) for the panel's lanes from `lane` on, NV vectors of them.
template <int NV, int SCORE>
static void block(Panel& p, int64_t lane, int64_t s0, int64_t n) {
    const State state = mask_tile(p.hide, p.l0, p.rows, s0, n, p.pitch, p.tile, p.spare);
    ask_ahead(p, s0, n);
    if (state == CLOSED) return;
    const int64_t query = p.l0 + lane;
    const Edge edge = edge_of(p.hide, query, query + NV * LANES - 1, s0, n);
    const int mode = state == BIASES ? BIASED : state == HIDES ? HIDING : edge.any ? EDGE : FREE;
    scores<NV>(p, lane, s0, n);
    const bool changed = weigh_any<NV, SCORE>(p, mode, edge, lane, n);
    if (p.drops.any) drop<NV, true>(p.drops, p.numbers + lane, s0, n, p.pitch, p.z + lane);
    const int64_t W = p.c->W;
    if (p.empty && NV * LANES < p.pitch) {
        memset(p.out, 0, static_cast<size_t>(W * p.pitch) * sizeof(float));
        p.empty = false;
    }
    if (changed && !p.empty)
        for (int64_t w = 0; w < W; ++w)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                float* x = p.out + w * p.pitch + lane + v * LANES;
                store(x, load(x) * load(p.rescale + lane + v * LANES));
            }
    product<NV, true>(W, n, p.v + s0 * p.v_s, p.v_s, p.z + lane, p.pitch, p.out + lane, p.pitch, !p.empty);
    p.empty = false;
}

template <int SCORE>
static void block_of(Panel& p, int64_t vectors, int64_t lane, int64_t s0, int64_t n) {
    switch (vectors) {
    case 1: return block<1, SCORE>(p, lane, s0, n);
    case 2: return block<2, SCORE>(p, lane, s0, n);
#if BA_WIDE == 4
    case 3: return block<3, SCORE>(p, lane, s0, n);
    default: return block<4, SCORE>(p, lane, s0, n);
#endif
    }
}

// The head of keys, and of values, of pair g.
static int64_t key_head(const ba_call& c, int64_t g) { return c.key_group > 1 ? g / c.key_group : g; }
static int64_t value_head(const ba_call& c, int64_t g) { return c.value_group > 1 ? g / c.value_group : g; }

// Whether every pair's values are its keys. What begins at one address may still be two tensors, such as every second
// head and the first ones.
static bool one_tensor(const ba_call& c) {
    return c.k == c.v && c.H == c.W && c.k_b == c.v_b && c.k_g == c.v_g && c.k_s == c.v_s &&
        key_head(c, c.G) == value_head(c, c.G);
}

// One number of a key or value, whatever the cache holds.
static float number_at(const void* p, const float* scale, const ba_call& c, int64_t row, int64_t scale_row, int64_t i) {
    if (scale == NULL) return load_row({shifted(p, row, c.dtype == BA_BF16), c.dtype == BA_BF16}, i, 1)[0];
    return scale[scale_row] * static_cast<float>(static_cast<const int8_t*>(p)[row + i]);
}

static float key_at(const ba_call& c, int64_t b, int64_t g, int64_t s, int64_t h) {
    const int64_t kg = key_head(c, g), row = b * c.k_b + kg * c.k_g + s * c.k_s;
    const int64_t scale_row = b * c.k_scale_b + kg * c.k_scale_g + s * c.k_scale_s;
    const float x = number_at(c.k, c.k_scale, c, row, scale_row, h);
    if (c.rotary_cos == NULL) return x;
    const int64_t P = c.H / 2, p = h % P;
    const float other = number_at(c.k, c.k_scale, c, row, scale_row, h < P ? h + P : p);
    return x * c.rotary_cos[s * c.rotary_s + p] + (h < P ? -other : other) * c.rotary_sin[s * c.rotary_s + p];
}

// What the distance of query l and key s adds for head n, to the score or to the log weight.
static float distance_bias(const ba_call& c, int64_t n, int64_t l, int64_t s) {
    const float distance = static_cast<float>(s - l - c.slopes_from);
    return c.slopes[n] * (c.slopes_inside != 0 || distance < 0.0f ? distance : -distance);
}

// A row of expressive attention in double precision, for scores so small that float32 loses their squares.
// Returns its normaliser, 0 if there is no weight at all; `weights` (S) are normalised, and written where causality
// leaves keys.
static double careful_row(const ba_call& c, const Restriction& r, int64_t b, int64_t n, int64_t l, double* weights) {
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t g = n / (c.N / c.G);
    const void* q = shifted(c.q, b * c.q_b + n * c.q_n + l * c.q_l, bf16);
    const bool inside = c.slopes != NULL && c.slopes_inside != 0;
    bool zero = !inside;
    for (int64_t h = 0; h < c.H && zero; ++h) zero = load_row({q, bf16}, h, 1)[0] == 0.0f;
    double most = -HUGE_VAL;
    const int64_t begin = first_key(r, l), end = end_key(r, l);
    for (int64_t s = begin; s < (zero ? begin : end); ++s) {
        float bias;
        double z = 0.0;
        if (sees(r, l, s, &bias)) {
            for (int64_t h = 0; h < c.H; ++h)
                z += static_cast<double>(load_row({q, bf16}, h, 1)[0]) * key_at(c, b, g, s, h);
            z *= c.scale;
            if (inside) z += static_cast<double>(distance_bias(c, n, l, s));
            else if (c.slopes != NULL) bias += distance_bias(c, n, l, s);
        }
        // In logarithms, where nothing underflows: 2 log|z| - log(1 + z^2) + bias.
        weights[s] = z == 0.0 ? -HUGE_VAL : 2.0 * log(fabs(z)) - log1p(z * z) + static_cast<double>(bias);
        if (weights[s] > most) most = weights[s];
    }
    if (most == -HUGE_VAL) {
        for (int64_t s = begin; s < end; ++s) weights[s] = 0.0;
        return 0.0;
    }
    double total = 0.0;
    for (int64_t s = begin; s < end; ++s) total += weights[s] = exp(weights[s] - most);
    for (int64_t s = begin; s < end; ++s) weights[s] /= total;
    return total;
}

// Output and stats of such a row. Its stats say (0, 0): the backward pass does it again in the same way.
static void careful_forward(const ba_call& c, int64_t b, int64_t n, int64_t l, float* scratch) {
    double* weights = reinterpret_cast<double*>(scratch);
    const bool bf16 = c.dtype == BA_BF16;
    const Restriction hide = restriction(c, b, n);
    const double total = careful_row(c, hide, b, n, l, weights);
    const int64_t begin = first_key(hide, l), end = end_key(hide, l);
    const Drops drops = drops_of(c);
    const uint64_t row = row_of(c, b, n, l);
    for (int64_t s = begin; s < end; ++s) weights[s] *= factor_of(drops, row, s);
    const int64_t g = value_head(c, n / (c.N / c.G));
    void* out = shifted(c.out, b * c.out_b + n * c.out_n + l * c.out_l, bf16);
    for (int64_t w = 0; w < c.W; ++w) {
        double sum = 0.0;
        for (int64_t s = begin; s < (total > 0.0 ? end : begin); ++s)
            if (weights[s] != 0.0)
                sum += weights[s] *
                    number_at(c.v, c.v_scale, c, b * c.v_b + g * c.v_g + s * c.v_s,
                        b * c.v_scale_b + g * c.v_scale_g + s * c.v_scale_s, w);
        store_row(out, bf16, w, fill(static_cast<float>(sum)), 1);
    }
    if (c.stats != NULL) {
        float* stats = c.stats + 2 * ((b * c.N + n) * c.L + l);
        stats[0] = total > 0.0 ? 0.0f : INF;
        stats[1] = 0.0f;
    }
}

template <int SCORE>
static void one_panel(const Forward& f, Panel& p, int64_t b, int64_t n, int64_t index) {
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t from = index * f.cut.vectors / f.cut.count, to = (index + 1) * f.cut.vectors / f.cut.count;
    const int64_t vectors = to - from;
    p.l0 = from * LANES;
    p.pitch = vectors * LANES;
    p.rows = c.L - p.l0 < p.pitch ? c.L - p.l0 : p.pitch;
    p.empty = true;
    for (int64_t lane = 0; lane < p.pitch; lane += LANES) {
        store(p.total + lane, V{});
        store(p.shift + lane, fill(-INF));
    }
    const float factor = static_cast<float>(c.scale);
    turn_rows({shifted(c.q, b * c.q_b + n * c.q_n + p.l0 * c.q_l, bf16), bf16}, c.q_l, p.rows, c.H, factor, p.q,
        p.pitch);
    if (p.drops.any) row_numbers(p.drops, row_of(c, b, n, p.l0), p.rows, p.pitch, p.numbers);
    p.asked = 0;
    p.rows_out = static_cast<char*>(shifted(c.out, b * c.out_b + n * c.out_n + p.l0 * c.out_l, bf16));
    p.next_q = static_cast<const char*>(shifted(c.q, b * c.q_b + n * c.q_n + (p.l0 + p.pitch) * c.q_l, bf16));
    p.rows_ahead = c.L - p.l0 - p.pitch;
    p.span = end_key(p.hide, p.l0 + p.rows - 1) - first_key(p.hide, p.l0);
    band_blocks(p.hide, p.l0, p.rows, vectors, p.keys,
        [&](int64_t some, int64_t lane, int64_t s0, int64_t n) { block_of<SCORE>(p, some, lane, s0, n); });
    if (p.empty) memset(p.out, 0, static_cast<size_t>(c.W * p.pitch) * sizeof(float));
    float* inverse = p.rescale;
    for (int64_t lane = 0; lane < p.pitch; lane += LANES) {
        const V total = load(p.total + lane);
        store(inverse + lane, select(total == 0.0f, V{}, 1.0f / total));
    }
    turn_back(p.out, p.pitch, inverse, p.rows_out, bf16, c.out_l, p.rows, c.W);
    float* stats = c.stats == NULL ? NULL : c.stats + 2 * ((b * c.N + n) * c.L + p.l0);
    for (int64_t l = 0; l < p.rows; ++l) {
        const float total = p.total[l];
        if (stats != NULL) {
            stats[2 * l] = total == 0.0f ? INF : total;
            stats[2 * l + 1] = p.shift[l] == -INF ? 0.0f : p.shift[l];
        }
        if (SCORE == BA_EXPRESSIVE && total < FAINT) careful_forward(c, b, n, p.l0 + l, p.spare);
    }
}

// Panels [from, to) of one head; `more`: the next head follows on this thread.
static void one_head(const Forward& f, int64_t head, int64_t from, int64_t to, bool more, float* scratch) {
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t n = head % c.N, b = head / c.N, g = n / (c.N / c.G);
    const int64_t pitch = f.wide * LANES;
    Panel p;
    p.c = &c;
    p.hide = restriction(c, b, n);
    p.drops = drops_of(c);
    p.keys = f.keys;
    float* at = scratch;
    p.q = at, at += c.H * pitch;
    p.out = at, at += c.W * pitch;
    p.z = at, at += f.keys * pitch;
    p.tile = at, at += f.keys * pitch;
    p.total = at, at += pitch;
    p.shift = at, at += pitch;
    p.rescale = at, at += pitch;
    p.numbers = at, at += 2 * pitch;
    const Row k = {shifted(c.k, b * c.k_b + key_head(c, g) * c.k_g, bf16), bf16};
    const Row v = {shifted(c.v, b * c.v_b + value_head(c, g) * c.v_g, bf16), bf16};
    p.k = static_cast<const float*>(k.p), p.k_s = c.k_s;
    p.v = static_cast<const float*>(v.p), p.v_s = c.v_s;
    const int64_t last = to * f.cut.vectors / f.cut.count * LANES - 1;
    const int64_t begin = first_key(p.hide, from * f.cut.vectors / f.cut.count * LANES);
    const int64_t end = end_key(p.hide, last < c.L ? last : c.L - 1), count = end > begin ? end - begin : 0;
    if (f.copy_k) {
        copy_rows({shifted(k.p, begin * c.k_s, bf16), bf16}, c.k_s, count, c.H, at, f.Hp);
        p.k = at - begin * f.Hp, p.k_s = f.Hp, at += count * f.Hp;
    }
    if (f.copy_v && f.copy_k && one_tensor(c)) {
        p.v = p.k, p.v_s = p.k_s;
    } else if (f.copy_v) {
        copy_rows({shifted(v.p, begin * c.v_s, bf16), bf16}, c.v_s, count, c.W, at, f.Wp);
        p.v = at - begin * f.Wp, p.v_s = f.Wp, at += count * f.Wp;
    }
    p.spare = at;
    for (int64_t i = from; i < to; ++i) {
        p.next_k = p.next_v = NULL;
        if (more && i == from) {
            const int64_t next = head + 1, nb = next / c.N, ng = next % c.N / (c.N / c.G);
            p.next_k = static_cast<const char*>(shifted(c.k, nb * c.k_b + key_head(c, ng) * c.k_g, bf16));
            p.next_v = static_cast<const char*>(shifted(c.v, nb * c.v_b + value_head(c, ng) * c.v_g, bf16));
        }
        c.score == BA_SOFTMAX ? one_panel<BA_SOFTMAX>(f, p, b, n, i) : one_panel<BA_EXPRESSIVE>(f, p, b, n, i);
    }
}

static void forward_task(void* context, int64_t task, float* scratch) {
    const Forward& f = *static_cast<const Forward*>(context);
    if (f.chunks > 1) {
        const int64_t chunk = task % f.chunks;
        one_head(f, task / f.chunks, chunk * f.cut.count / f.chunks, (chunk + 1) * f.cut.count / f.chunks, false, scratch);
        return;
    }
    const int64_t heads = f.c->B * f.c->N, end = (task + 1) * f.run < heads ? (task + 1) * f.run : heads;
    for (int64_t head = task * f.run; head < end; ++head) one_head(f, head, 0, f.cut.count, f.copy_k && head + 1 < end, scratch);
}

static Forward plan_forward(const ba_call& c) {
    Forward f = {};
    f.c = &c;
    f.wide = BA_WIDE;
    f.cut = panels(c.L, f.wide);
    if (f.cut.vectors < f.wide) f.wide = f.cut.vectors;
    f.keys = block_keys(c, f.wide);
    f.Hp = (c.H + LANES - 1) / LANES * LANES;
    f.Wp = (c.W + LANES - 1) / LANES * LANES;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t heads = c.B * c.N;
    const int64_t wanted = (4 * c.threads + heads - 1) / heads;
    f.chunks = c.threads == 1 || heads >= 4 * c.threads ? 1 : wanted < f.cut.count ? wanted : f.cut.count;
    const int64_t together = run_panels(c, f.cut, f.wide), runs = (f.cut.count + together - 1) / together;
    if (f.chunks < runs) f.chunks = runs;
    const int64_t keys = run_keys(c, f.cut, f.wide);
    f.run = heads / (16 * c.threads) > 1 ? heads / (16 * c.threads) : 1;
    // Rows that lie apart fall on few sets of the caches and on many pages: in one piece, if they are read repeatedly.
    f.copy_k = bf16 || f.cut.count > 1;
    f.copy_v = bf16 || f.cut.count > 1;
    int64_t spare = tile_spare(f.wide * LANES, f.keys > LANES ? f.keys : LANES);
    if (c.score == BA_EXPRESSIVE && spare < 2 * c.S + 2) spare = 2 * c.S + 2;
    f.floats = f.wide * LANES * (c.H + c.W + 2 * f.keys + 5) + spare + (f.copy_k ? keys * f.Hp : 0) +
        (f.copy_v ? keys * f.Wp : 0);
    return f;
}

static int64_t wide_forward(const ba_call& c) {
    Forward f = plan_forward(c);
    const int64_t heads = c.B * c.N;
    return ba_parallel(c.threads, f.chunks > 1 ? heads * f.chunks : (heads + f.run - 1) / f.run, f.floats, forward_task, &f);
}

}  // namespace
}  // namespace BA_ISA
