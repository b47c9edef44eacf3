// What is tested: every case is a row of data. kernel_cases.cpp lists those of attention.
#ifndef KERNEL_CASES_HPP
#define KERNEL_CASES_HPP

#include "kernel_support.hpp"

enum Fill {
    NORMAL,
    SCALED,          // queries times `amount`: rows of tiny or huge scores
    SCALED_ODD_ROWS, // every other query times `amount`
    LOUD_HIDDEN,     // queries times `amount`, keys that the padding hides over `amount`, and loud values there
    RAMP_UP,         // scores grow from key to key: expressive from `amount` to 1, softmax from -40 to 40
    RAMP_DOWN,
    EXACT,           // q.k is a whole number, exact in float32 in whatever order it is summed
    EQUAL,           // all scores of a query are equal
    SOME_ZERO        // a third of the queries and a third of the keys are zero
};

struct Mask {
    int64_t type = BA_NONE;
    int dims = 0;            // bits: 8 has B, 4 has N, 2 has L, 1 has S; 0 where it broadcasts
    Layout layout = CONTIGUOUS;
    double hide = 0.3;       // share of what is hidden
    double size = 1.0;       // spread of the biases
    bool lowest = false;     // a float mask holds the type's lowest number where it would hold -inf
    bool rows = true;        // whether some queries see nothing at all
};

struct Padding {
    int64_t type = BA_NONE;
    enum Form { RANDOM, TAIL, FRONT, WHOLE } form = RANDOM; // WHOLE: the first batch element is all padding
    bool per_batch = true, per_key = true, strided = false;
};

struct Case {
    std::string name;
    int64_t B, N, G, L, S, H, W;
    int64_t key_group = 1, value_group = 1; // pairs that share a head of keys, or of values, as in api.h
    int64_t score = BA_SOFTMAX, dtype = BA_F32;
    bool causal = false, shared = false, backward = true;
    int64_t offset = 0, window = 0; // under `causal`, as in api.h
    double scale = 0;        // 0: 1 / sqrt(H)
    bool zero_scale = false;
    Layout in = CONTIGUOUS, keys = CONTIGUOUS, out = CONTIGUOUS;
    Mask mask;
    Padding padding;
    double dropout = 0;
    int64_t seed = 0;
    Fill fill = NORMAL;
    double amount = 1;
    double gradient_floor = 0; // granted to gradients besides the rule: what far-out scores may lose

    int64_t key_heads() const { return G / key_group; }
    int64_t value_heads() const { return G / value_group; }
};

struct AlignCase {
    std::string name;
    int64_t B, G, S, W, dtype;
    bool causal, bias, strided;
};

struct LayerCase {
    std::string name;
    int64_t B, N, L, D, score;
    bool q, k, v, o, aligned; // which maps are learned
    bool causal, bias, strided;
};

struct CacheCase { // a few queries over a cache that is read as it is stored
    Case call;
    bool int8, rotated;
    bool slopes, inside; // ALiBi, and whether in the score
};

struct StepCase { // a decoder's step through a layer
    std::string name;
    int64_t B, N, G, key_group, value_group, L, S, D, score; // as in api.h; S: rows of the cache, the new ones included
    bool outer, k, v;             // which maps are learned: W_Q and W_O, and those of the cache's rows
    bool int8 = false, rotated = false, bias = false, padded = false, gapped = false;

    bool shared() const { return !k && !v; }
    int64_t key_heads() const { return G / key_group; }
    int64_t value_heads() const { return G / value_group; }
};

std::vector<Case> attention_cases();
std::vector<CacheCase> cache_cases();
std::vector<AlignCase> align_cases();
std::vector<LayerCase> layer_cases();
std::vector<StepCase> step_cases();

void run_attention(const Case &c);
void run_cache(const CacheCase &c);
void run_cache_refusals();
void run_align(const AlignCase &c);
void run_layer(const LayerCase &c);
void run_step(const StepCase &c);
void run_special(); // what is no row of data: hidden NaN, concurrent callers, refusals ...

#endif
