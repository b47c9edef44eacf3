// The backward pass: weights are computed again, block by block, and five products give the three gradients.
//
// A task owns the keys and values of one head (of one group of heads), so that their gradients are sums in a fixed
// order. Where there are too few heads to share out, a head's panels are split in parts that are added up afterwards;
// how many follows from the shape alone, so that results do not depend on the number of threads.

namespace BA_ISA {
namespace {

constexpr int64_t PARTS = 8;  // tasks wanted at least

struct Backward {
    const ba_call* c;
    Panels cut;
    int64_t wide, keys, Hp, Wp, parts, run, floats;
    int64_t together, span;  // panels that share one copy of their keys, and the most keys of one
    bool copy_k, copy_v, shared;
    bool copy_q, copy_grad;  // whether rows that serve as vectors have to be converted or filled up first
    bool direct_k, direct_v; // whether gradients of k and v are summed where they belong
    float* sums;  // of the parts, or NULL where there is one part only
};

struct BackPanel {
    const ba_call* c;
    Restriction hide;
    Drops drops;
    const float *k, *v;
    int64_t k_s, v_s, Hp, Wp, l0, rows, pitch;
    float *q, *grad, *dq;            // turned over: [H or W][pitch]
    float *q_copy, *grad_copy;       // [pitch][Hp or Wp]
    const float *q_rows, *grad_rows; // as they lie
    int64_t q_s, grad_s;
    float *z, *dp, *tile, *spare, *kept;
    float *inverse, *shift, *delta, *numbers;
    float *dk, *dv;  // rows of Hp and Wp; the same memory if k and v are one tensor
    int64_t dk_s, dv_s, zeroed;  // zeroed: rows of dk and dv that hold sums; what lies behind holds anything
    float *k_copy, *v_copy;
};

template <int NV, int SCORE>
static __attribute__((noinline)) void slope_any(BackPanel& p, int mode, const Edge& edge, int64_t lane, int64_t n) {
    const float scale = static_cast<float>(p.c->scale);
    float *z = p.z + lane, *dp = p.dp + lane;
    const float *tile = p.tile + lane, *inv = p.inverse + lane, *shift = p.shift + lane, *delta = p.delta + lane;
    switch (mode) {
    case FREE: return slope<NV, SCORE, FREE>(z, dp, n, p.pitch, tile, edge, inv, shift, delta, scale);
    case EDGE: return slope<NV, SCORE, EDGE>(z, dp, n, p.pitch, tile, edge, inv, shift, delta, scale);
    case HIDING: return slope<NV, SCORE, HIDING>(z, dp, n, p.pitch, tile, edge, inv, shift, delta, scale);
    default: return slope<NV, SCORE, BIASED>(z, dp, n, p.pitch, tile, edge, inv, shift, delta, scale);
    }
}

template <int NV> BA_INLINE void times(float* x, const float* factors, int64_t n, int64_t pitch) {
    for (int64_t s = 0; s < n; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            float* p = x + s * pitch + v * LANES;
            store(p, load(p) * load(factors + s * pitch + v * LANES));
        }
}

template <int NV, int SCORE>
static void back_block(BackPanel& p, int64_t lane, int64_t s0, int64_t n) {
    const State state = mask_tile(p.hide, p.l0, p.rows, s0, n, p.pitch, p.tile, p.spare);
    if (state == CLOSED) return;
    const int64_t query = p.l0 + lane;
    const Edge edge = edge_of(p.hide, query, query + NV * LANES - 1, s0, n);
    const int mode = state == BIASES ? BIASED : state == HIDES ? HIDING : edge.any ? EDGE : FREE;
    const int64_t H = p.c->H, W = p.c->W;
    const float *k = p.k + s0 * p.k_s, *v = p.v + s0 * p.v_s;
    for (int64_t h = 0; h < H; h += DEPTH)
        product<NV, false>(n, H - h < DEPTH ? H - h : DEPTH, k + h, p.k_s, p.q + h * p.pitch + lane, p.pitch,
            p.z + lane, p.pitch, h > 0);
    for (int64_t w = 0; w < W; w += DEPTH)
        product<NV, false>(n, W - w < DEPTH ? W - w : DEPTH, v + w, p.v_s, p.grad + w * p.pitch + lane, p.pitch,
            p.dp + lane, p.pitch, w > 0);
    if (p.drops.any) {  // w reaches the output, and dL/dw comes back, by way of the factor that dropout gave it
        drop<NV, false>(p.drops, p.numbers + lane, s0, n, p.pitch, p.kept + lane);
        times<NV>(p.dp + lane, p.kept + lane, n, p.pitch);
    }
    slope_any<NV, SCORE>(p, mode, edge, lane, n);
    if (p.drops.any) times<NV>(p.z + lane, p.kept + lane, n, p.pitch);
    const int64_t left = p.rows - lane;  // queries beyond the last take no part
    const int64_t rows = left < NV * LANES ? left : NV * LANES;
    wide_product<false>(p.Wp / LANES, n, rows, p.z + lane, p.pitch, p.grad_rows + lane * p.grad_s,
        p.grad_s, p.dv + s0 * p.dv_s, p.dv_s, true);
    wide_product<false>(p.Hp / LANES, n, rows, p.dp + lane, p.pitch, p.q_rows + lane * p.q_s, p.q_s,
        p.dk + s0 * p.dk_s, p.dk_s, true);
    product<NV, true>(H, n, k, p.k_s, p.dp + lane, p.pitch, p.dq + lane, p.pitch, true);
}

template <int SCORE>
static void back_block_of(BackPanel& p, int64_t vectors, int64_t lane, int64_t s0, int64_t n) {
    switch (vectors) {
    case 1: return back_block<1, SCORE>(p, lane, s0, n);
    case 2: return back_block<2, SCORE>(p, lane, s0, n);
#if BA_WIDE == 4
    case 3: return back_block<3, SCORE>(p, lane, s0, n);
    default: return back_block<4, SCORE>(p, lane, s0, n);
#endif
    }
}

// A row that careful_forward computed, in the same way.
static void careful_backward(BackPanel& p, int64_t b, int64_t n, int64_t l) {
    const ba_call& c = *p.c;
    const bool bf16 = c.dtype == BA_BF16;
    double* weights = reinterpret_cast<double*>(p.spare);
    const int64_t g = n / (c.N / c.G);
    careful_row(c, p.hide, b, n, l, weights);
    const void* q = shifted(c.q, b * c.q_b + n * c.q_n + l * c.q_l, bf16);
    const float* grad = p.grad_rows + (l - p.l0) * p.grad_s;
    const uint64_t row = row_of(c, b, n, l);
    double share = 0.0;
    for (int pass = 0; pass < 2; ++pass)
        for (int64_t s = first_key(p.hide, l); s < end_key(p.hide, l); ++s) {
            if (weights[s] == 0.0) continue;
            const void* k = shifted(c.k, b * c.k_b + key_head(c, g) * c.k_g + s * c.k_s, bf16);
            const float* v = p.v + s * p.v_s;
            double dw = 0.0;
            for (int64_t w = 0; w < c.W; ++w) dw += static_cast<double>(grad[w]) * v[w];
            const double kept = factor_of(p.drops, row, s);
            dw *= kept;
            if (pass == 0) {
                share += weights[s] * dw;
                continue;
            }
            double z = 0.0;
            for (int64_t h = 0; h < c.H; ++h)
                z += static_cast<double>(load_row({q, bf16}, h, 1)[0]) * load_row({k, bf16}, h, 1)[0];
            z *= c.scale;
            const double dz = weights[s] * 2.0 / (z * (1.0 + z * z)) * (dw - share) * c.scale;
            for (int64_t w = 0; w < c.W; ++w) p.dv[s * p.dv_s + w] += static_cast<float>(kept * weights[s] * grad[w]);
            for (int64_t h = 0; h < c.H; ++h) {
                p.dk[s * p.dk_s + h] += static_cast<float>(dz * load_row({q, bf16}, h, 1)[0]);
                p.dq[h * p.pitch + (l - p.l0)] += static_cast<float>(dz * load_row({k, bf16}, h, 1)[0]);
            }
        }
}

// The normaliser's share in the derivative of each row: the product of its result and that one's gradient.
static void delta_of(BackPanel& p, Row out) {
    const ba_call& c = *p.c;
    for (int64_t lane = 0; lane < p.pitch; lane += LANES) {
        V x[BA_LANES];
        for (int64_t r = 0; r < LANES; ++r) {
            const int64_t l = lane + r;
            x[r] = V{};
            if (l < p.rows)
                for (int64_t w = 0; w < c.W; w += LANES)
                    x[r] += load(p.grad_rows + l * p.grad_s + w) *
                        load_row({shifted(out.p, l * c.out_l, out.bf16), out.bf16}, w, c.W - w);
        }
        turn_over<1>(x);
        V sum = x[0];
        for (int r = 1; r < BA_LANES; ++r) sum += x[r];
        store(p.delta + lane, sum);
    }
}

template <int SCORE>
static void back_panel(const Backward& f, BackPanel& p, int64_t b, int64_t n, int64_t index) {
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t from = index * f.cut.vectors / f.cut.count, to = (index + 1) * f.cut.vectors / f.cut.count;
    const int64_t vectors = to - from;
    p.l0 = from * LANES;
    p.pitch = vectors * LANES;
    p.rows = c.L - p.l0 < p.pitch ? c.L - p.l0 : p.pitch;
    p.hide = restriction(c, b, n);
    if (p.drops.any) row_numbers(p.drops, row_of(c, b, n, p.l0), p.rows, p.pitch, p.numbers);
    const Row q = {shifted(c.q, b * c.q_b + n * c.q_n + p.l0 * c.q_l, bf16), bf16};
    const Row grad = {shifted(c.grad, b * c.grad_b + n * c.grad_n + p.l0 * c.grad_l, bf16), bf16};
    const float factor = static_cast<float>(c.scale);
    turn_rows(q, c.q_l, p.rows, c.H, factor, p.q, p.pitch);
    turn_rows(grad, c.grad_l, p.rows, c.W, 1.0f, p.grad, p.pitch);
    p.q_rows = static_cast<const float*>(q.p), p.q_s = c.q_l;
    p.grad_rows = static_cast<const float*>(grad.p), p.grad_s = c.grad_l;
    if (f.copy_q) {
        copy_rows(q, c.q_l, p.rows, c.H, p.q_copy, p.Hp);
        p.q_rows = p.q_copy, p.q_s = p.Hp;
    }
    if (f.copy_grad) {
        copy_rows(grad, c.grad_l, p.rows, c.W, p.grad_copy, p.Wp);
        p.grad_rows = p.grad_copy, p.grad_s = p.Wp;
    }
    memset(p.dq, 0, static_cast<size_t>(c.H * p.pitch) * sizeof(float));
    const float* stats = c.stats + 2 * ((b * c.N + n) * c.L + p.l0);
    bool faint = false;
    for (int64_t l = 0; l < p.pitch; ++l) {
        // Rows without weight, rows to be done in double precision and lanes beyond the last row add nothing here.
        const float total = l < p.rows ? stats[2 * l] : INF;
        p.inverse[l] = total == 0.0f ? 0.0f : 1.0f / total;
        p.shift[l] = l < p.rows ? stats[2 * l + 1] : 0.0f;
        faint |= total == 0.0f;
    }
    if (c.delta != NULL) {
        const float* delta = c.delta + (b * c.N + n) * c.L + p.l0;
        for (int64_t l = 0; l < p.pitch; ++l) p.delta[l] = l < p.rows ? delta[l] : 0.0f;
    } else {
        delta_of(p, {shifted(c.out, b * c.out_b + n * c.out_n + p.l0 * c.out_l, bf16), bf16});
    }
    band_blocks(p.hide, p.l0, p.rows, vectors, f.keys,
        [&](int64_t some, int64_t lane, int64_t s0, int64_t n) { back_block_of<SCORE>(p, some, lane, s0, n); });
    if (SCORE == BA_EXPRESSIVE && faint)
        for (int64_t l = 0; l < p.rows; ++l)
            if (stats[2 * l] == 0.0f) careful_backward(p, b, n, p.l0 + l);
    for (int64_t l = 0; l < p.pitch; ++l) p.delta[l] = 1.0f;
    turn_back(p.dq, p.pitch, p.delta, shifted(c.dq, b * c.dq_b + n * c.dq_n + p.l0 * c.dq_l, bf16), bf16, c.dq_l, p.rows,
        c.H);
}

static void write_rows(const float* sums, int64_t pitch, void* rows, bool bf16, int64_t stride, int64_t n, int64_t width) {
    for (int64_t r = 0; r < n; ++r)
        for (int64_t i = 0; i < width; i += LANES)
            store_row(shifted(rows, r * stride, bf16), bf16, i, load(sums + r * pitch + i), width - i);
}

static int64_t sums_of_part(const Backward& f) { return f.c->S * (f.Hp + (f.shared ? 0 : f.Wp)); }

static void zero_sums(const Backward& f, BackPanel& p, int64_t end) {
    for (; p.zeroed < end; ++p.zeroed) {
        memset(p.dk + p.zeroed * p.dk_s, 0, static_cast<size_t>(f.Hp) * sizeof(float));
        if (!f.shared) memset(p.dv + p.zeroed * p.dv_s, 0, static_cast<size_t>(f.Wp) * sizeof(float));
    }
}

// The keys and values that a run of panels sees, and their gradients' sums.
static void bring_keys(const Backward& f, BackPanel& p, Row k, Row v, int64_t run) {
    const ba_call& c = *f.c;
    const int64_t from = run * f.together, to = from + f.together < f.cut.count ? from + f.together : f.cut.count;
    const int64_t last = to * f.cut.vectors / f.cut.count * LANES - 1;
    const int64_t begin = first_key(p.hide, from * f.cut.vectors / f.cut.count * LANES);
    const int64_t end = end_key(p.hide, last < c.L ? last : c.L - 1), count = end > begin ? end - begin : 0;
    zero_sums(f, p, end);
    if (p.k_copy != NULL) {
        copy_rows({shifted(k.p, begin * c.k_s, k.bf16), k.bf16}, c.k_s, count, c.H, p.k_copy, f.Hp);
        p.k = p.k_copy - begin * f.Hp, p.k_s = f.Hp;
    }
    if (p.k_copy != NULL && f.shared) p.v = p.k, p.v_s = p.k_s;
    if (p.v_copy == NULL) return;
    copy_rows({shifted(v.p, begin * c.v_s, v.bf16), v.bf16}, c.v_s, count, c.W, p.v_copy, f.Wp);
    p.v = p.v_copy - begin * f.Wp, p.v_s = f.Wp;
}

// One part of the queries of one head of keys.
static void back_head(const Backward& f, int64_t b, int64_t g, int64_t part, float* scratch) {
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t pitch = f.wide * LANES;
    BackPanel p = {};
    p.c = &c;
    p.drops = drops_of(c);
    p.Hp = f.Hp;
    p.Wp = f.Wp;
    float* at = scratch;
    p.q = at, at += c.H * pitch;
    p.dq = at, at += c.H * pitch;
    p.grad = at, at += c.W * pitch;
    p.q_copy = at, at += f.Hp * pitch;
    p.grad_copy = at, at += f.Wp * pitch;
    p.z = at, at += f.keys * pitch;
    p.dp = at, at += f.keys * pitch;
    p.tile = at, at += f.keys * pitch;
    if (p.drops.any) p.kept = at, at += f.keys * pitch;
    p.inverse = at, at += pitch;
    p.shift = at, at += pitch;
    p.delta = at, at += pitch;
    p.numbers = at, at += 2 * pitch;
    const Row k = {shifted(c.k, b * c.k_b + key_head(c, g) * c.k_g, bf16), bf16};
    const Row v = {shifted(c.v, b * c.v_b + value_head(c, g) * c.v_g, bf16), bf16};
    p.k = static_cast<const float*>(k.p), p.k_s = c.k_s;
    p.v = static_cast<const float*>(v.p), p.v_s = c.v_s;
    if (f.copy_k) p.k_copy = at, at += f.span * f.Hp;
    if (f.copy_v && !(f.copy_k && f.shared)) p.v_copy = at, at += f.span * f.Wp;
    float* sums = at;
    if (f.sums == NULL) at += sums_of_part(f);
    else sums = f.sums + ((b * c.G + g) * f.parts + part) * sums_of_part(f);
    p.dk = f.direct_k ? static_cast<float*>(c.dk) + b * c.dk_b + g * c.dk_g : sums;
    p.dk_s = f.direct_k ? c.dk_s : f.Hp;
    if (f.shared) {
        p.dv = p.dk, p.dv_s = p.dk_s;
    } else {
        p.dv = f.direct_v ? static_cast<float*>(c.dv) + b * c.dv_b + g * c.dv_g : sums + c.S * f.Hp;
        p.dv_s = f.direct_v ? c.dv_s : f.Wp;
    }
    p.spare = at;
    p.zeroed = 0;
    p.hide = restriction(c, b, g * (c.N / c.G));
    const int64_t group = c.N / c.G, all = group * f.cut.count, end = (part + 1) * all / f.parts;
    for (int64_t i = part * all / f.parts, copied = -1; i < end; ++i) {
        const int64_t n = g * group + i / f.cut.count, index = i % f.cut.count, run = index / f.together;
        if (run != copied) bring_keys(f, p, k, v, run);
        copied = run;
        c.score == BA_SOFTMAX ? back_panel<BA_SOFTMAX>(f, p, b, n, index) : back_panel<BA_EXPRESSIVE>(f, p, b, n, index);
    }
    zero_sums(f, p, c.S);
    if (f.sums != NULL) return;
    if (!f.direct_k) write_rows(p.dk, f.Hp, shifted(c.dk, b * c.dk_b + g * c.dk_g, bf16), bf16, c.dk_s, c.S, c.H);
    if (!f.shared && !f.direct_v)
        write_rows(p.dv, f.Wp, shifted(c.dv, b * c.dv_b + g * c.dv_g, bf16), bf16, c.dv_s, c.S, c.W);
}

static void backward_task(void* context, int64_t task, float* scratch) {
    const Backward& f = *static_cast<const Backward*>(context);
    const int64_t G = f.c->G;
    if (f.parts > 1) {
        back_head(f, task / f.parts / G, task / f.parts % G, task % f.parts, scratch);
        return;
    }
    const int64_t heads = f.c->B * G, end = (task + 1) * f.run < heads ? (task + 1) * f.run : heads;
    for (int64_t head = task * f.run; head < end; ++head) back_head(f, head / G, head % G, 0, scratch);
}

static void add_parts(void* context, int64_t head, float*) {
    const Backward& f = *static_cast<const Backward*>(context);
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t g = head % c.G, b = head / c.G, size = sums_of_part(f);
    float* sums = f.sums + head * f.parts * size;
    for (int64_t i = 0; i < size; i += LANES) {
        V x = load(sums + i);
        for (int64_t part = 1; part < f.parts; ++part) x += load(sums + part * size + i);
        store(sums + i, x);
    }
    write_rows(sums, f.Hp, shifted(c.dk, b * c.dk_b + g * c.dk_g, bf16), bf16, c.dk_s, c.S, c.H);
    if (!f.shared)
        write_rows(sums + c.S * f.Hp, f.Wp, shifted(c.dv, b * c.dv_b + g * c.dv_g, bf16), bf16, c.dv_s, c.S, c.W);
}

static int64_t wide_backward(const ba_call& c) {
    Backward f = {};
    f.c = &c;
    f.wide = BA_WIDE;
    f.cut = panels(c.L, f.wide);
    if (f.cut.vectors < f.wide) f.wide = f.cut.vectors > 0 ? f.cut.vectors : 1;
    f.keys = block_keys(c, f.wide);
    f.Hp = (c.H + LANES - 1) / LANES * LANES;
    f.Wp = (c.W + LANES - 1) / LANES * LANES;
    const bool bf16 = c.dtype == BA_BF16;
    f.together = run_panels(c, f.cut, f.wide);
    f.span = run_keys(c, f.cut, f.wide);
    f.shared = c.dv == NULL;
    f.copy_k = bf16 || f.cut.count > 1;
    f.copy_v = bf16 || f.cut.count > 1;
    const int64_t heads = c.B * c.G, all = c.N / (c.G > 0 ? c.G : 1) * f.cut.count;
    // Rows that lie apart on few sets of the caches, and rows that end within a vector, are copied.
    f.copy_q = bf16 || c.H % LANES != 0 || c.q_l * 4 % 2048 == 0;
    f.copy_grad = bf16 || c.W % LANES != 0 || c.grad_l * 4 % 2048 == 0;
    f.parts = heads >= PARTS || heads == 0 ? 1 : (PARTS + heads - 1) / heads;
    if (f.parts > all) f.parts = all > 0 ? all : 1;
    f.run = heads / (16 * c.threads) > 1 ? heads / (16 * c.threads) : 1;
    f.direct_k = !bf16 && f.parts == 1 && c.H % LANES == 0;
    f.direct_v = !bf16 && f.parts == 1 && c.W % LANES == 0;
    if (f.parts > 1) {
        f.sums = ba_allocate(heads * f.parts * sums_of_part(f));
        if (f.sums == NULL) return BA_NO_MEMORY;
    }
    int64_t spare = tile_spare(f.wide * LANES, f.keys);
    if (c.score == BA_EXPRESSIVE && spare < 2 * c.S + 2) spare = 2 * c.S + 2;
    f.floats = f.wide * LANES * (2 * c.H + c.W + f.Hp + f.Wp + (c.dropout > 0.0 ? 4 : 3) * f.keys + 5) + spare +
        (f.copy_k ? f.span * f.Hp : 0) + (f.copy_v ? f.span * f.Wp : 0) + (f.sums == NULL ? sums_of_part(f) : 0);
    int64_t status = ba_parallel(
        c.threads, f.parts > 1 ? heads * f.parts : (heads + f.run - 1) / f.run, f.floats, backward_task, &f);
    if (status == BA_OK && f.sums != NULL) status = ba_parallel(c.threads, heads, 0, add_parts, &f);
    ba_release(f.sums);
    return status;
}

}  // namespace
}  // namespace BA_ISA
