// The cases. Sizes are primes or one off a power of two, where blocked kernels have their seams.
#include "kernel_cases.hpp"

#include <algorithm>

namespace {

const std::vector<int64_t> WIDTHS = {1, 3, 7, 8, 16, 31, 32, 59, 64, 111, 128, 257};

class List {
public:
    std::vector<Case> cases;

    // The case in both scores and both types. `quick` keeps it in the emulated run.
    void four(Case c, bool quick = false) {
        for (int64_t score : {BA_SOFTMAX, BA_EXPRESSIVE}) c.score = score, two(c, quick);
    }
    void two(const Case &c, bool quick = false) {
        for (int64_t dtype : {BA_F32, BA_BF16}) {
            if (options.quick && !quick) return;
            cases.push_back(c);
            cases.back().dtype = dtype;
            cases.back().name += c.score == BA_SOFTMAX ? " softmax" : " expressive";
            cases.back().name += dtype == BA_F32 ? " f32" : " bf16";
        }
    }
};

Case sizes(const std::string &name, int64_t B, int64_t N, int64_t G, int64_t L, int64_t S, int64_t H, int64_t W) {
    Case c;
    c.name = name, c.B = B, c.N = N, c.G = G, c.L = L, c.S = S, c.H = H, c.W = W;
    return c;
}

std::string number(int64_t n) { return std::to_string(n); }

void widths_and_lengths(List &list) {
    for (size_t i = 0; i < WIDTHS.size(); ++i) {
        const int64_t H = WIDTHS[i], W = WIDTHS[(5 * i + 3) % WIDTHS.size()];
        list.four(sizes("widths H " + number(H) + " W " + number(H), 1, 2, 2, 37, 71, H, H), i % 4 == 2);
        list.four(sizes("widths H " + number(H) + " W " + number(W), 1, 2, 1, 29, 67, H, W), i % 4 == 0);
    }
    const std::vector<int64_t> seams = {1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 47, 63, 64, 65, 127, 129, 193, 255, 257};
    for (size_t i = 0; i < seams.size(); ++i) {
        const int64_t S = seams[(7 * i + 4) % seams.size()];
        Case c = sizes("lengths L " + number(seams[i]) + " S " + number(S), 1, 3, 3, seams[i], S, 16, 16);
        list.four(c, i % 5 == 1);
        c.causal = true, c.name += " causal";
        list.four(c, i % 5 == 2);
    }
    for (int64_t L : {3, 131, 521})
        for (int64_t S : {521, 1031}) {
            Case c = sizes("long L " + number(L) + " S " + number(S), 1, 1, 1, L, S, 8, 11);
            c.causal = L != 3;
            list.four(c);
        }
    list.four(sizes("long L 41 S 4099", 1, 1, 1, 41, 4099, 8, 8));
    Case square = sizes("long L 1031 S 1031 causal", 1, 1, 1, 1031, 1031, 8, 8);
    square.causal = true, square.shared = true;
    list.four(square);
    list.four(sizes("many small problems", 37, 5, 5, 3, 3, 8, 8), true);
    list.four(sizes("many heads of one number", 3, 31, 1, 2, 5, 1, 1), true);
}

void decoding(List &list) {
    for (int64_t L = 1; L <= 8; ++L) {
        Case c = sizes("decode L " + number(L), 1, 6, 2, L, L % 7 == 1 ? 3001 : 509, 64, 64);
        list.four(c);
        c = sizes("decode shared L " + number(L), 2, 3, 3, L, L == 2 ? 3001 : 709, 32, 32);
        c.shared = true;
        c.padding = {BA_BOOL, Padding::TAIL, true, true, false};
        c.out = HEADS_INSIDE, c.in = HEADS_INSIDE, c.keys = PACKED;
        list.four(c, L == 3);
    }
    for (int64_t L : {1, 3, 8}) { // the first query sees one key: its weight is 1, forwards and backwards
        Case c = sizes("decode causal L " + number(L), 2, 31, 31, L, 37, 16, 16);
        c.causal = true;
        list.four(c, L == 1);
    }
    for (int64_t S : {1, 2, 13, 257, 769}) {
        Case c = sizes("decode one query S " + number(S), 2, 4, 1, 1, S, 59, 31);
        c.mask = {BA_F32, 1 | 2 | 4 | 8, CONTIGUOUS, 0.2, 2.0, false, false};
        list.four(c, S == 13 || S == 257);
        c = sizes("decode one query hidden front S " + number(S), 2, 5, 5, 1, S, 8, 128);
        c.padding = {BA_BOOL, Padding::FRONT, true, true, false};
        list.four(c, S == 257);
    }
}

void grouped_and_shared(List &list) {
    for (auto [N, G] : std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {6, 2}, {5, 1}, {9, 3}, {8, 4}})
        for (bool shared : {false, true}) {
            const std::string name = "groups " + number(N) + "/" + number(G) + (shared ? " shared" : "");
            Case c = sizes(name, 2, N, G, 41, 53, 16, 16);
            c.shared = shared, c.causal = N == 6;
            c.in = HEADS_INSIDE, c.keys = shared ? GAPPED : PACKED, c.out = HEADS_INSIDE;
            list.four(c, N == 6);
        }
    for (int64_t H : WIDTHS) {
        Case c = sizes("shared H " + number(H), 1, 2, 2, 43, 61, H, H);
        c.shared = true;
        list.four(c, H == 31 || H == 64);
    }
}

