#include "kernel_attention.hpp"

namespace {

void fill_queries_and_keys(const Case &c, Inputs &in, Random &r) {
    const bool softmax = c.score == BA_SOFTMAX;
    in.q.fill([&](int64_t b, int64_t n, int64_t l, int64_t h) {
        const double x = r.normal();
        switch (c.fill) {
        case SCALED: case LOUD_HIDDEN: return c.amount * x;
        case SCALED_ODD_ROWS: return l % 2 ? c.amount * x : x;
        case RAMP_UP: case RAMP_DOWN: return softmax && h == 0 ? std::sqrt((double)c.H) : x;
        case EXACT: return (double)(r.below(17) - 8);
        case EQUAL: return 0.5 + 0.11 * (double)l;
        case SOME_ZERO: return (b + n + l) % 3 == 0 ? 0.0 : x;
        default: return x;
        }
    });
    in.k.fill([&](int64_t, int64_t g, int64_t s, int64_t h) {
        const double x = r.normal(), part = (double)s / (double)std::max<int64_t>(1, c.S - 1);
        const double up = c.fill == RAMP_UP ? part : 1 - part, steep = c.amount < 1e-9 ? 80 : 8;
        switch (c.fill) {
        case RAMP_UP: case RAMP_DOWN:
            return softmax ? (h == 0 ? steep * (up - 0.5) : x) : std::pow(c.amount, 1 - up) * x;
        case EXACT: return (double)(r.below(17) - 8);
        case EQUAL: return 1.0;
        case SOME_ZERO: return (s + g) % 3 == 1 ? 0.0 : x;
        default: return x;
        }
    });
}

double lowest(int64_t type) { return type == BA_BF16 ? LOWEST_BF16 : LOWEST_F32; }

Tensor make_mask(const Case &c, Random &r) {
    const Mask &m = c.mask;
    if (m.type == BA_NONE) return {};
    const Shape shape = {m.dims & 8 ? c.B : 1, m.dims & 4 ? c.N : 1, m.dims & 2 ? c.L : 1, m.dims & 1 ? c.S : 1};
    Tensor mask(m.type, shape, m.layout);
    mask.fill([&](int64_t b, int64_t n, int64_t l, int64_t) {
        const bool hide = r.chance(m.hide) || (m.rows && (m.dims & 2) && (5 * b + 3 * n + l) % 7 == 3);
        const double x = m.size * r.normal();
        if (m.type == BA_BOOL) return hide ? 0.0 : 1.0;
        return !hide ? x : m.lowest ? lowest(m.type) : -INFINITY;
    });
    return mask;
}

Tensor make_padding(const Case &c, Random &r) {
    const Padding &p = c.padding;
    if (p.type == BA_NONE) return {};
    Tensor padding(p.type, {p.per_batch ? c.B : 1, 1, 1, p.per_key ? c.S : 1}, p.strided ? TRANSPOSED : CONTIGUOUS);
    padding.fill([&](int64_t b, int64_t, int64_t, int64_t s) {
        const int64_t edge = c.S * (b + 1) / (c.B + 1);
        const bool random = r.chance(0.3);
        const double x = r.normal();
        bool hide = random;
        if (p.form == Padding::TAIL) hide = s >= std::max<int64_t>(1, edge);
        if (p.form == Padding::FRONT) hide = s < edge;
        if (p.form == Padding::WHOLE) hide = b == 0 || random;
        return p.type == BA_BOOL ? (hide ? 0.0 : 1.0) : hide ? -INFINITY : x;
    });
    return padding;
}

} // namespace

Inputs make_inputs(const Case &c) {
    Random r(c.name);
    Inputs in;
    in.q = Tensor(c.dtype, {c.B, c.N, c.L, c.H}, c.in);
    in.k = Tensor(c.dtype, {c.B, c.key_heads(), c.S, c.H}, c.keys);
    in.grad = Tensor(c.dtype, {c.B, c.N, c.L, c.W}, c.keys);
    fill_queries_and_keys(c, in, r);
    const auto normal = [&](int64_t, int64_t, int64_t, int64_t) { return r.normal(); };
    if (!c.shared) {
        in.v = Tensor(c.dtype, {c.B, c.value_heads(), c.S, c.W}, c.in);
        in.v.fill(normal);
    }
    in.grad.fill(normal);
    in.mask = make_mask(c, r);
    in.padding = make_padding(c, r);
    if (c.fill == LOUD_HIDDEN) {
        const auto loud = [&](Tensor &x, double size) {
            x.fill([&](int64_t b, int64_t g, int64_t s, int64_t h) {
                const bool keep = in.padding.get(c.padding.per_batch ? b : 0, 0, 0, s) != 0;
                return keep ? x.get(b, g, s, h) : size * r.normal();
            });
        };
        loud(in.k, 1 / c.amount);
        if (!c.shared) loud(in.v, 1e30);
    }
    return in;
}

