// A decoder's step in one call: new rows are projected, turned and written into the cache, then attended with all others.
// What the kernel wrote is compared with the exact rows; the oracle then attends to what lies in the cache.
#include "kernel_cases.hpp"
#include "kernel_oracle.hpp"

namespace {

struct Weights { // (outputs, D) and (outputs); empty: the identity, and no bias
    Tensor map, bias;
    std::vector<double> numbers, added;
};

struct Made {
    Tensor x, k, v, k_scale, v_scale, padding;
    Tensor new_cos, new_sin, cosine, sine; // (L, H / 2), and of the rows of the cache
    Weights maps[4];                       // W_Q, W_K, W_V, W_O
};

double angle(const StepCase &c, int64_t place, int64_t p) {
    return (double)place * std::pow(1e4, -2.0 * (double)p * (double)c.N / (double)c.D);
}

constexpr int64_t FIRST = 5; // the place of the cache's first row among all tokens, where keys are turned as they come

Made make(const StepCase &c) {
    Random r(c.name);
    Made m;
    const int64_t H = c.D / c.N;
    const auto normal = [&](int64_t, int64_t, int64_t, int64_t) { return r.normal(); };
    const Layout outer = c.gapped ? GAPPED : CONTIGUOUS;
    m.x = Tensor(BA_F32, {1, c.B, c.L, c.D}, outer);
    m.x.fill(normal);
    const Layout keys = c.gapped ? GAPPED : HEADS_INSIDE;
    const auto rows = [&](Tensor &to, Tensor &scale, int64_t heads) {
        to = Tensor(c.int8 ? STORED_INT8 : (int64_t)BA_F32, {c.B, heads, c.S, H}, keys);
        // What is written by the call holds other numbers before.
        to.fill([&](int64_t, int64_t, int64_t s, int64_t) {
            if (c.int8) return (double)(r.below(255) - 127);
            return s < c.S - c.L ? r.normal() : (double)NAN;
        });
        if (!c.int8) return;
        scale = Tensor(BA_F32, {c.B, heads, c.S, 1}, c.gapped ? GAPPED : HEADS_INSIDE);
        scale.fill([&](int64_t, int64_t, int64_t s, int64_t) { return s < c.S - c.L ? (0.5 + r.uniform()) / 64 : (double)NAN; });
    };
    rows(m.k, m.k_scale, c.key_heads());
    if (!c.shared()) rows(m.v, m.v_scale, c.value_heads());
    const bool wanted[4] = {c.outer, c.k, c.v, c.outer};
    const int64_t outputs[4] = {c.D, c.key_heads() * H, c.value_heads() * H, c.D};
    for (int i = 0; i < 4; ++i) {
        if (!wanted[i]) continue;
        Weights &w = m.maps[i];
        w.map = Tensor(BA_F32, {1, 1, outputs[i], c.D});
        w.map.fill([&](int64_t, int64_t, int64_t, int64_t) { return r.normal() / std::sqrt((double)c.D); });
        w.numbers = w.map.dense();
        if (!c.bias) continue;
        w.bias = Tensor(BA_F32, {1, 1, 1, outputs[i]});
        w.bias.fill(normal);
        w.added = w.bias.dense();
    }
    if (c.rotated) {
        const int64_t first = c.k ? FIRST : 0;
        const auto tables = [&](Tensor &cosine, Tensor &sine, int64_t from, int64_t count) {
            cosine = Tensor(BA_F32, {1, 1, count, H / 2}), sine = Tensor(BA_F32, {1, 1, count, H / 2});
            cosine.fill([&](int64_t, int64_t, int64_t s, int64_t p) { return std::cos(angle(c, from + s, p)); });
            sine.fill([&](int64_t, int64_t, int64_t s, int64_t p) { return std::sin(angle(c, from + s, p)); });
        };
        tables(m.new_cos, m.new_sin, first + c.S - c.L, c.L);
        if (!c.k) tables(m.cosine, m.sine, 0, c.S);
    }
    if (c.padded) {
        m.padding = Tensor(BA_BOOL, {1, 1, c.B, c.S});
        m.padding.fill([&](int64_t, int64_t, int64_t b, int64_t s) { return s > b || s >= c.S - c.L ? 1.0 : 0.0; });
    }
    return m;
}

ba_step call_of(const StepCase &c, const Made &m) {
    ba_step call{};
    call.D = c.D, call.x = m.x.data(), call.x_b = m.x.stride[1], call.x_l = m.x.stride[2];
    const void **maps[4] = {&call.wq, &call.wk, &call.wv, &call.wo}, **added[4] = {&call.bq, &call.bk, &call.bv, &call.bo};
    for (int i = 0; i < 4; ++i) *maps[i] = m.maps[i].map.data(), *added[i] = m.maps[i].bias.data();
    call.new_cos = static_cast<const float *>(m.new_cos.data()), call.new_sin = static_cast<const float *>(m.new_sin.data());
    ba_call &a = call.attention;
    a.dtype = BA_F32, a.score = c.score, a.scale = 1 / std::sqrt((double)(c.D / c.N));
    a.B = c.B, a.N = c.N, a.G = c.G, a.key_group = c.key_group, a.value_group = c.value_group;
    a.L = c.L, a.S = c.S, a.H = a.W = c.D / c.N;
    a.causal = c.L > 1, a.offset = c.L > 1 ? c.S - c.L : 0;
    const Tensor &v = c.shared() ? m.k : m.v, &v_scale = c.shared() ? m.k_scale : m.v_scale;
    a.k = m.k.data(), a.k_b = m.k.stride[0], a.k_g = m.k.stride[1], a.k_s = m.k.stride[2];
    a.v = v.data(), a.v_b = v.stride[0], a.v_g = v.stride[1], a.v_s = v.stride[2];
    a.mask_type = a.padding_type = BA_NONE;
    if (c.int8) {
        a.k_scale = static_cast<const float *>(m.k_scale.data()), a.v_scale = static_cast<const float *>(v_scale.data());
        a.k_scale_b = m.k_scale.stride[0], a.k_scale_g = m.k_scale.stride[1], a.k_scale_s = m.k_scale.stride[2];
        a.v_scale_b = v_scale.stride[0], a.v_scale_g = v_scale.stride[1], a.v_scale_s = v_scale.stride[2];
    }
    if (c.rotated && !c.k) {
        a.rotary_cos = static_cast<const float *>(m.cosine.data()), a.rotary_sin = static_cast<const float *>(m.sine.data());
        a.rotary_s = m.cosine.stride[2];
    }
    if (c.padded) a.padding = m.padding.data(), a.padding_type = BA_BOOL, a.padding_b = m.padding.stride[2], a.padding_s = 1;
    return call;
}

// Number h of head n of a row, turned by the place.
template <class T> double turned(const StepCase &c, const T *row, int64_t n, int64_t h, int64_t place) {
    const int64_t H = c.D / c.N, P = H / 2, p = h % P;
    const double x = (double)row[n * H + p], y = (double)row[n * H + P + p];
    const double cosine = (float)std::cos(angle(c, place, p)), sine = (float)std::sin(angle(c, place, p));
    return h < P ? x * cosine - y * sine : y * cosine + x * sine;
}

double number(const StepCase &c, const Tensor &x, const Tensor &scale, int64_t b, int64_t n, int64_t s, int64_t h) {
    return x.get(b, n, s, h) * (c.int8 ? scale.get(b, n, s, 0) : 1.0);
}

// The output (B, L, D), from the input and what lies in the cache after the call.
template <class T>
std::vector<double> evaluate_step(const StepCase &c, const Made &m, const Way &way, int64_t blur = -1) {
    const int64_t H = c.D / c.N;
    const std::vector<double> given = m.x.dense();
    const std::vector<T> x(given.begin(), given.end());
    const std::vector<T> q = projected(x, c.D, m.maps[0].numbers, m.maps[0].added, way);
    Problem p{c.B, c.N, c.G, c.L, c.S, H, H, c.score, false, false, 1 / std::sqrt((double)H), {}, {}, {}, {}, {}, {}};
    const int64_t first = c.k ? FIRST : 0;
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t n = 0; n < c.N; ++n) {
            for (int64_t l = 0; l < c.L; ++l)
                for (int64_t h = 0; h < H; ++h) {
                    const T *row = &q[(size_t)((b * c.L + l) * c.D)];
                    p.q.push_back(c.rotated ? turned(c, row, n, h, first + c.S - c.L + l) : (double)row[n * H + h]);
                }
            for (int64_t l = 0; l < c.L; ++l)
                for (int64_t s = 0; s < c.S; ++s) {
                    const bool hidden = s > c.S - c.L + l || (c.padded && m.padding.get(0, 0, b, s) == 0);
                    p.bias.push_back(hidden ? -INFINITY : 0.0);
                }
        }
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t g = 0; g < c.G; ++g)
            for (int64_t s = 0; s < c.S; ++s) {
                std::vector<double> row((size_t)H);
                for (int64_t h = 0; h < H; ++h) row[(size_t)h] = number(c, m.k, m.k_scale, b, g / c.key_group, s, h);
                for (int64_t h = 0; h < H; ++h) {
                    p.k.push_back(c.rotated && !c.k ? turned(c, row.data(), 0, h, s) : row[(size_t)h]);
                    p.v.push_back(c.shared() ? row[(size_t)h] : number(c, m.v, m.v_scale, b, g / c.value_group, s, h));
                }
            }
    const std::vector<double> heads = evaluate<T>(blur < 0 ? p : blurred(p, blur), false, way).out; // (B, N, L, H)
    std::vector<T> joined(heads.size());
    for (size_t i = 0; i < heads.size(); ++i) {
        const int64_t h = (int64_t)i % H, l = (int64_t)i / H % c.L, n = (int64_t)i / H / c.L % c.N, b = (int64_t)i / H / c.L / c.N;
        joined[(size_t)((b * c.L + l) * c.D + n * H + h)] = (T)heads[i];
    }
    const std::vector<T> out = projected(joined, c.D, m.maps[3].numbers, m.maps[3].added, way);
    return std::vector<double>(out.begin(), out.end());
}

