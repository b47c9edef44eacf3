// A small layer's self-attention from input to output in one call: one batch element after another, all of it in the
// caches, and nothing between operators but these lines.

namespace BA_ISA {
namespace {

struct Layer {
    const ba_layer* c;
    int64_t Dp, floats;
    const float *wq, *wk, *wv, *wo;  // turned over: [D][Dp], or NULL for the identity
};

// y = x W^T + b for n rows; `turned` is W, turned over.
static void project(
    const Layer& f, const float* x, int64_t x_s, int64_t n, const float* turned, const void* bias, float* y) {
    const int64_t D = f.c->D;
    wide_product<false>(f.Dp / LANES, n, D, x, x_s, turned, f.Dp, y, f.Dp, false);
    if (bias == NULL) return;
    for (int64_t i = 0; i < D; i += LANES) {
        const V b = load_row({bias, false}, i, D - i);
        for (int64_t r = 0; r < n; ++r) store(y + r * f.Dp + i, load(y + r * f.Dp + i) + b);
    }
}

static void layer_task(void* context, int64_t b, float* scratch) {
    const Layer& f = *static_cast<const Layer*>(context);
    const ba_layer& c = *f.c;
    const float* x = static_cast<const float*>(c.x) + b * c.x_b;
    const int64_t H = c.D / c.N, size = c.L * f.Dp;
    float *q = scratch, *k = q + size, *v = k + size, *aligned = v + size, *heads = aligned + size, *rest = heads + size;
    ba_call call = {};
    call.threads = 1;
    call.score = c.score, call.causal = c.causal, call.scale = c.scale;
    call.B = 1, call.N = c.N, call.G = c.N, call.L = c.L, call.S = c.L, call.H = H, call.W = H;
    call.mask_type = call.padding_type = BA_NONE;
    call.q = x, call.k = x, call.v = x;
    call.q_l = call.k_s = call.v_s = c.x_l;
    call.q_n = call.k_g = call.v_g = H;
    if (f.wq) project(f, x, c.x_l, c.L, f.wq, c.bq, q), call.q = q, call.q_l = f.Dp;
    if (f.wk) project(f, x, c.x_l, c.L, f.wk, c.bk, k), call.k = k, call.k_s = f.Dp;
    if (f.wv) project(f, x, c.x_l, c.L, f.wv, c.bv, v), call.v = v, call.v_s = f.Dp;
    if (c.wa != NULL) {
        const float* values = static_cast<const float*>(call.v);
        int64_t values_s = call.v_s;
        if (!f.wv && f.Dp != c.D) {  // rows that end within a vector
            copy_rows({x, false}, c.x_l, c.L, c.D, v, f.Dp);
            values = v, values_s = f.Dp;
        }
        wide_product<false>(f.Dp / LANES, c.L, c.L, static_cast<const float*>(c.wa), c.wa_i, values, values_s, aligned, f.Dp,
            false);
        for (int64_t l = 0; c.ba != NULL && l < c.L; ++l)
            for (int64_t i = 0; i < f.Dp; i += LANES)
                store(aligned + l * f.Dp + i, load(aligned + l * f.Dp + i) + static_cast<const float*>(c.ba)[l]);
        call.v = aligned, call.v_s = f.Dp;
    }
    float* out = static_cast<float*>(c.out) + b * c.L * c.D;
    call.out = f.wo ? heads : out;
    call.out_n = H, call.out_l = f.wo ? f.Dp : c.D;
    const Forward forward = plan_forward(call);
    for (int64_t n = 0; n < c.N; ++n) one_head(forward, n, 0, forward.cut.count, false, rest);
    if (!f.wo) return;
    if (f.Dp == c.D) {
        project(f, heads, f.Dp, c.L, f.wo, c.bo, out);
        return;
    }
    project(f, heads, f.Dp, c.L, f.wo, c.bo, q);
    for (int64_t l = 0; l < c.L; ++l) memcpy(out + l * c.D, q + l * f.Dp, static_cast<size_t>(c.D) * sizeof(float));
}

static int64_t whole_layer(const ba_layer& c) {
    Layer f = {};
    f.c = &c;
    f.Dp = (c.D + LANES - 1) / LANES * LANES;
    const void* given[4] = {c.wq, c.wk, c.wv, c.wo};
    const float** turned[4] = {&f.wq, &f.wk, &f.wv, &f.wo};
    float* memory = ba_allocate(4 * c.D * f.Dp);
    if (memory == NULL) return BA_NO_MEMORY;
    for (int i = 0; i < 4; ++i) {
        if (given[i] == NULL) continue;
        turn_rows({given[i], false}, c.D, c.D, c.D, 1.0f, memory + i * c.D * f.Dp, f.Dp);
        *turned[i] = memory + i * c.D * f.Dp;
    }
    ba_call like = {};
    like.threads = 1;
    like.B = 1, like.N = c.N, like.G = c.N, like.L = c.L, like.S = c.L, like.H = like.W = c.D / c.N;
    like.score = c.score;
    f.floats = 5 * c.L * f.Dp + plan_forward(like).floats;
    const int64_t status = ba_parallel(c.threads, c.B, f.floats, layer_task, &f);
    ba_release(memory);
    return status;
}

}  // namespace
}  // namespace BA_ISA
