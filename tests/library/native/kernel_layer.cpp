// A whole layer in one call, W_O heads(W_Q x, W_K x, W_A W_V x): mechanism by mechanism, size by size.
#include "kernel_cases.hpp"
#include "kernel_oracle.hpp"

namespace {

struct Weights { // (D, D) and (D); empty: the identity, and no bias
    std::vector<double> map, bias;
};

struct Numbers {
    std::vector<double> x, align, align_bias;
    Weights q, k, v, o;
};

// y = W_A v + a 1^T, for each batch element.
template <class T>
std::vector<T> mix(const LayerCase &c, const std::vector<T> &v, const Numbers &n, const Way &way) {
    if (n.align.empty()) return v;
    std::vector<T> mixed(v.size());
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t i = 0; i < c.L; ++i)
            for (int64_t d = 0; d < c.D; ++d) {
                T sum = 0;
                for (int64_t t = 0; t < c.L; ++t) {
                    const int64_t j = way.term(t, c.L);
                    sum += (T)n.align[(size_t)(i * c.L + j)] * v[(size_t)((b * c.L + j) * c.D + d)];
                }
                const T bias = n.align_bias.empty() ? 0 : (T)n.align_bias[(size_t)i];
                mixed[(size_t)((b * c.L + i) * c.D + d)] = sum + bias;
            }
    return mixed;
}

// (B, L, D) -> (B, N, L, D / N), and back.
template <class From> std::vector<double> heads_apart(const LayerCase &c, const From &x, bool back) {
    const int64_t H = c.D / c.N;
    std::vector<double> y(x.size());
    for (int64_t b = 0; b < c.B; ++b)
        for (int64_t n = 0; n < c.N; ++n)
            for (int64_t l = 0; l < c.L; ++l)
                for (int64_t h = 0; h < H; ++h) {
                    const size_t inside = (size_t)((b * c.L + l) * c.D + n * H + h);
                    const size_t apart = (size_t)(((b * c.N + n) * c.L + l) * H + h);
                    y[back ? inside : apart] = (double)x[back ? apart : inside];
                }
    return y;
}

template <class T> std::vector<double> evaluate_layer(const LayerCase &c, const Numbers &n, const Way &way) {
    const std::vector<T> x(n.x.begin(), n.x.end());
    const int64_t H = c.D / c.N;
    Problem p{c.B, c.N, c.N, c.L, c.L, H, H, c.score, false, false, 1 / std::sqrt((double)H), {}, {}, {}, {}, {}, {}};
    const auto project = [&](const std::vector<T> &rows, const Weights &w) {
        return projected(rows, c.D, w.map, w.bias, way);
    };
    p.q = heads_apart(c, project(x, n.q), false);
    p.k = heads_apart(c, project(x, n.k), false);
    p.v = heads_apart(c, mix(c, project(x, n.v), n, way), false);
    for (int64_t row = 0; row < c.B * c.N * c.L; ++row)
        for (int64_t s = 0; s < c.L; ++s) p.bias.push_back(c.causal && s > row % c.L ? -INFINITY : 0.0);
    const std::vector<double> joined = heads_apart(c, evaluate<T>(p, false, way).out, true);
    const std::vector<T> out = project(std::vector<T>(joined.begin(), joined.end()), n.o);
    return std::vector<double>(out.begin(), out.end());
}

} // namespace

std::vector<LayerCase> layer_cases() {
    std::vector<LayerCase> cases;
    const std::vector<std::array<int64_t, 4>> shapes = {
        {1, 1, 1, 1}, {2, 1, 2, 3}, {3, 3, 17, 24}, {2, 1, 31, 59}, {2, 4, 33, 32}, {3, 3, 13, 111}, {1, 8, 127, 64},
        {2, 2, 64, 128}};
    const std::vector<std::string> mechanisms = {"qkvo", "qko", "qo", "qoa", "qkva", ""}; // a: W_A
    const auto has = [](const std::string &mechanism, char map) { return mechanism.find(map) != std::string::npos; };
    for (const auto &[B, N, L, D] : shapes)
        for (const std::string &m : mechanisms)
            for (int flags = 0; flags < 8; ++flags) {
                const int64_t score = (flags + D) % 3 == 1 ? BA_SOFTMAX : BA_EXPRESSIVE;
                if (options.quick && (flags % 3 != 1 || L * D > 4000)) continue;
                const bool causal = flags & 1, bias = flags & 2, strided = flags & 4;
                std::string name = "layer";
                for (int64_t n : {B, N, L, D}) name += " " + std::to_string(n);
                name += " maps " + m + (score == BA_SOFTMAX ? " softmax" : " expressive");
                name += std::string(causal ? " causal" : "") + (bias ? " bias" : "") + (strided ? " strided" : "");
                cases.push_back({name, B, N, L, D, score, has(m, 'q'), has(m, 'k'), has(m, 'v'), has(m, 'o'),
                                 has(m, 'a'), causal, bias, strided});
            }
    return cases;
}