// Whether the new rows of the cache are what the input makes of them, and the others are as they were.
std::string wrong_rows(const StepCase &c, const Made &m, const Made &before, bool keys) {
    const int64_t H = c.D / c.N;
    const Tensor &x = keys ? m.k : m.v, &old = keys ? before.k : before.v;
    const Tensor &scale = keys ? m.k_scale : m.v_scale, &old_scale = keys ? before.k_scale : before.v_scale;
    const Weights &w = m.maps[keys ? 1 : 2];
    const std::vector<double> exact = projected(m.x.dense(), c.D, w.numbers, w.added, Way());
    const int64_t heads = keys ? c.key_heads() : c.value_heads();
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t n = 0; n < heads; ++n)
            for (int64_t s = 0; s < c.S; ++s)
                for (int64_t h = 0; h < H; ++h) {
                    const int64_t l = s - (c.S - c.L);
                    if (l < 0) {
                        if (x.get(b, n, s, h) != old.get(b, n, s, h)) return "an old row was written to";
                        if (c.int8 && scale.get(b, n, s, 0) != old_scale.get(b, n, s, 0)) return "an old scale was written to";
                        continue;
                    }
                    const double *row = &exact[(size_t)((b * c.L + l) * heads * H)];
                    const double wanted = keys && c.k && c.rotated ? turned(c, row, n, h, FIRST + s) : row[n * H + h];
                    const double half = c.int8 ? 0.5001 * scale.get(b, n, s, 0) : 0;
                    if (!(std::abs(number(c, x, scale, b, n, s, h) - wanted) <= half + 2e-5 * (1 + std::abs(wanted))))
                        return "new row " + std::to_string(l) + " is wrong";
                }
    return x.canaries_live() && scale.canaries_live() ? "" : "something was written between the rows";
}

} // namespace

