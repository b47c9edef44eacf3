// Decoding over a cache as it is stored: int8 with a scale for each token and head, keys turned by rotary positions as
// they are read, both, as separate tensors and as one, with distances (ALiBi) or without. The oracle gets the numbers
// that the stored ones stand for.
#include "kernel_attention.hpp"

namespace {

struct Cache {
    Inputs in;                     // queries, masks, and keys and values in the call's type
    Tensor k, v;                   // what is stored: int8, or the inputs' own (then empty); v is empty where k serves
    Tensor k_scale, v_scale;       // (B, heads, S, 1), each in a layout of its own
    Tensor cosine, sine;           // (1, 1, S, H / 2)
    Tensor slopes;                 // (1, 1, 1, N)
};

// Whole numbers over all of int8, its ends in every row.
void fill_int8(Tensor &x, Random &r) {
    x.fill([&](int64_t, int64_t, int64_t s, int64_t i) {
        return i == 0 ? (s % 2 ? -128.0 : 127.0) : (double)(r.below(256) - 128);
    });
}

Cache make_cache(const CacheCase &cache) {
    const Case &c = cache.call;
    Random r("cache of " + c.name);
    Cache made;
    made.in = make_inputs(c);
    if (cache.int8) {
        const auto scale = [&](int64_t, int64_t, int64_t s, int64_t) {
            const double size = c.fill == SCALED ? 1.0 : std::pow(2.0, (double)(s % 5) - 2.0);
            return (double)(float)(size * (0.5 + r.uniform()) / 64.0);
        };
        made.k = Tensor(STORED_INT8, {c.B, c.key_heads(), c.S, c.H}, c.keys);
        made.k_scale = Tensor(BA_F32, {c.B, c.key_heads(), c.S, 1}, c.keys == GAPPED ? GAPPED : HEADS_INSIDE);
        fill_int8(made.k, r), made.k_scale.fill(scale);
        if (!c.shared) {
            made.v = Tensor(STORED_INT8, {c.B, c.value_heads(), c.S, c.W}, c.keys);
            made.v_scale = Tensor(BA_F32, {c.B, c.value_heads(), c.S, 1}, c.keys == GAPPED ? CONTIGUOUS : PACKED);
            fill_int8(made.v, r), made.v_scale.fill(scale);
        }
    }
    if (cache.rotated) {
        made.cosine = Tensor(BA_F32, {1, 1, c.S, c.H / 2}, c.keys == GAPPED ? GAPPED : CONTIGUOUS);
        made.sine = Tensor(BA_F32, {1, 1, c.S, c.H / 2}, c.keys == GAPPED ? GAPPED : CONTIGUOUS);
        const auto angle = [&](int64_t s, int64_t p) { return (double)s * std::pow(1e4, -2.0 * (double)p / (double)c.H); };
        made.cosine.fill([&](int64_t, int64_t, int64_t s, int64_t p) { return std::cos(angle(s, p)); });
        made.sine.fill([&](int64_t, int64_t, int64_t s, int64_t p) { return std::sin(angle(s, p)); });
    }
    if (cache.slopes) {
        made.slopes = Tensor(BA_F32, {1, 1, 1, c.N});
        made.slopes.fill([&](int64_t, int64_t, int64_t, int64_t n) { return std::exp2(-2.0 - (double)(n % 8)); });
    }
    return made;
}

// The place of the first query among the keys, from which distances count: two keys lie behind the last query.
int64_t place(const Case &c) { return c.S - c.L - 2; }

// What the stored numbers stand for, in double.
Problem read_cache(const CacheCase &cache, const Cache &made) {
    const Case &c = cache.call;
    Problem p = read(c, made.in);
    if (cache.int8) {
        p.k = of_pairs(made.k, c.G, &made.k_scale);
        p.v = c.shared ? p.k : of_pairs(made.v, c.G, &made.v_scale);
    }
    const int64_t P = c.H / 2;
    for (int64_t row = 0; cache.rotated && row < c.B * c.G * c.S; ++row)
        for (int64_t i = 0; i < P; ++i) { // p.v, a copy even where one tensor is both, stays as it is
            double &first = p.k[(size_t)(row * c.H + i)], &second = p.k[(size_t)(row * c.H + P + i)];
            const double x = first, y = second;
            const double cosine = made.cosine.get(0, 0, row % c.S, i), sine = made.sine.get(0, 0, row % c.S, i);
            first = x * cosine - y * sine, second = y * cosine + x * sine;
        }
    for (int64_t row = 0; cache.slopes && row < c.B * c.N * c.L; ++row)
        for (int64_t s = 0; s < c.S; ++s) {
            const double slope = made.slopes.get(0, 0, 0, row / c.L % c.N);
            const double distance = (double)(s - row % c.L - place(c));
            if (cache.inside) p.inside.push_back(slope * distance);
            else p.bias[(size_t)(row * c.S + s)] -= slope * std::abs(distance);
        }
    return p;
}

ba_call call_of(const CacheCase &cache, const Cache &made) {
    const Case &c = cache.call;
    ba_call call = make_call(c, made.in);
    if (cache.int8) {
        const Tensor &v = c.shared ? made.k : made.v, &v_scale = c.shared ? made.k_scale : made.v_scale;
        call.k = made.k.data(), call.k_b = made.k.stride[0], call.k_g = made.k.stride[1], call.k_s = made.k.stride[2];
        call.v = v.data(), call.v_b = v.stride[0], call.v_g = v.stride[1], call.v_s = v.stride[2];
        call.k_scale = static_cast<const float *>(made.k_scale.data());
        call.v_scale = static_cast<const float *>(v_scale.data());
        const auto &[k_scale_b, k_scale_g, k_scale_s, one] = made.k_scale.stride;
        call.k_scale_b = k_scale_b, call.k_scale_g = k_scale_g, call.k_scale_s = k_scale_s;
        call.v_scale_b = v_scale.stride[0], call.v_scale_g = v_scale.stride[1], call.v_scale_s = v_scale.stride[2];
    }
    if (cache.rotated) {
        call.rotary_cos = static_cast<const float *>(made.cosine.data());
        call.rotary_sin = static_cast<const float *>(made.sine.data());
        call.rotary_s = made.cosine.stride[2];
    }
    if (cache.slopes) {
        call.slopes = static_cast<const float *>(made.slopes.data());
        call.slopes_inside = cache.inside, call.slopes_from = place(c);
    }
    return call;
}

CacheCase sizes(const std::string &name, int64_t N, int64_t G, int64_t L, int64_t S, int64_t H, int64_t W) {
    CacheCase cache{};
    Case &c = cache.call;
    c.name = "cache " + name, c.B = 2, c.N = N, c.G = G, c.L = L, c.S = S, c.H = H, c.W = W, c.backward = false;
    return cache;
}

std::string number(int64_t n) { return std::to_string(n); }

} // namespace