// Restrictions, dropout and layouts in turn, so that few cases show many combinations.
void vary(Case &c, size_t i) {
    const std::vector<Layout> lie = {CONTIGUOUS, HEADS_INSIDE, PACKED, BATCH_SECOND, GAPPED};
    c.in = lie[(i + i / 5) % 5], c.keys = lie[(i / 2 + 1) % 5], c.out = lie[(i / 3 + 2) % 5];
    switch (i % 7) {
    case 1: c.causal = true; break;
    case 2: c.mask = {BA_BOOL, 4 | 2 | 1, GAPPED, 0.3, 1.0, false, true}; break;
    case 3: c.causal = true, c.offset = c.S - c.L, c.window = 13; break;
    case 4: c.mask = {BA_F32, 8 | 4 | 1, CONTIGUOUS, 0.2, 1.0, false, false}; break;
    case 5: c.dropout = 0.3, c.seed = 5 + (int64_t)i; break;
    case 6: c.padding = {BA_BOOL, Padding::FRONT, true, true, false}; break;
    default: break;
    }
}

// Pairs of which neighbours share a head of keys, or of values, with one query head for each pair and with several.
void pairs_that_share(List &list) {
    const std::vector<std::array<int64_t, 4>> pairs = { // N G key_group value_group
        {2, 2, 2, 1}, {6, 6, 1, 3}, {6, 6, 3, 2}, {6, 6, 2, 3},
        {12, 6, 3, 1}, {12, 6, 1, 2}, {12, 6, 2, 3}, {9, 3, 3, 3}};
    size_t i = 0;
    for (const auto &[N, G, key_group, value_group] : pairs)
        for (int64_t L : {1, 2, 5, 37, 71}) { // on both sides of FEW, and of a panel
            const std::string groups = " groups " + number(key_group) + " " + number(value_group);
            const std::string name = "pairs " + number(N) + "/" + number(G) + groups + " L " + number(L);
            Case c = sizes(name, 2, N, G, L, L < 9 ? 101 : 53, L % 2 ? 16 : 13, 16);
            c.key_group = key_group, c.value_group = value_group;
            vary(c, i);
            list.four(c, i % 4 == 1);
            ++i;
        }
    for (int64_t L : {3, 43}) {
        Case c = sizes("pairs shared L " + number(L), 2, 6, 6, L, 67, 16, 16);
        c.shared = true, c.key_group = c.value_group = 3, c.keys = HEADS_INSIDE, c.out = GAPPED;
        list.four(c, true);
        c = sizes("pairs, tiny rows among others L " + number(L), 1, 4, 4, L, 101, 16, 16);
        c.score = BA_EXPRESSIVE, c.fill = SCALED_ODD_ROWS, c.amount = 1e-20, c.key_group = 2, c.value_group = 4;
        list.two(c, true);
    }
}

