// The oracle: 2403.01643 eqs. 3-4 and 2407.18601 as explicit loops, in any floating-point type. In double it is the
// truth that kernels are compared with; in float it is the plain formula whose own error sets the bound.
#ifndef KERNEL_ORACLE_HPP
#define KERNEL_ORACLE_HPP

#include <algorithm>
#include <limits>

#include "kernel_support.hpp"

// One attention call as dense numbers, row-major in the order of the letters.
struct Problem {
    int64_t B, N, G, L, S, H, W, score;
    bool bf16, shared;              // shared: k and v are one tensor, and dk is its whole gradient
    double scale;
    std::vector<double> q, k, v, grad;
    std::vector<double> bias;       // (B, N, L, S): added to the log weight, -inf where the key is hidden
    std::vector<double> factor;     // (B, N, L, S): of a weight on its way to the output, by dropout; empty: 1
    std::vector<double> inside = {}; // (B, N, L, S): added to the score; empty: 0
};

struct Answer {
    std::vector<double> out, dq, dk, dv;
    double spread_q = 0, spread_k = 0; // largest sum of |terms| of an element of dq and dk, before they cancel
    std::vector<char> blind;        // (B, N, L): rows without any weight
    std::vector<char> unseen;       // (B, G, S): keys that every query is kept from
};

// The formula can be written down in several ways, whose roundings differ: each is a draw of the plain error.
struct Way {
    bool scale_first; // of the product's factors, the queries
    bool inverse;     // a weight is a (1/N), not a / N, and is so before the values are summed
    int64_t order;    // of sums: 0 forwards, 1 backwards, k: every k-th term, then the ones behind those ...

    explicit Way(int64_t number = 0) : scale_first(number & 1), inverse(number / 2 & 1), order(number) {}
    int64_t term(int64_t i, int64_t n) const {
        if (order < 2) return order == 0 ? i : n - 1 - i;
        for (int64_t first = 0;; ++first) {
            const int64_t count = (n - first + order - 1) / order;
            if (i < count) return first + i * order;
            i -= count;
        }
    }
    // The same for the score of key s: kernels may sum those of whole blocks and of a last one in different orders.
    // That counts where keys are equal, since one rounding of all scores would cancel.
    Way of_key(int64_t s) const {
        Way way = *this;
        if (order > 1 && s % 2) --way.order;
        return way;
    }
};
constexpr int64_t WAYS = 16;

// Weights of one row before division by the normaliser, and slope = d log-weight / dz times that weight.
// Returns the normaliser; 0 if the row has no weight.
template <class T>
T row_weights(int64_t score, const std::vector<T> &z, const double *bias, std::vector<T> &w, std::vector<T> &slope) {
    const size_t S = z.size();
    T total = 0;
    if (score == BA_SOFTMAX) {
        T largest = -INFINITY;
        for (size_t s = 0; s < S; ++s)
            if (bias[s] != -INFINITY) largest = std::max(largest, z[s] + (T)bias[s]);
        for (size_t s = 0; s < S; ++s) {
            w[s] = slope[s] = bias[s] == -INFINITY ? 0 : std::exp(z[s] + (T)bias[s] - largest);
            total += w[s];
        }
        return total;
    }
    // In the narrow type z^2 of a row of tiny scores would underflow: it is measured in the largest of them.
    T largest = 0, unit = 1, shift = -INFINITY;
    bool biased = false;
    for (size_t s = 0; s < S; ++s) {
        if (bias[s] == -INFINITY) continue;
        largest = std::max(largest, std::abs(z[s]));
        biased = biased || bias[s] != 0;
    }
    if (largest != 0 && largest < (T)1e-8) unit = largest;
    for (size_t s = 0; s < S; ++s) {
        const T square = z[s] * z[s], in_units = z[s] / unit;
        w[s] = square > 1 ? 1 / (1 + 1 / square) : in_units * in_units / (1 + square);
        if (bias[s] == -INFINITY || w[s] < std::numeric_limits<T>::min()) w[s] = 0;
        if (w[s] != 0) shift = std::max(shift, std::log(w[s]) + (T)bias[s]);
    }
    for (size_t s = 0; s < S; ++s) {
        slope[s] = 0;
        if (w[s] == 0) continue;
        const T factor = biased ? std::exp((T)bias[s] - shift) : 1, base = 1 + z[s] * z[s];
        slope[s] = 2 * (z[s] / unit) / base / base / unit * factor; // d/dz z^2/(1+z^2) = 2z/(1+z^2)^2
        w[s] *= factor;
        total += w[s];
    }
    return total;
}