void run_cache(const CacheCase &cache) {
    const Case &c = cache.call;
    if (!chosen(c.name)) return;
    const Cache made = make_cache(cache);
    const Problem p = read_cache(cache, made);
    const Answer exact = evaluate<double>(p, false);
    Plain plain(p, exact, false);
    const Tensor *tensors[] = {&made.in.q,    &made.in.k,    &made.in.v,   &made.in.mask, &made.in.padding, &made.k,
                               &made.v,       &made.k_scale, &made.v_scale, &made.cosine, &made.sine,    &made.slopes};
    std::vector<Tensor> before;
    for (const Tensor *x : tensors) before.push_back(x->copy());
    for (int64_t isa : options.isas) {
        Tensor first;
        const double coarse = !cache.int8 ? 0 : coarse_error(isa, exact.out, [&](int64_t way) {
            return evaluate<double>(blurred(p, way), false).out;
        });
        for (int64_t threads : {1, 2, 1}) {
            ba_call call = call_of(cache, made);
            Outputs o = make_outputs(c, made.in, call);
            call.isa = isa, call.threads = threads;
            o.status = ba_forward(&call);
            check(c, isa, o, exact, plain, coarse);
            if (!first.empty() && !first.same(o.out)) fail(c.name, isa, "another run, other bits");
            first = std::move(o.out);
        }
        for (size_t i = 0; i < before.size(); ++i)
            if (!before[i].same(*tensors[i])) fail(c.name, isa, "input " + number((int64_t)i) + " was written to");
    }
}