// More query heads for one head of keys than a block of decoding has rows: they are divided among several.
void many_queries(List &list) {
    size_t i = 0;
    for (int64_t group : {9, 12, 16, 24, 32})
        for (int64_t L = 1; L <= BA_FEW + 1; ++L, ++i) {
            const int64_t G = i % 3 == 1 ? 2 : 1;
            const int64_t N = G * group, S = 37 + 30 * (i % 2);
            Case c = sizes("many queries " + number(group) + " L " + number(L), 1, N, G, L, S, 16, 8);
            if (i % 6 == 1) c.key_group = 2;
            if (i % 6 == 4) c.value_group = 2;
            c.shared = i % 5 == 3 && c.key_group == c.value_group, c.W = c.shared ? c.H : c.W;
            vary(c, i);
            list.four(c, i % 8 == 4);
        }
}

void layouts(List &list) {
    for (Layout in : {CONTIGUOUS, HEADS_INSIDE, PACKED, BATCH_SECOND, GAPPED, ONE_BATCH, ONE_ROW})
        for (Layout out : {CONTIGUOUS, HEADS_INSIDE, PACKED, BATCH_SECOND, GAPPED}) {
            Case c = sizes("layouts " + number(in) + " to " + number(out), 3, 2, 2, 19, 23, 13, 17);
            c.in = in, c.out = out, c.keys = (Layout)((in + 2) % TRANSPOSED);
            list.four(c, in == out || in == ONE_ROW);
            c.name += " shared", c.W = c.H, c.shared = true, c.keys = in;
            list.four(c, in == PACKED && out == GAPPED);
        }
}

void masks(List &list) {
    for (int dims = 0; dims < 16; ++dims)
        for (int64_t type : {BA_BOOL, BA_F32, BA_BF16}) {
            Case c = sizes("mask dims " + number(dims) + " type " + number(type), 2, 4, 2, 37, 43, 16, 16);
            c.mask.type = type, c.mask.dims = dims;
            c.mask.layout = dims % 3 == 0 ? CONTIGUOUS : dims % 3 == 1 ? GAPPED : TRANSPOSED;
            c.causal = dims % 5 == 3;
            list.four(c, dims % 5 == 3);
        }
    for (int64_t type : {BA_BOOL, BA_F32, BA_BF16})
        for (auto form : {Padding::RANDOM, Padding::TAIL, Padding::FRONT, Padding::WHOLE}) {
            Case c = sizes("padding type " + number(type) + " form " + number(form), 3, 2, 1, 31, 137, 16, 8);
            c.padding = {type, form, true, true, form == Padding::RANDOM};
            list.four(c, form == Padding::FRONT);
            c.causal = true, c.name += " causal";
            list.four(c);
            c.mask = {form == Padding::TAIL ? BA_BOOL : BA_F32, 2 | 1, GAPPED, 0.3, 1.0, false, true};
            c.name += " masked";
            list.four(c, form == Padding::WHOLE);
        }
    for (int which = 0; which < 3; ++which) { // padding of size 1 over the batch, the keys, both
        Case c = sizes("padding broadcast " + number(which), 3, 2, 2, 11, 29, 8, 8);
        c.padding = {which == 2 ? BA_F32 : BA_BOOL, Padding::RANDOM, which == 1, which == 0, false};
        list.four(c, true);
    }
    for (int64_t type : {BA_F32, BA_BF16}) {
        Case c = sizes("lowest number for -inf type " + number(type), 2, 2, 2, 23, 41, 16, 16);
        c.mask = {type, 2 | 1, CONTIGUOUS, 0.3, 1.0, true, true};
        list.four(c, true);
        c = sizes("biases of 200 type " + number(type), 2, 2, 1, 37, 89, 16, 16);
        c.mask = {type, 8 | 2 | 1, CONTIGUOUS, 0.1, 200.0, false, true};
        list.four(c, true);
    }
    for (auto hide : {0.97, 1.0}) {
        Case c = sizes("hidden share " + std::to_string(hide), 2, 3, 1, 67, 301, 8, 16);
        c.mask = {BA_BOOL, 15, CONTIGUOUS, hide, 1.0, false, true};
        list.four(c, hide == 1.0);
        c.mask.type = BA_F32, c.name += " float";
        list.four(c);
    }
}