template <class T> T stored(const Problem &p, T x) { // what is left of a number that is written to memory
    if constexpr (sizeof(T) == 8) return x;
    return p.bf16 ? (T)from_bf16(to_bf16((float)x)) : x;
}

template <class T> std::vector<double> widen(const Problem &p, const std::vector<T> &x) {
    std::vector<double> wide(x.size());
    for (size_t i = 0; i < x.size(); ++i) wide[i] = (double)stored(p, x[i]);
    return wide;
}

template <class T> T dot(const T *a, const T *b, int64_t n, T factor, const Way &way) {
    T sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += a[way.term(i, n)] * factor * b[way.term(i, n)];
    return sum;
}

// Rows of D numbers through a map (E, D), y = x W^T + b; as they are where it is empty.
template <class T>
std::vector<T> projected(const std::vector<T> &x, int64_t D, const std::vector<double> &numbers,
                         const std::vector<double> &bias, const Way &way) {
    if (numbers.empty()) return x;
    const std::vector<T> map(numbers.begin(), numbers.end());
    const int64_t rows = (int64_t)x.size() / D, E = (int64_t)map.size() / D;
    std::vector<T> y((size_t)(rows * E));
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t e = 0; e < E; ++e)
            y[(size_t)(row * E + e)] = dot(&x[(size_t)(row * D)], &map[(size_t)(e * D)], D, (T)1, way) +
                (bias.empty() ? 0 : (T)bias[(size_t)e]);
    return y;
}

template <class T> struct Sums { // what one row adds to
    T *out, *dq, *dk, *dv;
    double *spread_k;
};

// The gradients of one row, from its normalised weights and slopes; returns the largest spread of its dq.
template <class T>
double row_gradients(const Problem &p, const Way &way, const T *q, const T *keys, const T *values, const T *grad,
                     const double *factor, const std::vector<T> &w, const std::vector<T> &slope, const Sums<T> &to) {
    T delta = 0; // sum_s w_s dL/dw_s, from the output as it is stored
    for (int64_t c = 0; c < p.W; ++c) delta += grad[c] * stored(p, to.out[c]);
    std::vector<double> spread((size_t)p.H);
    for (int64_t i = 0; i < p.S; ++i) {
        const int64_t s = way.term(i, p.S);
        const T weight = w[(size_t)s];
        if (weight == 0) continue;
        const T kept = factor ? (T)factor[s] : 1;
        for (int64_t c = 0; c < p.W; ++c) to.dv[s * p.W + c] += weight * kept * grad[c];
        const T dw = kept * dot(grad, values + s * p.W, p.W, (T)1, way);
        const T dz = slope[(size_t)s] * (dw - delta) * (T)p.scale;
        const double step = std::abs((double)slope[(size_t)s] * p.scale);
        const double size = step * (std::abs((double)dw) + std::abs((double)delta));
        for (int64_t h = 0; h < p.H; ++h) {
            to.dq[h] += dz * keys[s * p.H + h];
            to.dk[s * p.H + h] += dz * q[h];
            spread[(size_t)h] += size * std::abs((double)keys[s * p.H + h]);
            to.spread_k[s * p.H + h] += size * std::abs((double)q[h]);
        }
    }
    return *std::max_element(spread.begin(), spread.end());
}