bool visible(const Case &c, const Inputs &in, int64_t b, int64_t n, int64_t l, int64_t s, double *bias) {
    const int64_t here = l + c.offset;
    bool seen = !c.causal || (s <= here && (c.window == 0 || here - s < c.window));
    *bias = 0;
    const auto apply = [&](const Tensor &m, int64_t i, int64_t j, int64_t k, int64_t t) {
        if (m.type == BA_NONE) return;
        const Shape &size = m.size; // 1 where it broadcasts
        const double x = m.get(size[0] > 1 ? i : 0, size[1] > 1 ? j : 0, size[2] > 1 ? k : 0, size[3] > 1 ? t : 0);
        const bool hides = m.type == BA_BOOL ? x == 0 : c.score == BA_SOFTMAX ? x == -INFINITY : x <= lowest(m.type);
        seen = seen && !hides;
        if (m.type != BA_BOOL && !hides) *bias += x;
    };
    apply(in.mask, b, n, l, s);
    apply(in.padding, b, 0, 0, s);
    return seen;
}

namespace {

uint64_t splitmix64(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

// Whether weight (row, s) is dropped, by the rule that dropout.hpp states.
bool drops(const Case &c, uint64_t row, int64_t s) {
    const uint64_t seed = (uint64_t)c.seed, r = splitmix64(seed + (2 * row + 1) * 0x9e3779b97f4a7c15);
    const auto mix = [](uint32_t x, uint32_t plus) {
        x = (x ^ x >> 16) * 0x7feb352du + plus;
        x = (x ^ x >> 15) * 0x846ca68bu;
        return x ^ x >> 16;
    };
    const uint32_t key = mix((uint32_t)s * 0x9e3779b9u + (uint32_t)splitmix64(seed), 0);
    return mix((uint32_t)r ^ key, (uint32_t)(r >> 32)) < std::floor(std::ldexp(c.dropout, 32));
}

} // namespace

// The keys or values (B, G, S, W) of all pairs, of which neighbours may share a head; times scales (B, heads, S, 1).
std::vector<double> of_pairs(const Tensor &x, int64_t G, const Tensor *scale) {
    const auto &[B, heads, S, W] = x.size;
    std::vector<double> all;
    all.reserve((size_t)(B * G * S * W));
    for (int64_t b = 0; b < B; ++b)
        for (int64_t g = 0; g < G; ++g)
            for (int64_t s = 0; s < S; ++s)
                for (int64_t i = 0; i < W; ++i) {
                    const int64_t head = g * heads / G;
                    all.push_back(x.get(b, head, s, i) * (scale ? scale->get(b, head, s, 0) : 1.0));
                }
    return all;
}

Problem read(const Case &c, const Inputs &in) {
    Problem p{c.B, c.N, c.G, c.L, c.S, c.H, c.W, c.score, c.dtype == BA_BF16, c.shared, 0, {}, {}, {}, {}, {}, {}};
    p.scale = c.zero_scale ? 0 : c.scale != 0 ? c.scale : 1 / std::sqrt((double)c.H);
    p.q = in.q.dense(), p.k = of_pairs(in.k, c.G), p.grad = in.grad.dense();
    p.v = c.shared ? p.k : of_pairs(in.v, c.G);
    p.bias.reserve((size_t)(c.B * c.N * c.L * c.S));
    for (int64_t row = 0; row < c.B * c.N * c.L; ++row)
        for (int64_t s = 0; s < c.S; ++s) {
            double bias;
            const bool seen = visible(c, in, row / c.L / c.N, row / c.L % c.N, row % c.L, s, &bias);
            p.bias.push_back(seen ? bias : -INFINITY);
            if (c.dropout > 0) p.factor.push_back(drops(c, (uint64_t)row, s) ? 0 : 1 / (1 - c.dropout));
        }
    return p;
}

ba_call make_call(const Case &c, const Inputs &in) {
    ba_call call{};
    call.dtype = c.dtype, call.score = c.score, call.causal = c.causal;
    call.scale = c.zero_scale ? 0 : c.scale != 0 ? c.scale : 1 / std::sqrt((double)c.H);
    call.offset = c.offset, call.window = c.window;
    call.dropout = c.dropout, call.seed = c.seed;
    call.B = c.B, call.N = c.N, call.G = c.G, call.L = c.L, call.S = c.S, call.H = c.H, call.W = c.W;
    call.key_group = c.key_group, call.value_group = c.value_group > 1 ? c.value_group : 0; // 0 says the same as 1
    const Tensor &v = c.shared ? in.k : in.v;
    call.q = in.q.data(), call.q_b = in.q.stride[0], call.q_n = in.q.stride[1], call.q_l = in.q.stride[2];
    call.k = in.k.data(), call.k_b = in.k.stride[0], call.k_g = in.k.stride[1], call.k_s = in.k.stride[2];
    call.v = v.data(), call.v_b = v.stride[0], call.v_g = v.stride[1], call.v_s = v.stride[2];
    call.grad = in.grad.data();
    call.grad_b = in.grad.stride[0], call.grad_n = in.grad.stride[1], call.grad_l = in.grad.stride[2];
    call.mask_type = in.mask.type, call.padding_type = in.padding.type;
    int64_t *strides[] = {&call.mask_b, &call.mask_n, &call.mask_l, &call.mask_s};
    if (in.mask.type != BA_NONE) call.mask = in.mask.data();
    for (size_t d = 0; in.mask.type != BA_NONE && d < 4; ++d) *strides[d] = in.mask.size[d] > 1 ? in.mask.stride[d] : 0;
    if (in.padding.type != BA_NONE) {
        call.padding = in.padding.data();
        call.padding_b = in.padding.size[0] > 1 ? in.padding.stride[0] : 0;
        call.padding_s = in.padding.size[3] > 1 ? in.padding.stride[3] : 0;
    }
    return call;
}

// Outputs full of NaN, and the call that writes to them.
Outputs make_outputs(const Case &c, const Inputs &in, ba_call &call) {
    Outputs o;
    o.out = Tensor(c.dtype, {c.B, c.N, c.L, c.W}, c.out);
    o.stats = Tensor(BA_F32, {c.B, c.N, c.L, 2});
    if (c.backward) o.dq = Tensor(c.dtype, in.q.size, c.out), o.dk = Tensor(c.dtype, {c.B, c.G, c.S, c.H}, c.out);
    if (c.backward && !c.shared) o.dv = Tensor(c.dtype, {c.B, c.G, c.S, c.W}, c.out);
    const auto &[out_b, out_n, out_l, out_w] = o.out.stride;
    const auto &[dq_b, dq_n, dq_l, dq_h] = o.dq.stride;
    const auto &[dk_b, dk_g, dk_s, dk_h] = o.dk.stride;
    const auto &[dv_b, dv_g, dv_s, dv_w] = o.dv.stride;
    call.stats = static_cast<float *>(o.stats.data());
    call.out = o.out.data(), call.out_b = out_b, call.out_n = out_n, call.out_l = out_l;
    call.dq = o.dq.data(), call.dq_b = dq_b, call.dq_n = dq_n, call.dq_l = dq_l;
    call.dk = o.dk.data(), call.dk_b = dk_b, call.dk_g = dk_g, call.dk_s = dk_s;
    call.dv = o.dv.data(), call.dv_b = dv_b, call.dv_g = dv_g, call.dv_s = dv_s;
    return o;
}

// Forward, and backward where the case wants it.
Outputs compute(const Case &c, const Inputs &in, int64_t isa, int64_t threads) {
    ba_call call = make_call(c, in);
    Outputs o = make_outputs(c, in, call);
    call.isa = isa, call.threads = threads;
    o.status = ba_forward(&call);
    if (o.status != BA_OK || !c.backward) return o;
    const Tensor out = o.out.copy(), stats = o.stats.copy();
    o.status = ba_backward(&call);
    if (!out.same(o.out) || !stats.same(o.stats)) fail(c.name, isa, "ba_backward wrote into out or stats");
    return o;
}

namespace {

void check_canaries(const Case &c, int64_t isa, const Outputs &o) {
    const std::pair<const char *, const Tensor *> all[] = {
        {"out", &o.out}, {"stats", &o.stats}, {"dq", &o.dq}, {"dk", &o.dk}, {"dv", &o.dv}};
    for (const auto &[name, tensor] : all)
        if (!tensor->canaries_live()) fail(c.name, isa, std::string(name) + ": something was written between its rows");
}

bool zeros(const Tensor &x, int64_t b, int64_t n, int64_t l) { // in one row, to the last bit, not merely small
    for (int64_t i = 0; i < x.size[3]; ++i)
        if (x.get(b, n, l, i) != 0) return false;
    return true;
}

// Rows without weight and keys that nobody sees: nothing comes from them, and nothing goes to them.
void check_zeros(const Case &c, int64_t isa, const Outputs &o, const Answer &exact) {
    for (size_t row = 0; row < exact.blind.size(); ++row) {
        const int64_t b = (int64_t)row / c.L / c.N, n = (int64_t)row / c.L % c.N, l = (int64_t)row % c.L;
        const double total = o.stats.get(b, n, l, 0), shift = o.stats.get(b, n, l, 1);
        const std::string which = "row " + std::to_string(row) + (exact.blind[row] ? " without weight" : "");
        if (exact.blind[row] ? !std::isinf(total) : !std::isfinite(total) || !std::isfinite(shift))
            return fail(c.name, isa, which + ": stats are " + std::to_string(total) + ", " + std::to_string(shift));
        if (!exact.blind[row]) continue;
        if (!zeros(o.out, b, n, l)) return fail(c.name, isa, which + ": out is not zero");
        if (c.backward && !zeros(o.dq, b, n, l)) return fail(c.name, isa, which + ": dq is not zero");
    }
    for (size_t key = 0; c.backward && key < exact.unseen.size(); ++key) {
        if (!exact.unseen[key]) continue;
        const int64_t b = (int64_t)key / c.S / c.G, g = (int64_t)key / c.S % c.G, s = (int64_t)key % c.S;
        const std::string which = "key " + std::to_string(key) + " that nobody sees";
        if (!zeros(o.dk, b, g, s)) return fail(c.name, isa, which + ": dk is not zero");
        if (!c.shared && !zeros(o.dv, b, g, s)) return fail(c.name, isa, which + ": dv is not zero");
    }
}

} // namespace

void check(const Case &c, int64_t isa, const Outputs &o, const Answer &exact, Plain &plain, double more) {
    if (o.status != BA_OK) return fail(c.name, isa, "status " + std::to_string(o.status));
    check_canaries(c, isa, o);
    check_zeros(c, isa, o, exact);
    const bool bf16 = c.dtype == BA_BF16;
    const auto compare = [&](const char *name, const Tensor &x, const std::vector<double> &truth, double Plain::*error,
                             double factor, double spread, double extra) {
        std::string what;
        do what = beyond(x, truth, factor * plain.*error + extra, bf16, spread);
        while (!what.empty() && plain.another());
        if (!what.empty()) fail(c.name, isa, name + what);
    };
    compare("out", o.out, exact.out, &Plain::out, 2, 0, more);
    if (!c.backward) return;
    compare("dq", o.dq, exact.dq, &Plain::dq, 3, exact.spread_q, c.gradient_floor);
    compare("dk", o.dk, exact.dk, &Plain::dk, 3, exact.spread_k, c.gradient_floor);
    if (!c.shared) compare("dv", o.dv, exact.dv, &Plain::dv, 3, 0, 0);
}

namespace {

// Forward alone, without stats, as in inference: kernels may take another way then.
void check_inference(const Case &c, const Inputs &in, int64_t isa, const Answer &exact, Plain &plain) {
    Case alone = c;
    alone.backward = false;
    Tensor first;
    for (int64_t threads : {1, 2, 1}) {
        ba_call call = make_call(alone, in);
        Outputs o = make_outputs(alone, in, call);
        call.isa = isa, call.threads = threads, call.stats = nullptr;
        if (ba_forward(&call) != BA_OK) return fail(c.name, isa, "without stats: not BA_OK");
        if (!first.empty() && !first.same(o.out)) fail(c.name, isa, "without stats: another run, other bits");
        check_canaries(alone, isa, o);
        std::string what;
        do what = beyond(o.out, exact.out, 2 * plain.out, c.dtype == BA_BF16);
        while (!what.empty() && plain.another());
        if (!what.empty()) return fail(c.name, isa, "without stats: out" + what);
        for (int64_t row = 0; row < c.B * c.N * c.L; ++row)
            if (exact.blind[(size_t)row] && !zeros(o.out, row / c.L / c.N, row / c.L % c.N, row % c.L))
                return fail(c.name, isa, "without stats: out of a row without weight is not zero");
        first = std::move(o.out);
    }
}

} // namespace

void run_attention(const Case &c) {
    if (!chosen(c.name)) return;
    const Inputs in = make_inputs(c);
    const Problem p = read(c, in);
    const Answer exact = evaluate<double>(p, c.backward);
    Plain plain(p, exact, c.backward);
    const Tensor *tensors[] = {&in.q, &in.k, &in.v, &in.grad, &in.mask, &in.padding};
    std::vector<Tensor> before;
    for (const Tensor *x : tensors) before.push_back(x->copy());
    for (int64_t isa : options.isas) {
        const Outputs one = compute(c, in, isa, 1);
        check(c, isa, one, exact, plain);
        if (!one.same(compute(c, in, isa, 2))) fail(c.name, isa, "1 and 2 threads do not give the same bits");
        if (!one.same(compute(c, in, isa, 1))) fail(c.name, isa, "a second run does not give the same bits");
        check_inference(c, in, isa, exact, plain);
        for (size_t i = 0; i < before.size(); ++i)
            if (!before[i].same(*tensors[i])) fail(c.name, isa, "input " + std::to_string(i) + " was written to");
    }
}