// Many queries, dropout and gradients are refused, not read as other numbers.
void run_cache_refusals() {
    const std::string name = "cache refusals";
    if (!chosen(name)) return;
    for (int kind = 1; kind < 5; ++kind)
        for (int64_t isa : options.isas) {
            CacheCase cache = sizes("refusals", 4, 2, 5, 61, 32, 32);
            cache.int8 = kind & 1, cache.rotated = kind & 2, cache.slopes = kind & 4;
            const auto status = [&](int64_t few, double dropout, bool backward) {
                cache.call.L = few, cache.call.dropout = dropout, cache.call.backward = backward;
                const Cache made = make_cache(cache);
                ba_call call = call_of(cache, made);
                const Outputs o = make_outputs(cache.call, made.in, call);
                call.isa = isa, call.threads = 1;
                return backward ? ba_backward(&call) : ba_forward(&call);
            };
            if (status(BA_FEW, 0, false) != BA_OK) fail(name, isa, "the most queries of decoding: not BA_OK");
            if (status(BA_FEW + 1, 0, false) != BA_DECODES_ONLY) fail(name, isa, "more queries are not refused");
            if (status(1, 0.5, false) != BA_DECODES_ONLY) fail(name, isa, "dropout is not refused");
            if (status(1, 0, true) != BA_DECODES_ONLY) fail(name, isa, "a backward pass is not refused");
        }
}