template <class T> Answer evaluate(const Problem &p, bool backward, const Way &way = Way()) {
    const int64_t N = p.N, G = p.G, L = p.L, S = p.S, H = p.H, W = p.W, group = G ? std::max<int64_t>(1, N / G) : 1;
    const std::vector<T> q(p.q.begin(), p.q.end()), k(p.k.begin(), p.k.end()), v(p.v.begin(), p.v.end());
    const std::vector<T> grad(p.grad.begin(), p.grad.end());
    std::vector<T> out((size_t)(p.B * N * L * W)), dq(q.size()), dk(k.size()), dv(v.size());
    std::vector<T> z((size_t)S), w((size_t)S), slope((size_t)S);
    std::vector<double> spread_k(k.size());
    const T scale = (T)p.scale;
    Answer a;
    a.blind.assign((size_t)(p.B * N * L), 1);
    a.unseen.assign((size_t)(p.B * G * S), 1);
    for (int64_t row = 0; row < p.B * N * L; ++row) {
        const int64_t kv = row / L / N * G + row / L % N / group; // (b, g) in one number
        const T *q_row = &q[(size_t)(row * H)], *keys = &k[(size_t)(kv * S * H)], *values = &v[(size_t)(kv * S * W)];
        const double *bias = &p.bias[(size_t)(row * S)];
        const double *factor = p.factor.empty() ? nullptr : &p.factor[(size_t)(row * S)];
        T *o = &out[(size_t)(row * W)];
        for (int64_t s = 0; s < S; ++s) {
            z[(size_t)s] = dot(q_row, keys + s * H, H, way.scale_first ? scale : 1, way.of_key(s));
            if (!way.scale_first) z[(size_t)s] *= scale;
            if (!p.inside.empty()) z[(size_t)s] += (T)p.inside[(size_t)(row * S + s)];
            if (bias[s] != -INFINITY) a.unseen[(size_t)(kv * S + s)] = 0;
        }
        const T total = row_weights(p.score, z, bias, w, slope);
        if (!(total > 0)) continue;
        a.blind[(size_t)row] = 0;
        const T before = way.inverse ? 1 / total : 1, after = way.inverse ? 1 : total;
        for (int64_t i = 0; i < S; ++i) {
            const size_t s = (size_t)way.term(i, S);
            w[s] *= before, slope[s] *= before;
            const T kept = factor ? w[s] * (T)factor[s] : w[s];
            for (int64_t c = 0; kept != 0 && c < W; ++c) o[c] += kept * values[s * (size_t)W + (size_t)c];
            w[s] /= after, slope[s] /= after;
        }
        for (int64_t c = 0; c < W; ++c) o[c] /= after;
        if (!backward) continue;
        const size_t key = (size_t)(kv * S * H);
        const Sums<T> to = {o, &dq[(size_t)(row * H)], &dk[key], &dv[(size_t)(kv * S * W)], &spread_k[key]};
        const double spread = row_gradients(p, way, q_row, keys, values, &grad[(size_t)(row * W)], factor, w, slope, to);
        a.spread_q = std::max(a.spread_q, spread);
    }
    for (double x : spread_k) a.spread_k = std::max(a.spread_k, x);
    for (size_t i = 0; p.shared && i < dk.size(); ++i) dk[i] += dv[i];
    a.out = widen(p, out), a.dq = widen(p, dq), a.dk = widen(p, dk), a.dv = widen(p, dv);
    return a;
}

// --- the 2x rule ------------------------------------------------------------------------------------------------

inline double largest_error(const std::vector<double> &x, const std::vector<double> &exact) {
    double largest = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
        const double error = std::abs(x[i] - exact[i]);
        if (!(error <= largest)) largest = error; // NaN stays
    }
    return largest;
}