std::vector<StepCase> step_cases() {
    std::vector<StepCase> cases;
    struct Shape {
        int64_t B, N, L, S, D, heads; // heads: of what is projected; what is not has N
    };
    const std::vector<Shape> shapes = {
        {1, 1, 1, 1, 2, 1}, {3, 2, 1, 37, 12, 2}, {1, 4, 1, 700, 64, 4}, {2, 3, 3, 50, 42, 3}, {8, 2, 1, 33, 68, 2},
        {1, 8, 8, 129, 256, 8}, {5, 1, 3, 20, 34, 1}, {16, 4, 1, 65, 96, 4}, {1, 2, 7, 7, 260, 2}};
    const std::vector<Shape> grouped = { // also more than eight queries for one head
        {2, 4, 1, 37, 48, 2}, {1, 12, 1, 67, 96, 1}, {3, 6, 2, 29, 60, 3}, {1, 8, 5, 41, 128, 2}, {2, 3, 3, 3, 6, 1}};
    const auto add = [&](const Shape &shape, const std::string &maps, int flags) {
        const auto &[B, N, L, S, D, heads] = shape;
        if (options.quick && (flags * 7 + D) % 5 != 0) return;
        const int64_t score = (flags + D / 2 + S) % 3 == 1 ? BA_EXPRESSIVE : BA_SOFTMAX;
        const auto has = [&](char map) { return maps.find(map) != maps.npos; };
        const int64_t k = has('k') ? heads : N, v = has('v') ? heads : N, G = std::max(k, v);
        StepCase c{"step", B, N, G, G / k, G / v, L, S, D, score, has('q'), has('k'), has('v')};
        c.int8 = flags & 1, c.rotated = flags & 2, c.bias = flags & 4, c.padded = c.gapped = flags & 8;
        if (c.rotated && D / N % 2) return;
        for (int64_t n : {B, N, L, S, D}) c.name += " " + std::to_string(n);
        if (heads < N) c.name += " of " + std::to_string(k) + " and " + std::to_string(v) + " heads";
        c.name += " maps " + maps + (score == BA_SOFTMAX ? " softmax" : " expressive") + (c.int8 ? " int8" : "");
        c.name += std::string(c.rotated ? " rotated" : "") + (c.bias ? " bias" : "") + (c.gapped ? " padded" : "");
        cases.push_back(c);
    };
    for (int flags = 0; flags < 16; ++flags) {
        for (const Shape &shape : shapes)
            for (const std::string maps : {"qkvo", "qko", "qo", ""}) add(shape, maps, flags);
        for (const Shape &shape : grouped)
            for (const std::string maps : {"qkvo", "qko", "qvo"}) add(shape, maps, flags);
    }
    return cases;
}