std::string power(double x) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", x);
    return text;
}

// Scores whose square underflows: a row of them is still normalised.
void tiny(List &list) {
    for (double amount : {1e-4, 1e-7, 1e-8, 3e-9, 1e-12, 1e-15, 1e-18, 1e-19, 1e-20, 1e-22, 1e-30, 1e-36, 1e-40}) {
        Case c = sizes("tiny scores " + power(amount), 1, 2, 1, 31, 149, 16, 16);
        c.score = BA_EXPRESSIVE, c.fill = SCALED, c.amount = amount, c.backward = amount > 1e-36;
        list.two(c, amount == 1e-20);
        c.mask = {BA_F32, 2 | 1, CONTIGUOUS, 0.3, 1.0, false, true}, c.name += " biased";
        list.two(c, amount == 1e-12);
        c.mask = {}, c.L = 2, c.S = 1009, c.name = "tiny scores decode " + power(amount);
        list.two(c);
    }
    for (double amount : {1e-6, 1e-10, 1e-20, 1e-30}) {
        Case c = sizes("tiny rows among others " + power(amount), 1, 2, 2, 37, 101, 16, 16);
        c.score = BA_EXPRESSIVE, c.fill = SCALED_ODD_ROWS, c.amount = amount;
        list.two(c, amount == 1e-20);
        for (auto form : {Padding::TAIL, Padding::FRONT}) {
            const std::string name = "tiny scores, loud hidden keys " + power(amount) + " form " + number(form);
            c = sizes(name, 2, 2, 2, 19, 601, 8, 8);
            c.score = BA_EXPRESSIVE, c.fill = LOUD_HIDDEN, c.amount = amount;
            c.padding = {BA_BOOL, form, true, true, false};
            list.two(c, amount == 1e-30);
        }
    }
}

// Scores that grow or fall along the keys, so that whatever is carried from block to block has to follow; huge ones.
void steep_and_huge(List &list) {
    for (Fill fill : {RAMP_UP, RAMP_DOWN})
        for (double amount : {1e-30, 1e-6}) {
            const std::string name = std::string("scores ") + (fill == RAMP_UP ? "rise " : "fall ") + power(amount);
            Case c = sizes(name, 1, 2, 1, 17, 739, 16, 16);
            c.fill = fill, c.amount = amount;
            list.four(c, amount < 1e-9);
            c.mask = {BA_F32, 2 | 1, CONTIGUOUS, 0.3, 1.0, false, true}, c.name += " biased";
            list.four(c);
        }
    for (double amount : {1e3, 1e10, 1e18, 1e25}) {
        Case c = sizes("huge rows among others " + power(amount), 1, 2, 2, 37, 101, 16, 16);
        c.score = BA_EXPRESSIVE, c.fill = SCALED_ODD_ROWS, c.amount = amount;
        list.two(c, amount == 1e18);
        c.name = "huge rows alone " + power(amount), c.fill = SCALED, c.gradient_floor = 1e-9;
        list.two(c);
    }
    Case c = sizes("logits of 1e4", 1, 2, 2, 31, 131, 16, 16);
    c.fill = EXACT, c.scale = 32.0;
    list.four(c, true);
}

void special_scores(List &list) {
    Case c = sizes("equal scores", 1, 2, 2, 31, 131, 16, 16);
    c.fill = EQUAL;
    list.four(c, true);
    c = sizes("zero queries and keys", 2, 2, 1, 31, 67, 16, 16);
    c.fill = SOME_ZERO;
    list.four(c, true);
    c.causal = true, c.name += " causal";
    list.four(c);
    for (double scale : {-0.3, 1.0, 2.5}) {
        c = sizes("scale " + power(scale), 1, 2, 1, 29, 37, 16, 16);
        c.scale = scale;
        list.four(c, scale < 0);
    }
    c = sizes("scale zero", 1, 2, 1, 29, 37, 16, 16);
    c.zero_scale = true;
    list.four(c, true);
}