// The plain formula's largest errors in float32, over the ways it has been asked to try. One way often is lucky where
// few numbers are involved, so a kernel that misses the bound of the first is held against them all.
struct Plain {
    const Problem &p;
    const Answer &exact;
    const bool backward;
    double out = 0, dq = 0, dk = 0, dv = 0;
    int64_t tried = 0;

    Plain(const Problem &problem, const Answer &answer, bool gradients)
        : p(problem), exact(answer), backward(gradients) {
        another();
    }
    bool another() {
        if (tried == WAYS) return false;
        const Answer a = evaluate<float>(p, backward, Way(tried++));
        out = std::max(out, largest_error(a.out, exact.out));
        dq = std::max(dq, largest_error(a.dq, exact.dq));
        dk = std::max(dk, largest_error(a.dk, exact.dk));
        dv = std::max(dv, largest_error(a.dv, exact.dv));
        return true;
    }
};

// A problem whose queries are off by up to 2^-14 of their rows' largest numbers, in one of several ways.
inline Problem blurred(const Problem &exact, int64_t way) {
    Problem p = exact;
    Random r("blurred " + std::to_string(way));
    for (size_t row = 0; p.H > 0 && row < p.q.size(); row += (size_t)p.H) {
        double most = 0;
        for (int64_t h = 0; h < p.H; ++h) most = std::max(most, std::abs(p.q[row + (size_t)h]));
        for (int64_t h = 0; h < p.H; ++h) p.q[row + (size_t)h] += (r.below(2) ? 1 : -1) * 0x1p-14 * most;
    }
    return p;
}

// What int8 rows may cost where AVX-512 multiplies them as integers: queries and weights are rounded to 16 bits there, a
// quarter of what is allowed here. `evaluated` gives a problem's result.
template <class F> double coarse_error(int64_t isa, const std::vector<double> &exact, const F &evaluated) {
    if (isa != BA_AVX512) return 0;
    double error = 0, largest = 0;
    for (double x : exact) largest = std::max(largest, std::abs(x));
    for (int64_t way = 0; way < 4; ++way) error = std::max(error, largest_error(evaluated(way), exact));
    return error + 0x1p-14 * largest;
}

// |actual - exact| <= allowed (a multiple of the plain error), plus a floor of 4 ulps of float32 arithmetic and, for
// bfloat16, half an ulp of the type, both of the largest exact value. Where the terms of every element cancel to
// nothing (one visible key: its weight is 1 whatever its score), the ulps are those of the terms, `spread`.
// Returns what is wrong, or nothing.
inline std::string beyond(const Tensor &actual, const std::vector<double> &exact, double allowed, bool bf16,
                          double spread = 0) {
    const std::vector<double> ours = actual.dense();
    double largest = 0;
    for (double x : exact) largest = std::max(largest, std::abs(x));
    if (!std::isfinite(largest_error(exact, std::vector<double>(exact.size())) + allowed))
        return "the case is wrong: the exact or the plain result is not finite";
    const double terms = largest > 1e-3 * spread ? largest : spread;
    const double bound = allowed + 0x1p-21 * terms + (bf16 ? 0x1p-9 * largest : 0);
    for (size_t i = 0; i < exact.size(); ++i) {
        const double error = std::abs(ours[i] - exact[i]);
        if (error <= bound) {
            if (bound > 0) worst_margin = std::max(worst_margin, error / bound);
            continue;
        }
        int64_t place[4], rest = (int64_t)i;
        for (size_t d = 4; d-- > 0; rest /= actual.size[d]) place[d] = rest % actual.size[d];
        char text[256];
        std::snprintf(text, sizeof text,
                      "[%d,%d,%d,%d] is %.9g, exact %.9g: error %.3g above %.3g (plain x factor %.3g, largest %.3g)",
                      (int)place[0], (int)place[1], (int)place[2], (int)place[3], ours[i], exact[i], error, bound,
                      allowed, largest);
        return text;
    }
    return "";
}

#endif
