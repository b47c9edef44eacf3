// The alignment product W_A V + a 1^T (2403.01643, definition 4) and its gradients, case by case.
#include "kernel_cases.hpp"
#include "kernel_oracle.hpp"

namespace {

struct Numbers {
    std::vector<double> out, dvalue, dweight;
};

template <class T>
Numbers evaluate_align(const AlignCase &c, const std::vector<double> &weight, const std::vector<double> &bias,
                       const std::vector<double> &value, const std::vector<double> &grad) {
    const int64_t B = c.B, G = c.G, S = c.S, W = c.W;
    const auto at = [&](int64_t b, int64_t s, int64_t g, int64_t w) { return (size_t)(((b * S + s) * G + g) * W + w); };
    std::vector<T> out(value.size()), dvalue(value.size()), dweight(weight.size());
    for (int64_t b = 0; b < B; ++b)
        for (int64_t g = 0; g < G; ++g)
            for (int64_t i = 0; i < S; ++i) {
                for (int64_t j = 0; j < (c.causal ? i + 1 : S); ++j) {
                    const T a = (T)weight[(size_t)((g * S + i) * S + j)];
                    T sum = 0;
                    for (int64_t w = 0; w < W; ++w) {
                        out[at(b, i, g, w)] += a * (T)value[at(b, j, g, w)];
                        dvalue[at(b, j, g, w)] += a * (T)grad[at(b, i, g, w)];
                        sum += (T)grad[at(b, i, g, w)] * (T)value[at(b, j, g, w)];
                    }
                    dweight[(size_t)((g * S + i) * S + j)] += sum;
                }
                for (int64_t w = 0; c.bias && w < W; ++w) out[at(b, i, g, w)] += (T)bias[(size_t)(g * S + i)];
            }
    Problem type{};
    type.bf16 = c.dtype == BA_BF16;
    return {widen(type, out), widen(type, dvalue), widen(type, dweight)};
}

struct Result {
    int64_t status = -1;
    Tensor out, dvalue, dweight;
};

Result compute(const AlignCase &c, ba_align call, int64_t isa, int64_t threads, bool want_value = true,
               bool want_weight = true) {
    Result r;
    r.out = Tensor(c.dtype, {c.B, c.S, c.G, c.W}), r.dvalue = Tensor(c.dtype, {c.B, c.S, c.G, c.W});
    r.dweight = Tensor(c.dtype, {1, c.G, c.S, c.S});
    call.isa = isa, call.threads = threads, call.out = r.out.data();
    r.status = ba_align_forward(&call);
    if (r.status != BA_OK) return r;
    call.out = nullptr;
    call.dvalue = want_value ? r.dvalue.data() : nullptr, call.dweight = want_weight ? r.dweight.data() : nullptr;
    r.status = ba_align_backward(&call);
    return r;
}

void check(const AlignCase &c, const ba_align &call, int64_t isa, const Numbers &exact, const Numbers &plain) {
    const Result one = compute(c, call, isa, 1);
    if (one.status != BA_OK) return fail(c.name, isa, "status " + std::to_string(one.status));
    const auto compare = [&](const char *name, const Tensor &x, std::vector<double> Numbers::*part, double factor) {
        const double allowed = factor * largest_error(plain.*part, exact.*part);
        const std::string what = beyond(x, exact.*part, allowed, c.dtype == BA_BF16);
        if (!what.empty()) fail(c.name, isa, name + what);
    };
    compare("out", one.out, &Numbers::out, 2);
    compare("dvalue", one.dvalue, &Numbers::dvalue, 3);
    compare("dweight", one.dweight, &Numbers::dweight, 3);
    for (int64_t g = 0; c.causal && g < c.G; ++g)
        for (int64_t i = 0; i < c.S; ++i)
            for (int64_t j = i + 1; j < c.S; ++j)
                if (one.dweight.get(0, g, i, j) != 0)
                    return fail(c.name, isa, "dweight above the diagonal is not zero");
    for (int64_t threads : {2, 1}) {
        const Result again = compute(c, call, isa, threads);
        if (!again.out.same(one.out) || !again.dvalue.same(one.dvalue) || !again.dweight.same(one.dweight))
            fail(c.name, isa, "another run, " + std::to_string(threads) + " threads, does not give the same bits");
    }
    const Result value = compute(c, call, isa, 2, true, false), weight = compute(c, call, isa, 2, false, true);
    if (!value.dvalue.same(one.dvalue) || !weight.dweight.same(one.dweight))
        fail(c.name, isa, "one gradient alone differs");
}

} // namespace