void run_step(const StepCase &c) {
    if (!chosen(c.name)) return;
    for (int64_t isa : options.isas) {
        Tensor first;
        for (int64_t threads : {1, 2}) {
            const Made m = make(c), before = make(c);
            ba_step call = call_of(c, m);
            Tensor out(BA_F32, {1, c.B, c.L, c.D});
            call.isa = isa, call.attention.threads = threads, call.out = out.data();
            if (ba_layer_step(&call) != BA_OK) return fail(c.name, isa, "ba_layer_step does not return BA_OK");
            std::string what = wrong_rows(c, m, before, true);
            if (what.empty() && !c.shared()) what = wrong_rows(c, m, before, false);
            if (!what.empty()) fail(c.name, isa, what);
            if (!first.empty() && !first.same(out)) fail(c.name, isa, "1 and 2 threads do not give the same bits");
            if (!m.x.same(before.x)) fail(c.name, isa, "the input was written to");
            if (threads == 1) {
                const std::vector<double> exact = evaluate_step<double>(c, m, Way());
                const double coarse = !c.int8 ? 0 : coarse_error(isa, exact, [&](int64_t blur) {
                    return evaluate_step<double>(c, m, Way(), blur);
                });
                int64_t tried = 0;
                double plain = 0;
                do {
                    plain = std::max(plain, largest_error(evaluate_step<float>(c, m, Way(tried++)), exact));
                    what = beyond(out, exact, 2 * plain + coarse, false);
                } while (!what.empty() && tried < WAYS);
                if (!what.empty()) fail(c.name, isa, "out" + what);
            }
            first = std::move(out);
        }
    }
}