// Every form of tile: which weights are dropped must not depend on it. Few queries take the panels' way here.
void dropout(List &list) {
    for (double p : {0.1, 0.5, 1.0}) {
        Case c = sizes("dropout " + power(p), 2, 4, 2, 67, 149, 16, 31);
        c.dropout = p, c.seed = 0x123456789abcdef;
        list.four(c, p == 0.5);
        c.causal = true, c.name += " causal";
        list.four(c, p == 0.1);
        c.mask = {BA_F32, 8 | 2 | 1, GAPPED, 0.3, 1.0, false, true};
        c.padding = {BA_BOOL, Padding::TAIL, true, true, false}, c.name += " masked";
        list.four(c, p == 0.5);
        c.mask = {}, c.padding = {}, c.causal = false, c.shared = true, c.W = c.H;
        c.in = HEADS_INSIDE, c.keys = GAPPED, c.out = PACKED, c.name += " shared";
        list.four(c, p == 0.1);
        c = sizes("dropout few queries " + power(p), 2, 2, 1, 3, 509, 32, 32);
        c.dropout = p, c.seed = INT64_MAX - 1;
        list.four(c, p == 0.1);
    }
    for (double amount : {1e-12, 1e-20}) {
        Case c = sizes("dropout, tiny rows among others " + power(amount), 1, 2, 2, 37, 101, 16, 16);
        c.score = BA_EXPRESSIVE, c.fill = SCALED_ODD_ROWS, c.amount = amount, c.dropout = 0.3, c.seed = 7;
        list.two(c, amount == 1e-20);
    }
}

// Triangles that begin behind earlier keys, and windows: narrower than a panel, wider, wider than all, behind all keys.
void bands(List &list) {
    const std::vector<std::pair<int64_t, int64_t>> sizes_LS = {
        {1, 307}, {2, 67}, {7, 509}, {5, 1031}, {13, 137}, {67, 67}, {131, 311}, {257, 61}, {193, 521}};
    size_t i = 0;
    for (auto [L, S] : sizes_LS)
        for (int64_t offset : {int64_t{0}, int64_t{3}, S - L > 0 ? S - L : 17, S + 11})
            for (int64_t window : {0, 1, 13, 64, 127, 1021}) {
                const std::string name = "band L " + number(L) + " S " + number(S) + " offset " + number(offset);
                Case c = sizes(name + " window " + number(window), 1, 2, 1 + (int64_t)i % 2, L, S, 19, 16);
                c.causal = true, c.offset = offset, c.window = window;
                c.shared = i % 3 == 1, c.H = c.shared ? c.W : c.H;
                if (i % 4 == 3) c.mask = {i % 8 == 3 ? BA_BOOL : BA_F32, 2 | 1, GAPPED, 0.2, 1.0, false, true};
                if (i % 5 == 2) c.padding = {i % 2 ? BA_BOOL : BA_BF16, Padding::FRONT, true, true, false};
                if (i % 6 == 5) c.dropout = 0.3, c.seed = 11;
                if (i % 7 == 6) c.keys = HEADS_INSIDE, c.out = HEADS_INSIDE;
                list.four(c, i % 9 == 4);
                ++i;
            }
    Case far = sizes("band far behind", 1, 1, 1, 31, 37, 8, 8);
    far.causal = true, far.offset = INT64_MAX / 4, far.window = INT64_MAX / 4 - 7;
    list.four(far, true);
    far.name = "band far behind without a window", far.window = 0;
    list.four(far, true);
    for (double amount : {1e-12, 1e-20}) {
        Case c = sizes("band, tiny rows among others " + power(amount), 1, 2, 2, 37, 101, 16, 16);
        c.score = BA_EXPRESSIVE, c.fill = SCALED_ODD_ROWS, c.amount = amount;
        c.causal = true, c.offset = 41, c.window = 29;
        list.two(c, amount == 1e-20);
    }
}