void run_layer(const LayerCase &c) {
    if (!chosen(c.name)) return;
    Random r(c.name);
    std::vector<Tensor> kept; // the weights' memory, and what it held
    kept.reserve(16);
    const auto keep = [&](Tensor &&tensor, std::vector<double> *numbers) {
        kept.push_back(std::move(tensor));
        *numbers = kept.back().dense();
        return kept.back().data();
    };
    const auto draw = [&](int64_t rows, int64_t columns, double spread, std::vector<double> *numbers) {
        Tensor tensor(BA_F32, {1, 1, rows, columns});
        tensor.fill([&](int64_t, int64_t, int64_t, int64_t) { return spread * r.normal(); });
        return keep(std::move(tensor), numbers);
    };
    Numbers n;
    ba_layer call{};
    call.score = c.score, call.causal = c.causal, call.scale = 1 / std::sqrt((double)(c.D / c.N));
    call.B = c.B, call.N = c.N, call.L = c.L, call.D = c.D;
    Tensor x(BA_F32, {1, c.B, c.L, c.D}, c.strided ? GAPPED : CONTIGUOUS);
    x.fill([&](int64_t, int64_t, int64_t, int64_t) { return r.normal(); });
    n.x = x.dense(), call.x = x.data(), call.x_b = x.stride[1], call.x_l = x.stride[2];
    const double spread = 1 / std::sqrt((double)c.D);
    const struct { bool wanted; Weights *numbers; const void **map, **bias; } maps[] = {
        {c.q, &n.q, &call.wq, &call.bq}, {c.k, &n.k, &call.wk, &call.bk},
        {c.v, &n.v, &call.wv, &call.bv}, {c.o, &n.o, &call.wo, &call.bo}};
    for (const auto &m : maps) {
        if (m.wanted) *m.map = draw(c.D, c.D, spread, &m.numbers->map);
        if (m.wanted && c.bias) *m.bias = draw(1, c.D, 0.5, &m.numbers->bias);
    }
    if (c.aligned) {
        Tensor align(BA_F32, {1, 1, c.L, c.L}, GAPPED); // the first rows and columns of a larger W_A
        align.fill([&](int64_t, int64_t, int64_t i, int64_t j) {
            return c.causal && j > i ? 0 : r.normal() / std::sqrt((double)c.L);
        });
        call.wa_i = align.stride[2], call.wa = keep(std::move(align), &n.align);
        if (c.bias) call.ba = draw(1, c.L, 0.5, &n.align_bias);
    }
    kept.push_back(std::move(x));
    std::vector<Tensor> before;
    for (const Tensor &t : kept) before.push_back(t.copy());
    const std::vector<double> exact = evaluate_layer<double>(c, n, Way());
    int64_t tried = 0; // ways of the plain formula, as in Plain
    double plain = 0;
    const auto another = [&] {
        if (tried == WAYS) return false;
        plain = std::max(plain, largest_error(evaluate_layer<float>(c, n, Way(tried++)), exact));
        return true;
    };
    another();
    for (int64_t isa : options.isas) {
        std::vector<Tensor> outs;
        for (int64_t threads : {1, 2, 1}) {
            outs.emplace_back(BA_F32, Shape{1, c.B, c.L, c.D});
            call.isa = isa, call.threads = threads, call.out = outs.back().data();
            if (ba_layer_forward(&call) != BA_OK) return fail(c.name, isa, "ba_layer_forward does not return BA_OK");
        }
        std::string what;
        do what = beyond(outs[0], exact, 2 * plain, false);
        while (!what.empty() && another());
        if (!what.empty()) fail(c.name, isa, "out" + what);
        if (!outs[0].same(outs[1])) fail(c.name, isa, "1 and 2 threads do not give the same bits");
        if (!outs[0].same(outs[2])) fail(c.name, isa, "a second run does not give the same bits");
        for (size_t i = 0; i < kept.size(); ++i)
            if (!before[i].same(kept[i])) fail(c.name, isa, "input " + std::to_string(i) + " was written to");
    }
}