std::vector<CacheCase> cache_cases() {
    std::vector<CacheCase> cases;
    // In each of the three kinds, both scores, both types of the queries; what is only rotated is of their type.
    const auto all = [&](const CacheCase &like, bool quick = false) {
        if (options.quick && !quick) return;
        for (int kind = like.slopes ? 0 : 1; kind < 4; ++kind)
            for (int64_t score : {BA_SOFTMAX, BA_EXPRESSIVE})
                for (int64_t dtype : {BA_F32, BA_BF16}) {
                    CacheCase cache = like;
                    Case &c = cache.call;
                    cache.int8 = kind & 1, cache.rotated = kind & 2;
                    if (cache.rotated && c.H % 2) continue;
                    c.score = score, c.dtype = dtype;
                    c.name += std::string(cache.int8 ? " int8" : "") + (cache.rotated ? " rotated" : "");
                    c.name += score == BA_SOFTMAX ? " softmax" : " expressive";
                    c.name += dtype == BA_F32 ? " f32" : " bf16";
                    cases.push_back(cache);
                }
    };
    const std::vector<int64_t> widths = {1, 2, 6, 8, 14, 16, 31, 32, 34, 62, 64, 96, 111, 128, 258};
    for (size_t i = 0; i < widths.size(); ++i) {
        const int64_t H = widths[i], W = widths[(4 * i + 3) % widths.size()];
        CacheCase cache = sizes("H " + number(H) + " W " + number(W), 2, 1, 2, 67, H, W);
        all(cache, i % 4 == 2);
        cache = sizes("shared H " + number(H), 3, 3, 1, 71, H, H);
        cache.call.shared = true, cache.call.keys = HEADS_INSIDE, cache.call.out = HEADS_INSIDE;
        all(cache, i % 4 == 0);
    }
    for (int64_t S : {1, 2, 7, 13, 15, 16, 17, 31, 33, 63, 255, 511, 513, 1031, 3001}) { // seams of blocks and chunks
        CacheCase cache = sizes("S " + number(S), 4, 2, 1, S, 32, 32);
        cache.call.keys = S % 3 == 0 ? GAPPED : HEADS_INSIDE, cache.call.shared = S % 2 == 0;
        all(cache, S == 1 || S == 17 || S == 255);
        cache.call.padding = {BA_BOOL, S % 4 == 1 ? Padding::FRONT : Padding::WHOLE, true, true, false};
        cache.call.name += " padded";
        all(cache, S == 33);
    }
    for (int64_t L = 1; L <= BA_FEW; ++L) {
        CacheCase cache = sizes("L " + number(L), 3, 3, L, 137, 64, 64);
        Case &c = cache.call;
        c.causal = true, c.offset = 137 - L, c.keys = GAPPED, c.in = PACKED, c.out = GAPPED, c.shared = L % 2 == 0;
        all(cache, L == 3);
        c.window = 29, c.name += " window";
        all(cache, L == 8);
        c.mask = {BA_F32, 8 | 4 | 2 | 1, GAPPED, 0.3, 1.0, false, true}, c.name += " masked";
        all(cache, L == 2);
    }
    for (auto [N, G] : std::vector<std::pair<int64_t, int64_t>>{{8, 1}, {6, 3}, {7, 7}, {31, 31}}) {
        CacheCase cache = sizes("groups " + number(N) + "/" + number(G), N, G, 1, 211, 16, 16);
        cache.call.keys = HEADS_INSIDE, cache.call.shared = N != 6;
        all(cache, N == 31);
    }
    // Pairs of which neighbours share a head, more query heads for one than a block has rows, and distances with both.
    const std::vector<std::array<int64_t, 5>> pairs = { // N G key_group value_group L
        {6, 6, 2, 1, 1}, {6, 6, 1, 3, 1}, {12, 6, 3, 2, 1}, {12, 6, 2, 1, 3}, {4, 2, 2, 2, 1}, {8, 4, 4, 1, 8},
        {9, 1, 1, 1, 1}, {12, 1, 1, 1, 2}, {32, 2, 2, 1, 1}, {24, 2, 1, 2, 5}, {16, 1, 1, 1, 8}};
    for (size_t i = 0; i < pairs.size(); ++i) {
        const auto &[N, G, key_group, value_group, L] = pairs[i];
        CacheCase cache = sizes("pairs " + number(N) + "/" + number(G) + " L " + number(L), N, G, L, 83, 32, 16);
        Case &c = cache.call;
        c.name += " groups " + number(key_group) + " " + number(value_group);
        c.key_group = key_group, c.value_group = value_group;
        c.keys = i % 3 == 2 ? GAPPED : i % 3 ? HEADS_INSIDE : CONTIGUOUS;
        c.shared = key_group == value_group && i % 2 == 0, c.W = c.shared ? c.H : c.W;
        if (L > 1) c.causal = true, c.offset = c.S - L, c.window = L == 3 ? 29 : 0;
        if (i % 4 == 1) c.padding = {BA_BOOL, Padding::TAIL, true, true, false};
        all(cache, i % 3 == 2);
        if (i % 2) continue;
        cache.slopes = true, cache.inside = i % 4 == 2, c.name += cache.inside ? " slopes inside" : " slopes";
        all(cache, i == 2 || i == 8);
    }
    for (double amount : {1e-12, 1e-20, 1e-30}) { // scores whose squares underflow
        CacheCase cache = sizes("tiny scores " + std::to_string((int)std::log10(amount)), 2, 2, 2, 149, 32, 32);
        cache.call.fill = SCALED, cache.call.amount = amount, cache.call.shared = amount > 1e-15;
        all(cache, amount == 1e-20);
    }
    return cases;
}