std::vector<AlignCase> align_cases() {
    std::vector<AlignCase> cases;
    const std::vector<std::array<int64_t, 4>> shapes = {
        {1, 1, 1, 1}, {3, 1, 2, 7}, {2, 1, 31, 64}, {5, 1, 64, 32}, {2, 1, 67, 131}, {3, 4, 13, 8}, {2, 3, 65, 59},
        {7, 2, 32, 16}, {1, 2, 127, 111}, {1, 1, 257, 33}, {1, 1, 300, 64}, {11, 5, 3, 1}, {2, 9, 1, 16}};
    for (const auto &[B, G, S, W] : shapes)
        for (int64_t dtype : {BA_F32, BA_BF16})
            for (int flags = 0; flags < 8; ++flags) {
                if (options.quick && (S > 130 || flags % 3 != 1)) continue;
                char name[96];
                std::snprintf(name, sizeof name, "align B %d G %d S %d W %d %s%s%s%s", (int)B, (int)G, (int)S, (int)W,
                              dtype == BA_F32 ? "f32" : "bf16", flags & 1 ? " causal" : "", flags & 2 ? " bias" : "",
                              flags & 4 ? " strided" : "");
                cases.push_back({name, B, G, S, W, dtype, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0});
            }
    return cases;
}

void run_align(const AlignCase &c) {
    if (!chosen(c.name)) return;
    Random r(c.name);
    const auto normal = [&](int64_t, int64_t, int64_t, int64_t) { return r.normal(); };
    // value is (B, S, G, W): as strided, heads lie apart, and there are gaps.
    const Layout gapped = c.strided ? GAPPED : CONTIGUOUS;
    Tensor value(c.dtype, {c.B, c.S, c.G, c.W}, gapped), weight(c.dtype, {1, c.G, c.S, c.S}, gapped);
    Tensor grad(c.dtype, {c.B, c.S, c.G, c.W}, c.strided ? HEADS_INSIDE : CONTIGUOUS);
    Tensor bias(c.dtype, {1, 1, c.G, c.S}, gapped);
    value.fill(normal), grad.fill(normal), bias.fill(normal);
    const auto lower = [&](int64_t, int64_t, int64_t i, int64_t j) { return c.causal && j > i ? NAN : r.normal(); };
    weight.fill(lower); // the upper triangle is never read
    const auto v = value.dense(), w = weight.dense(), a = bias.dense(), g = grad.dense();
    const Numbers exact = evaluate_align<double>(c, w, a, v, g), plain = evaluate_align<float>(c, w, a, v, g);
    ba_align call{};
    call.dtype = c.dtype, call.causal = c.causal, call.B = c.B, call.G = c.G, call.S = c.S, call.W = c.W;
    call.weight = weight.data(), call.weight_g = weight.stride[1], call.weight_i = weight.stride[2];
    call.bias = c.bias ? bias.data() : nullptr, call.bias_g = bias.stride[2];
    call.value = value.data(), call.value_b = value.stride[0];
    call.value_s = value.stride[1], call.value_g = value.stride[2];
    call.grad = grad.data(), call.grad_b = grad.stride[0];
    call.grad_s = grad.stride[1], call.grad_g = grad.stride[2];
    const Tensor *tensors[] = {&value, &weight, &bias, &grad};
    std::vector<Tensor> before;
    for (const Tensor *x : tensors) before.push_back(x->copy());
    for (int64_t isa : options.isas) {
        check(c, call, isa, exact, plain);
        for (size_t i = 0; i < before.size(); ++i)
            if (!before[i].same(*tensors[i])) fail(c.name, isa, "input " + std::to_string(i) + " was written to");
    }
}