void empty(List &list) {
    list.four(sizes("no batch", 0, 2, 2, 5, 7, 8, 8), true);
    list.four(sizes("no queries", 2, 2, 1, 0, 7, 8, 8), true);
    list.four(sizes("no heads", 2, 0, 0, 5, 7, 8, 8), true);
    list.four(sizes("no query heads", 2, 0, 2, 5, 7, 8, 8), true);
    Case c = sizes("no queries shared", 2, 2, 1, 0, 7, 8, 8);
    c.shared = true, c.out = GAPPED;
    list.four(c, true);
}

// Everything at once, drawn from the seed.
void random(List &list) {
    const std::vector<int64_t> lengths = {1, 2, 3, 5, 11, 13, 17, 29, 31, 37, 61, 67, 97, 127, 131, 193, 257, 311};
    const std::vector<Layout> in = {CONTIGUOUS, HEADS_INSIDE, PACKED, BATCH_SECOND, GAPPED, ONE_BATCH, ONE_ROW};
    const std::vector<Layout> out = {CONTIGUOUS, HEADS_INSIDE, PACKED, BATCH_SECOND, GAPPED};
    const std::vector<Layout> over = {CONTIGUOUS, GAPPED, TRANSPOSED};
    const std::vector<int64_t> types = {BA_NONE, BA_BOOL, BA_F32, BA_BF16};
    const std::vector<int64_t> pairs = {1, 2, 3, 6}, queries = {1, 2, 3, 4, 12};
    const int64_t count = options.quick ? 40 : 500;
    const double budget = options.quick ? 1.5e5 : 6e5;
    for (int64_t i = 0; i < count; ++i) {
        Random r("random " + number(i));
        Case c;
        do {
            const int64_t G = r.pick(pairs), N = G * r.pick(queries), L = r.pick(lengths), S = r.pick(lengths);
            c = sizes("random " + number(i), 1 + r.below(3), N, G, L, S, r.pick(WIDTHS), r.pick(WIDTHS));
        } while ((double)(c.B * c.N * c.L * c.S * (c.H + c.W)) > budget);
        c.score = r.below(2), c.dtype = r.below(2), c.causal = r.chance(0.4);
        c.shared = r.chance(0.3), c.W = c.shared ? c.H : c.W;
        if (r.chance(0.3)) c.scale = 2.0 * r.normal();
        const int64_t key_group = 1 + r.below(3), value_group = 1 + r.below(3);
        if (c.G % key_group == 0) c.key_group = key_group;
        if (c.shared) c.value_group = c.key_group;
        else if (c.G % value_group == 0) c.value_group = value_group;
        c.in = r.pick(in), c.keys = r.pick(in), c.out = r.pick(out);
        c.mask = {r.pick(types), (int)r.below(16), r.pick(over), r.uniform(), 3 * r.uniform(), false, r.chance(0.5)};
        c.padding = {r.pick(types), (Padding::Form)r.below(4), r.chance(0.8), r.chance(0.9), r.chance(0.3)};
        if (r.chance(0.1)) c.fill = SOME_ZERO;
        if (r.chance(0.25)) c.dropout = r.uniform(), c.seed = r.below(INT64_MAX);
        if (c.causal && r.chance(0.6)) c.offset = r.below(c.S + 3), c.window = r.chance(0.7) ? r.pick(lengths) : 0;
        list.cases.push_back(c);
    }
}

} // namespace

std::vector<Case> attention_cases() {
    List list;
    widths_and_lengths(list);
    decoding(list);
    grouped_and_shared(list);
    pairs_that_share(list);
    many_queries(list);
    layouts(list);
    masks(list);
    tiny(list);
    steep_and_huge(list);
    special_scores(list);
    dropout(list);
    bands(list);
    empty(list);
    random(list);
    return list.cases;
}
