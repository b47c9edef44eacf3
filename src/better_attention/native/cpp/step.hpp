// A decoder's step through a layer in one call: a few new tokens are projected, turned by their places and written behind
// what the cache holds, and attend to all of it. For one token the way between operators takes as long as attention.
//
// Its products read each weight once for eight tokens: they take the time in which the weights are read.

namespace BA_ISA {

int64_t forward(const ba_call& c);

namespace {

constexpr int64_t OUTPUTS = 32;     // output features of a task
constexpr int64_t ALONE = 1 << 15;  // multiplications with which one thread is faster
constexpr float STEPS = 127.0f;     // the largest code of int8; cache/int8.py has the same

struct Map {  // y = x W^T + b for a few rows; behind the D numbers of a row of x lie zeros up to a whole vector
    const float *x, *w, *b;
    float* y;
    int64_t x_s, y_s, outputs;
};

struct Step {
    const ba_step* c;
    int64_t rows;  // of the input: tokens of all batch elements
    Map maps[3];
    int64_t count, blocks;  // of maps, and of OUTPUTS features of the widest
};

// LANES / M output features from e on, for up to M rows of the input. Features from `end` on are not there.
template <int M>
static void few_products(const Map& f, int64_t D, int64_t row, int64_t rows, int64_t e, int64_t end) {
    constexpr int R = BA_LANES / M;
    const float *x[M], *w[R];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x[m] = f.x + (row + (m < rows ? m : rows - 1)) * f.x_s;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) w[r] = f.w + (e + r < end ? e + r : end - 1) * D;
    V sum[BA_LANES];
#pragma GCC unroll 16
    for (int i = 0; i < BA_LANES; ++i) sum[i] = V{};
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        V a[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) a[m] = load(x[m] + d);
#pragma GCC unroll 16
        for (int i = 0; i < BA_LANES; ++i) sum[i] += a[i % M] * load(w[i / M] + d);
    }
    if (d < D) {
#pragma GCC unroll 16
        for (int i = 0; i < BA_LANES; ++i) sum[i] += load(x[i % M] + d) * load_some(w[i / M] + d, D - d);
    }
    const V found = row_sums<1>(sum);
    for (int r = 0; r < R && e + r < end; ++r)
        for (int m = 0; m < M && m < rows; ++m)
            f.y[(row + m) * f.y_s + e + r] = found[r * M + m] + (f.b == NULL ? 0.0f : f.b[e + r]);
}

// Features e to `end` of up to M rows from `row` on, by the fewest sums that hold them.
template <int M>
static void products_of(const Map& f, int64_t D, int64_t row, int64_t rows, int64_t e, int64_t end) {
    if constexpr (M > 1) {
        if (2 * rows <= M) return products_of<M / 2>(f, D, row, rows, e, end);
    }
    for (int64_t i = e; i < end; i += BA_LANES / M) few_products<M>(f, D, row, rows, i, end);
}

static void map_task(void* context, int64_t task, float*) {
    const Step& s = *static_cast<const Step*>(context);
    const Map& f = s.maps[task / s.blocks];
    const int64_t D = s.c->D, e = task % s.blocks * OUTPUTS, end = e + OUTPUTS < f.outputs ? e + OUTPUTS : f.outputs;
    constexpr int M = BA_LANES < 8 ? BA_LANES : 8;
    for (int64_t row = 0; row < s.rows; row += M)
        products_of<M>(f, D, row, s.rows - row < M ? s.rows - row : M, e, end);
}

static void turn_by(float* x, int64_t P, const float* cosine, const float* sine) {
    for (int64_t p = 0; p < P; ++p) {
        const float first = x[p], second = x[P + p];
        x[p] = first * cosine[p] - second * sine[p];
        x[P + p] = second * cosine[p] + first * sine[p];
    }
}

// A head's numbers as whole multiples of a scale: the largest becomes 127 or -127.
static float to_codes(const float* x, int64_t H, int8_t* codes) {
    float most = 0.0f;
    for (int64_t h = 0; h < H; ++h) {
        const float size = fabsf(x[h]);
        if (size > most || size != size) most = size;  // nothing is larger than NaN
    }
    const float scale = most / STEPS, divisor = scale == 0.0f ? 1.0f : scale;
    for (int64_t h = 0; h < H; ++h) {
        const float code = x[h] / divisor;
        codes[h] = code == code ? static_cast<int8_t>(rintf(code)) : int8_t{0};
    }
    return scale;
}

