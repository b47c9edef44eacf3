// What no row of data says: refusals, optional outputs, NaN and garbage in keys, callers on several threads.
#include <atomic>
#include <thread>

#include "kernel_attention.hpp"

namespace {

Case sample(const char *name, int64_t score) {
    Case c;
    c.name = std::string(name) + (score == BA_SOFTMAX ? " softmax" : " expressive");
    c.B = 2, c.N = 4, c.G = 2, c.L = 61, c.S = 139, c.H = 31, c.W = 31, c.score = score;
    return c;
}

bool equal(const Tensor &a, const Tensor &b, int64_t rows) { // as numbers, in the first `rows` of the third dimension
    for (int64_t i = 0; i < a.size[0]; ++i)
        for (int64_t j = 0; j < a.size[1]; ++j)
            for (int64_t k = 0; k < std::min(rows, a.size[2]); ++k)
                for (int64_t l = 0; l < a.size[3]; ++l)
                    if (!(a.get(i, j, k, l) == b.get(i, j, k, l))) return false;
    return true;
}

// The oracle's own test: two keys by hand, and its gradients against central differences of its output.
void oracle_itself(int64_t score) {
    Case c = sample("oracle", score);
    c.B = 1, c.N = 2, c.G = 1, c.L = 3, c.S = 5, c.H = 3, c.W = 3, c.causal = true, c.scale = -0.7;
    c.mask = {BA_F32, 2 | 1, CONTIGUOUS, 0.2, 1.0, false, true};
    if (!chosen(c.name)) return;
    const double inf = INFINITY, a = std::exp(1.0), b = std::exp(2.0);
    const Problem two{1, 1, 1, 1, 3, 1, 1, score, false, false, 1, {1}, {1, 2, 3}, {10, 20, 30}, {1}, {0, 0, -inf}, {}};
    const double by_hand = score == BA_SOFTMAX ? (10 * a + 20 * b) / (a + b) : (10 * 0.5 + 20 * 0.8) / (0.5 + 0.8);
    if (std::abs(evaluate<double>(two, false).out[0] - by_hand) > 1e-14) fail(c.name, BA_BEST, "two keys by hand");
    Problem p = read(c, make_inputs(c));
    const Answer answer = evaluate<double>(p, true);
    const auto loss = [&] {
        const Answer at = evaluate<double>(p, false);
        double sum = 0;
        for (size_t i = 0; i < at.out.size(); ++i) sum += at.out[i] * p.grad[i];
        return sum;
    };
    const auto differentiate = [&](std::vector<double> &x, const std::vector<double> &gradient) {
        const double h = 1e-5;
        for (size_t i = 0; i < x.size(); ++i) {
            const double middle = x[i];
            x[i] = middle + h;
            const double above = loss();
            x[i] = middle - h;
            const double slope = (above - loss()) / (2 * h);
            x[i] = middle;
            if (!(std::abs(slope - gradient[i]) < 1e-7 * (1 + std::abs(slope))))
                fail(c.name, BA_BEST, "a gradient of the oracle is not that of its output");
        }
    };
    differentiate(p.q, answer.dq), differentiate(p.k, answer.dk), differentiate(p.v, answer.dv);
}

void refusals() {
    const std::string name = "refusals";
    if (!chosen(name)) return;
    if (ba_abi() != BA_ABI) fail(name, BA_BEST, "ba_abi() is not BA_ABI");
    if (ba_pool() != 0 && ba_pool() != 1) fail(name, BA_BEST, "ba_pool() is neither 0 nor 1");
    if (!(ba_isas() >> BA_PORTABLE & 1)) fail(name, BA_BEST, "the portable kernels are missing");
    const Case c = sample("refusals", BA_SOFTMAX);
    const Inputs in = make_inputs(c);
    for (int64_t isa : {BA_PORTABLE, BA_NEON, BA_AVX2, BA_AVX512}) {
        if (ba_isas() >> isa & 1) continue;
        ba_call call = make_call(c, in);
        call.isa = isa, call.threads = 1;
        ba_align align{};
        align.isa = isa, align.threads = 1;
        ba_layer layer{};
        layer.isa = isa, layer.threads = 1;
        if (ba_forward(&call) != BA_NO_SUCH_ISA || ba_backward(&call) != BA_NO_SUCH_ISA ||
            ba_align_forward(&align) != BA_NO_SUCH_ISA || ba_align_backward(&align) != BA_NO_SUCH_ISA ||
            ba_layer_forward(&layer) != BA_NO_SUCH_ISA)
            fail(name, isa, "an instruction set that ba_isas() does not report is not refused");
    }
}

// The best instruction set, more threads than there are cores: the same numbers.
void variants(int64_t score) {
    Case c = sample("variants", score);
    c.causal = true;
    if (!chosen(c.name)) return;
    const Inputs in = make_inputs(c);
    const Problem p = read(c, in);
    const Answer exact = evaluate<double>(p, true);
    Plain plain(p, exact, true);
    check(c, BA_BEST, compute(c, in, BA_BEST, 2), exact, plain);
    for (int64_t isa : options.isas) check(c, isa, compute(c, in, isa, 7), exact, plain);
}

// The kernel sees one pointer for k and v, and has two gradients to write.
void one_tensor_two_gradients(int64_t score) {
    const Case c = sample("one tensor, two gradients", score);
    if (!chosen(c.name)) return;
    Inputs in = make_inputs(c);
    in.v = in.k.copy();
    const Problem p = read(c, in);
    const Answer exact = evaluate<double>(p, true);
    Plain plain(p, exact, true);
    for (int64_t isa : options.isas) {
        ba_call call = make_call(c, in);
        Outputs o = make_outputs(c, in, call);
        call.isa = isa, call.threads = 2, call.v = call.k;
        o.status = ba_forward(&call);
        if (o.status == BA_OK) o.status = ba_backward(&call);
        check(c, isa, o, exact, plain);
    }
}

// The keys come in two parts, whose gradients are computed apart from each other, with the stats and delta of all.
void parts_of_the_keys(int64_t score, int64_t L) {
    Case c = sample("parts of the keys", score);
    c.name += " L " + std::to_string(L), c.L = L, c.G = 4, c.key_group = 2;
    if (!chosen(c.name)) return;
    const Inputs in = make_inputs(c);
    const Problem p = read(c, in);
    const Answer exact = evaluate<double>(p, true);
    Plain plain(p, exact, true);
    for (int64_t isa : options.isas) {
        Outputs o = compute(c, in, isa, 1);
        const Tensor dq[] = {o.dq.copy(), o.dq.copy()};
        Tensor delta(BA_F32, {c.B, c.N, c.L, 1});
        delta.fill([&](int64_t b, int64_t n, int64_t l, int64_t) {
            double sum = 0;
            for (int64_t w = 0; w < c.W; ++w) sum += o.out.get(b, n, l, w) * in.grad.get(b, n, l, w);
            return sum;
        });
        ba_call all = make_call(c, in);
        const Outputs apart = make_outputs(c, in, all);
        for (int part = 0; part < 2; ++part) {
            ba_call call = all;
            const int64_t first = part * 64;
            call.isa = isa, call.threads = 1, call.S = part ? c.S - first : 64;
            call.k = static_cast<const float *>(all.k) + first * all.k_s;
            call.v = static_cast<const float *>(all.v) + first * all.v_s;
            call.dk = static_cast<float *>(all.dk) + first * all.dk_s;
            call.dv = static_cast<float *>(all.dv) + first * all.dv_s;
            call.dq = dq[part].data(), call.out = nullptr;
            call.stats = static_cast<float *>(o.stats.data()), call.delta = static_cast<const float *>(delta.data());
            o.status = std::max(o.status, ba_backward(&call));
        }
        o.dq.fill([&](int64_t b, int64_t n, int64_t l, int64_t h) {
            return dq[0].get(b, n, l, h) + dq[1].get(b, n, l, h);
        });
        o.dk = apart.dk.copy(), o.dv = apart.dv.copy();
        check(c, isa, o, exact, plain);
    }
}

// Keys that nobody sees hold 1e30 or 0: not one number differs. `future`: later keys, which earlier queries do not see.
void garbage(int64_t score, int64_t dtype, bool future) {
    Case c = sample(future ? "garbage in later keys" : "garbage in padded keys", score);
    c.name += dtype == BA_F32 ? " f32" : " bf16", c.dtype = dtype, c.causal = future;
    if (!future) c.padding = {BA_BOOL, Padding::RANDOM, true, true, false};
    if (!chosen(c.name)) return;
    const int64_t cut = c.L / 2, rows = future ? cut : c.S;
    Inputs inputs[] = {make_inputs(c), make_inputs(c)};
    for (int loud : {0, 1})
        for (Tensor *x : {&inputs[loud].k, &inputs[loud].v}) {
            const Tensor old = x->copy();
            x->fill([&](int64_t b, int64_t g, int64_t s, int64_t i) {
                const bool hidden = future ? s >= cut : inputs[0].padding.get(b, 0, 0, s) == 0;
                return hidden ? loud * (i % 2 ? -1e30 : 1e30) : old.get(b, g, s, i);
            });
        }
    for (int64_t isa : options.isas) {
        const Outputs a = compute(c, inputs[0], isa, 2), b = compute(c, inputs[1], isa, 2);
        const bool same = equal(a.out, b.out, rows) && equal(a.dq, b.dq, rows) && equal(a.stats, b.stats, rows);
        if (!same) fail(c.name, isa, "out, dq or stats depend on keys that are not seen");
        if (!future && !(equal(a.dk, b.dk, c.S) && equal(a.dv, b.dv, c.S)))
            fail(c.name, isa, "dk or dv depend on keys that are not seen");
    }
}

// NaN that a query sees must come out (a kernel that swallows it hides a broken model), and only there.
void nan_is_seen(int64_t score, int64_t dtype) {
    Case c = sample(dtype == BA_F32 ? "nan f32" : "nan bf16", score);
    c.dtype = dtype, c.backward = false;
    if (!chosen(c.name)) return;
    for (char which : {'q', 'k', 'v'})
        for (int64_t place : {(int64_t)0, c.L - 2})
            for (int64_t isa : options.isas) {
                Inputs in = make_inputs(c);
                (which == 'q' ? in.q : which == 'k' ? in.k : in.v).set(1, 1, place, 3, NAN);
                const Outputs o = compute(c, in, isa, 1);
                for (int64_t row = 0; row < c.B * c.N * c.L; ++row) {
                    const int64_t b = row / c.L / c.N, n = row / c.L % c.N, l = row % c.L;
                    const bool hit = b == 1 && (which == 'q' ? n == 1 && l == place : n / 2 == 1);
                    const bool got = std::isnan(o.out.get(b, n, l, 3));
                    const std::string where = std::string(" NaN in ") + which + ", row " + std::to_string(row);
                    if (hit && !got) fail(c.name, isa, "does not come out:" + where);
                    if (!hit && got) fail(c.name, isa, "comes out elsewhere:" + where);
                }
            }
}

// Several Python threads may call at once.
void concurrent_callers() {
    if (!chosen("concurrent callers")) return;
    for (int64_t isa : options.isas) {
        std::vector<Case> cases;
        std::vector<Inputs> inputs;
        std::vector<Outputs> alone;
        for (int64_t i = 0; i < 4; ++i) {
            Case c = sample("concurrent callers", i % 2);
            c.L += 16 * i, c.S -= 7 * i, c.causal = i == 3;
            cases.push_back(c);
            inputs.push_back(make_inputs(c));
            alone.push_back(compute(c, inputs.back(), isa, 1));
        }
        std::atomic<int> wrong{0};
        std::vector<std::thread> callers;
        for (size_t i = 0; i < cases.size(); ++i)
            callers.emplace_back([&, i] {
                for (int again = 0; again < (options.quick ? 3 : 20); ++again)
                    if (!compute(cases[i], inputs[i], isa, 1 + again % 2).same(alone[i])) ++wrong;
            });
        for (std::thread &t : callers) t.join();
        if (wrong) fail("concurrent callers", isa, std::to_string(wrong) + " results differ from those of one caller");
    }
}

} // namespace

void run_special() {
    refusals();
    for (int64_t score : {BA_SOFTMAX, BA_EXPRESSIVE}) {
        oracle_itself(score);
        variants(score);
        one_tensor_two_gradients(score);
        for (int64_t L : {3, 61}) parts_of_the_keys(score, L);
        for (int64_t dtype : {BA_F32, BA_BF16}) {
            garbage(score, dtype, false);
            garbage(score, dtype, true);
            nan_is_seen(score, dtype);
        }
    }
    concurrent_callers();
}