// One row of the heads of a new token into the cache, as it lies there: k or v of the call, and its scales.
static void remember(const void* rows, int64_t at, int64_t step, const float* scales, int64_t scale_at, int64_t scale_step,
    const float* x, int64_t heads, int64_t H) {
    void* to = const_cast<void*>(rows);
    for (int64_t n = 0; n < heads; ++n, at += step, scale_at += scale_step, x += H) {
        if (scales != NULL) const_cast<float*>(scales)[scale_at] = to_codes(x, H, static_cast<int8_t*>(to) + at);
        else memcpy(static_cast<float*>(to) + at, x, static_cast<size_t>(H) * sizeof(float));
    }
}

static int64_t step_through(const ba_step& c) {
    ba_call call = c.attention;
    const int64_t D = c.D, H = call.H, rows = call.B * call.L, Dp = (D + LANES - 1) / LANES * LANES;
    const int64_t heads_of[3] = {call.N, key_head(call, call.G), value_head(call, call.G)};
    float* x = ba_allocate(5 * rows * Dp);
    if (x == NULL) return BA_NO_MEMORY;
    float *q = x + rows * Dp, *k = q + rows * Dp, *v = k + rows * Dp, *heads = v + rows * Dp;
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = static_cast<const float*>(c.x) + row / call.L * c.x_b + row % call.L * c.x_l;
        memcpy(x + row * Dp, from, static_cast<size_t>(D) * sizeof(float));
        for (int64_t d = D; d < Dp; ++d) x[row * Dp + d] = heads[row * Dp + d] = 0.0f;
    }
    Step s = {};
    s.c = &c, s.rows = rows, s.blocks = (D + OUTPUTS - 1) / OUTPUTS;
    const int64_t threads = rows * D * D < ALONE ? 1 : call.threads;
    const void *weights[3] = {c.wq, c.wk, c.wv}, *biases[3] = {c.bq, c.bk, c.bv};
    float* results[3] = {q, k, v};
    for (int i = 0; i < 3; ++i) {
        if (weights[i] != NULL)
            s.maps[s.count++] = {
                x, static_cast<const float*>(weights[i]), static_cast<const float*>(biases[i]), results[i], Dp, Dp, heads_of[i] * H};
        else if (i == 0) memcpy(q, x, static_cast<size_t>(rows * Dp) * sizeof(float));  // which may be turned
        else results[i] = x;
    }
    int64_t status = ba_parallel(threads, s.count * s.blocks, 0, map_task, &s);
    const bool shared = call.k == call.v;
    for (int64_t row = 0; status == BA_OK && row < rows; ++row) {
        const int64_t b = row / call.L, l = row % call.L, place = call.S - call.L + l;
        for (int i = 0; c.new_cos != NULL && i < (c.wk != NULL ? 2 : 1); ++i)
            for (int64_t n = 0; n < heads_of[i]; ++n)
                turn_by(results[i] + row * Dp + n * H, H / 2, c.new_cos + l * (H / 2), c.new_sin + l * (H / 2));
        remember(call.k, b * call.k_b + place * call.k_s, call.k_g, call.k_scale,
            b * call.k_scale_b + place * call.k_scale_s, call.k_scale_g, results[1] + row * Dp, heads_of[1], H);
        if (shared) continue;
        remember(call.v, b * call.v_b + place * call.v_s, call.v_g, call.v_scale,
            b * call.v_scale_b + place * call.v_scale_s, call.v_scale_g, results[2] + row * Dp, heads_of[2], H);
    }
    call.q = q, call.out = heads;
    call.q_l = call.out_l = Dp, call.q_b = call.out_b = call.L * Dp, call.q_n = call.out_n = H;
    if (status == BA_OK) status = forward(call);
    float* out = static_cast<float*>(c.out);
    if (status == BA_OK && c.wo != NULL) {
        s.count = 1;
        s.maps[0] = {heads, static_cast<const float*>(c.wo), static_cast<const float*>(c.bo), out, Dp, D, D};
        status = ba_parallel(threads, s.blocks, 0, map_task, &s);
    }
    for (int64_t row = 0; c.wo == NULL && row < rows; ++row)
        memcpy(out + row * D, heads + row * Dp, static_cast<size_t>(D) * sizeof(float));
    ba_release(x);
    return status;
}

}  // namespace
}  // namespace BA_ISA
