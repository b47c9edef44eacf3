// A few queries over many keys: the time it takes is the time to read the keys and values, so both are read once, in
// the order in which they lie, and shared out among threads in chunks of keys whose partial sums are combined.
//
// A block is LANES keys of one head: products with the queries, then weights, lanes being keys, then sums of values. The
// values of a block are added up after the products of the next one, so that neither waits for the other. Where the
// heads of a key lie side by side, the blocks of all heads follow one another before the next keys, and what is asked
// for ahead goes through memory in the order of its addresses, whichever head it belongs to. Where heads lie apart, two
// are read in turn: memory gives more to a core that reads in two places. How keys are cut follows from the shape
// alone: results do not depend on the number of threads.
//
// Keys and values may be int8 with a scale for each row and head, and keys may be turned by their place (rotary) as
// they are read: a cache then holds what it was given, once. Distances (ALiBi) are counted here too, without a mask.

namespace BA_ISA {
namespace {

constexpr int64_t FEW = BA_FEW;
constexpr int64_t CHUNK = 512;    // keys of one partial sum at most: longer sums lose digits
constexpr int64_t RUN = 2 << 20;  // bytes of a task of several chunks at most,
constexpr int64_t TASKS = 64;     // and how many tasks there are at least before a task has several
constexpr float SLACK = 8.0f;     // by which exponents may exceed their shift: to follow every new maximum costs time
constexpr int64_t APART = 2;      // heads of a task that do not lie side by side, if their number can be divided
constexpr int64_t AHEAD = 8192;   // bytes between what is read and what is asked for, where a head's rows are in a line

struct Decode {
    const ba_call* c;
    int64_t group, few, Hp, Wp, state;  // state: floats of one row's partial sums
    int64_t begin, end, chunk, chunks;  // keys that any query sees, and how they are cut
    int64_t run, runs;                  // chunks of a task, and tasks of a row: a new place in memory starts slowly
    int64_t heads;                      // of a task: G if those of one key lie side by side, else APART or 1
    float *q, *parts;                   // queries [B][G][few][Hp], sums [B][G][few][chunks][state]
    bool one_scale;                     // what keys are multiplied by is what values are
    bool integer;                       // products of integers (decode_codes.hpp)
    CodedQuery* coded;                  // [B][G][few]
};

// Partial sums of one row: LANES sums of weights, the shift of their exponents, and W sums of values.
struct Sums {
    float *total, *shift, *out;
};

static Sums sums_at(float* state) { return {state, state + LANES, state + 2 * LANES}; }

struct DecodeBlock {
    const ba_call* c;
    const Decode* f;
    int64_t b, g, s0, n;  // keys s0 + [0, n) of head g
    Rows k, v;
    const float* q;
    const CodedQuery* coded;  // the same for integer products
    const Angles* angles;     // by which keys are turned
    float *scores, *weights;  // of its rows, LANES each
    float* state;
    int64_t state_row;        // floats from one row's state to the next one's
    bool live[FEW], any_live;  // rows that see a key of the block
};

// Lane j: the score of row j for one query, before its scale and what is added to it.
template <int TYPE, bool ROTATED, int ASK, bool WHOLE>
BA_INLINE V scores_of(const ba_call& c, const Rows& k, int64_t n, int64_t s0, const float* q, const CodedQuery* coded,
                      const Angles& a) {
    if constexpr (ROTATED) {
        const int64_t at = s0 * c.rotary_s;
        turn_back(q, a.P, c.rotary_cos + at, c.rotary_sin + at, a.first, a.second);
        if constexpr (TYPE == CODES) return coded_rotated_of<ASK>(k, n, a, *coded);
        else return rotated_products<TYPE, ASK>(k, n, a);
    } else if constexpr (TYPE == CODES) {
        return coded_products_of<ASK>(k, n, *coded, c.H);
    } else {
        return products<TYPE, ASK, WHOLE>(k, n, q, c.H);
    }
}

template <int TYPE, int ASK, bool WHOLE>
BA_INLINE void values_of(const ba_call& c, const Rows& v, int64_t n, const float* weights, float* out) {
    if constexpr (TYPE == CODES) add_coded_of<ASK>(v, n, weights, c.W, out);
    else add_values<TYPE, ASK, WHOLE>(v, n, weights, c.W, out);
}

template <int TYPE, bool ROTATED, int ASK> BA_INLINE void score_row(const DecodeBlock& d, int64_t r) {
    const float* q = d.q + r * d.f->Hp;
    const V z = d.n == LANES
        ? scores_of<TYPE, ROTATED, ASK, true>(*d.c, d.k, LANES, d.s0, q, d.coded + r, *d.angles)
        : scores_of<TYPE, ROTATED, ASK, false>(*d.c, d.k, d.n, d.s0, q, d.coded + r, *d.angles);
    store(d.scores + r * LANES, z);
}

template <int TYPE, int ASK> BA_INLINE void value_row(const DecodeBlock& d, int64_t r) {
    float* out = sums_at(d.state + r * d.state_row).out;
    const float* weights = d.weights + r * LANES;
    if (d.n == LANES) values_of<TYPE, ASK, true>(*d.c, d.v, LANES, weights, out);
    else values_of<TYPE, ASK, false>(*d.c, d.v, d.n, weights, out);
}

// One block's products and the values of the block before it, whatever they are. HALF: values are keys, which are near
// already; then both ask for half of what comes next, so that requests to memory never pause.
template <int TYPE, bool ROTATED, bool HALF> static void block_pass(const DecodeBlock& next, const DecodeBlock& d) {
    if (next.n != 0) {
        score_row<TYPE, ROTATED, HALF ? ASK_EVEN : ASK_ALL>(next, 0);
        for (int64_t r = 1; r < next.f->few; ++r) score_row<TYPE, ROTATED, ASK_NONE>(next, r);
    }
    if (!d.any_live) return;
    bool asked = !HALF && d.c->k == d.c->v;
    for (int64_t r = 0; r < d.f->few; ++r) {
        if (!d.live[r]) continue;
        if (asked) value_row<TYPE, ASK_NONE>(d, r);
        else value_row<TYPE, HALF ? ASK_ODD : ASK_ALL>(d, r);
        asked = true;
    }
}

// What hides keys of a block from one query, as a bias. False: it sees none of them.
static bool bias_of(const Restriction& r, int64_t l, int64_t s0, int64_t n, V* bias) {
    const int64_t begin = first_key(r, l) - s0, end = end_key(r, l) - s0;
    if (begin >= n || end <= 0) return false;
    float mask[LANES], x[LANES];
    for (int64_t s = 0; s < LANES; ++s) mask[s] = s < n && s >= begin && s < end ? 0.0f : -INF;
    const void* rows[2] = {r.mask, r.padding};
    const int64_t types[2] = {r.mask_type, r.padding_type}, strides[2] = {r.mask_s, r.padding_s};
    for (int i = 0; i < 2; ++i) {
        if (types[i] == BA_NONE) continue;
        const int64_t at = (i ? 0 : l * r.mask_l) + s0 * strides[i];
        const Seen seen = read_mask(
            static_cast<const char*>(rows[i]) + at * size_of(types[i]), types[i], strides[i], n, r.softmax, x);
        if (!seen.open) return false;
        for (int64_t s = 0; s < n; ++s) mask[s] += x[s];
    }
    *bias = load(mask);
    return true;
}

// Whether a mask of truth values shows LANES keys from s0 on to one query of head n; of other masks it is not known.
static bool is_open(const ba_call& c, int64_t b, int64_t n, int64_t s0) {
    const Restriction r = restriction(c, b, n);
    const void* rows[2] = {r.mask, r.padding};
    const int64_t types[2] = {r.mask_type, r.padding_type}, strides[2] = {r.mask_s, r.padding_s};
    bool open = true;
    for (int i = 0; i < 2; ++i) {
        if (types[i] == BA_NONE) continue;
        if (types[i] != BA_BOOL || strides[i] != 1) return false;
        const uint8_t* shown = static_cast<const uint8_t*>(rows[i]) + s0;
        for (int64_t s = 0; s < LANES; ++s) open &= shown[s] != 0;
    }
    return open;
}

// Measures exponents from `high` on, which is no smaller than the shift before.
static void shift_to(const Sums& sums, float high, int64_t W) {
    if (*sums.shift != -INF) {
        const float factor = exp_of(fill(*sums.shift - high))[0];
        store(sums.total, load(sums.total) * factor);
        for (int64_t w = 0; w < W; w += LANES) store(sums.out + w, load(sums.out + w) * factor);
    }
    *sums.shift = high;
}

struct Scales {  // of the keys and values of a block
    bool any;
    V k, v;
};

static V scales_at(const float* x, int64_t stride, int64_t n) {
    if (stride == 1 && n == LANES) return load(x);
#if BA_LANES == 16 && defined(__AVX512F__)
    if (n == LANES && stride < (1 << 24)) {
        const I places = first_lanes() * static_cast<int32_t>(stride);
        return reinterpret_cast<V>(_mm512_i32gather_ps(reinterpret_cast<__m512i>(places), x, 4));
    }
#endif
    float some[LANES] = {};
    for (int64_t j = 0; j < n; ++j) some[j] = x[j * stride];
    return load(some);
}

// As one_tensor().
static bool one_scale(const ba_call& c) {
    return c.k_scale == c.v_scale && c.k_scale_b == c.v_scale_b && c.k_scale_g == c.v_scale_g &&
        c.k_scale_s == c.v_scale_s && key_head(c, c.G) == value_head(c, c.G);
}

static Scales scales_of(const Decode& f, int64_t b, int64_t g, int64_t s0, int64_t n) {
    const ba_call& c = *f.c;
    Scales x = {};
    if (c.k_scale == NULL) return x;
    x.any = true;
    const int64_t at = b * c.k_scale_b + key_head(c, g) * c.k_scale_g + s0 * c.k_scale_s;
    x.k = x.v = scales_at(c.k_scale + at, c.k_scale_s, n);
    if (!f.one_scale)
        x.v = scales_at(c.v_scale + b * c.v_scale_b + value_head(c, g) * c.v_scale_g + s0 * c.v_scale_s, c.v_scale_s, n);
    return x;
}

// What the distances of LANES keys from s0 on add for query l of head n.
static V lean_of(const ba_call& c, int64_t n, int64_t l, int64_t s0) {
    V lean = {};
    for (int64_t j = 0; j < LANES; ++j) lean[j] = distance_bias(c, n, l, s0 + j);
    return lean;
}

// Whether that is added to log weights; on those of softmax it is the same as in the score.
static bool leans_outside(const ba_call& c) {
    return c.slopes != NULL && c.score == BA_EXPRESSIVE && c.slopes_inside == 0;
}

// From the scores of one row to its weights, before normalisation. `bias` is 0, a number or -inf; FREE: all are 0.
// `lean` is added to the scores. False: there is nothing to see.
template <int SCORE, int MODE>
BA_INLINE bool weigh_row(V z, const Scales& scales, V lean, V bias, int64_t W, float* weights, const Sums& sums) {
    if (scales.any) z *= scales.k;
    z += lean;
    if constexpr (MODE != FREE) {
        if constexpr (SCORE == BA_SOFTMAX) z += bias;
        z = select(bias == -INF, SCORE == BA_SOFTMAX ? fill(-INF) : V{}, z);
    }
    float low = 0.0f;
    if constexpr (SCORE == BA_SOFTMAX || MODE == BIASED) {
        const V top = SCORE == BA_SOFTMAX ? z : bias;
        float high = *sums.shift;
        if (any(top > high + SLACK)) high = max_of(larger(top, fill(high)));
        // Nothing to see, unless it is NaN, which no maximum shows.
        if (high == -INF && !any((z != z) | (bias != bias))) return false;
        if (high != *sums.shift) shift_to(sums, high, W);
        low = high == -INF ? 0.0f : high;
    }
    if constexpr (SCORE == BA_SOFTMAX) {
        z = exp_of(z - low);
    } else {
        const V square = at_most(FAR_SQUARE, z * z);
        z = square * reciprocal(1.0f + square);
        if constexpr (MODE == BIASED) z *= exp_of(bias - low);
    }
    store(sums.total, load(sums.total) + z);
    store(weights, scales.any ? z * scales.v : z);
    return true;
}

// As weigh_row(), of keys none of which is hidden.
template <int SCORE>
BA_INLINE bool weigh_open(const ba_call& c, V z, const Scales& scales, V lean, float* weights, const Sums& sums) {
    if constexpr (SCORE == BA_EXPRESSIVE)
        if (leans_outside(c)) return weigh_row<SCORE, BIASED>(z, scales, V{}, lean, c.W, weights, sums);
    return weigh_row<SCORE, FREE>(z, scales, lean, V{}, c.W, weights, sums);
}

template <int SCORE> static void weigh_block(DecodeBlock& d, bool free) {
    const Decode& f = *d.f;
    const ba_call& c = *d.c;
    const Scales scales = scales_of(f, d.b, d.g, d.s0, d.n);
    d.any_live = false;
    for (int64_t r = 0; r < f.few; ++r) {
        float* weights = d.weights + r * LANES;
        const V z = load(d.scores + r * LANES);
        const Sums sums = sums_at(d.state + r * d.state_row);
        const int64_t l = r % c.L;
        V bias = {}, lean = {}, outside = {};
        if (c.slopes != NULL) lean = lean_of(c, d.g * f.group + r / c.L, l, d.s0);
        if (free) {
            d.live[r] = weigh_open<SCORE>(c, z, scales, lean, weights, sums);
        } else {
            const bool exponent = leans_outside(c);
            if (exponent) outside = lean, lean = V{};
            const Restriction hide = restriction(c, d.b, d.g * f.group + r / c.L);
            d.live[r] = bias_of(hide, l, d.s0, d.n, &bias) &&
                (hide.exponent || exponent
                        ? weigh_row<SCORE, BIASED>(z, scales, lean, bias + outside, c.W, weights, sums)
                        : weigh_row<SCORE, HIDING>(z, scales, lean, bias, c.W, weights, sums));
        }
        d.any_live |= d.live[r];
    }
}

// Where the rows of a task's heads lie, in bytes.
struct Cache {
    const char* p;               // key 0 of head 0
    int64_t first, group;        // the task's first head, and how many neighbours are one here
    int64_t row, head;           // from a key to the next one, from a head to the next one
    int64_t ahead;               // keys between what is read and what is asked for
    int64_t ask_head, ask_row;   // as `head` and `row`, for what is asked for

    // Those of LANES keys from s0 on and of the i-th head; keys before `end` may be asked for.
    Rows rows(int64_t s0, int64_t end, int64_t i) const {
        const int64_t h = group > 1 ? (first + i) / group : first + i;
        const char* at = p + s0 * row;
        Rows x = {at + h * head, row, at + h * head, row};  // what is there already
        if (s0 + LANES + ahead <= end) x.ask = at + ahead * row + h * ask_head, x.ask_row = ask_row;
        return x;
    }
};

// `x` is key 0 of head 0; a task reads `heads` heads from `first` on, whose rows have `width` bytes.
static Cache cache_of(const void* x, int64_t first, int64_t group, int64_t row, int64_t head, int64_t width,
                      int64_t heads) {
    Cache c = {static_cast<const char*>(x), first, group, row, head, LANES, head, row};
    if (heads == 1 || head > row) c.ahead = (AHEAD + width - 1) / width;
    else if (head == width && row == heads / group * width) c.ask_head = LANES * width, c.ask_row = width;  // no gaps
    return c;
}

// Those of LANES keys less those of the first of them, from any that follow one another.
static Angles angles_of(const ba_call& c, float* memory) {
    Angles a = {};
    a.P = c.H / 2, a.Pp = (a.P + LANES - 1) / LANES * LANES;
    a.cosine = memory, a.sine = memory + LANES * a.Pp, a.first = a.sine + LANES * a.Pp, a.second = a.first + a.Pp;
    memset(memory, 0, static_cast<size_t>(angle_floats(c)) * sizeof(float));
    const float *x = c.rotary_cos, *y = c.rotary_sin;
    for (int64_t j = 0; j < LANES && j < c.S; ++j)
        for (int64_t p = 0; p < a.P; ++p) {
            const int64_t at = j * c.rotary_s + p;
            a.cosine[j * a.Pp + p] = x[at] * x[p] + y[at] * y[p];
            a.sine[j * a.Pp + p] = y[at] * x[p] - x[at] * y[p];
        }
    return a;
}

struct Task {
    const Decode* f;
    int64_t b, first;            // heads first + [0, f->heads)
    int64_t start, end;          // its keys
    int64_t seen_from, seen_to;  // those that every query sees, but for masks
    Cache k, v;
    float* states;               // of its rows, chunk 0
};

// As block_pass() and weigh_block(), for a whole block of which nothing is hidden, and one query: between two of these
// little more is done than to count pointers up. The block before is whole as well, since only a task's last one is not.
template <int TYPE, bool ROTATED, bool HALF>
BA_INLINE void plain_pass(DecodeBlock& next, const DecodeBlock& d, const Rows& k, int64_t s0, const float* q,
                          const CodedQuery* coded) {
    const ba_call& c = *next.c;
    constexpr bool SCALED = bytes_of(TYPE) == 1;
    const V z = scores_of<TYPE, ROTATED, HALF ? ASK_EVEN : ASK_ALL, true>(c, k, LANES, s0, q, coded, *next.angles);
    if (d.any_live)
        values_of<TYPE, HALF ? ASK_ODD : ASK_ALL, true>(c, d.v, LANES, d.weights, sums_at(d.state).out);
    const Scales scales = SCALED ? scales_of(*next.f, next.b, next.g, s0, LANES) : Scales{};
    const Sums sums = sums_at(next.state);
    V lean = {};
    if (c.slopes != NULL) lean = lean_of(c, next.g, 0, s0);
    next.any_live = next.live[0] = c.score == BA_SOFTMAX
        ? weigh_open<BA_SOFTMAX>(c, z, scales, lean, next.weights, sums)
        : weigh_open<BA_EXPRESSIVE>(c, z, scales, lean, next.weights, sums);
}

// All keys of a task. `two` are blocks in turn: one is scored while the values of the other are still to be added. What
// the loop needs is local, since the compiler cannot know that what is stored in blocks is something else.
template <int TYPE, bool ROTATED, bool ONE> static void read_keys(const Task t, DecodeBlock* two) {
    // With several queries more is computed for each row, and only codes are read fast enough for this to matter.
    constexpr bool HALF = ONE && TYPE == CODES;
    const Decode& f = *t.f;
    const ba_call& c = *f.c;
    const bool plain = f.few == 1, masked = c.mask_type != BA_NONE || c.padding_type != BA_NONE;
    const int64_t heads = f.heads, few = f.few, state_row = f.chunks * f.state;
    const float* const first_q = f.q + (t.b * c.G + t.first) * few * f.Hp;
    const CodedQuery* const first_coded = f.coded + (t.b * c.G + t.first) * few;
    float *next = t.states + (t.start - f.begin) / f.chunk * f.state, *states = NULL;  // of a chunk
    int now = 0;
    for (int64_t s0 = t.start, chunk_end = t.start; s0 < t.end; s0 += LANES) {
        if (s0 == chunk_end) {
            states = next, next += f.state, chunk_end += f.chunk;
            for (int64_t row = 0; row < heads * few; ++row) {
                float* state = states + row * state_row;
                memset(state, 0, static_cast<size_t>(f.state) * sizeof(float));
                *sums_at(state).shift = -INF;
            }
        }
        const int64_t n = t.end - s0 < LANES ? t.end - s0 : LANES;
        const bool seen = n == LANES && s0 >= t.seen_from && s0 + LANES <= t.seen_to;
        const float* q = first_q;
        const CodedQuery* coded = first_coded;
        float* state = states;
        for (int64_t i = 0; i < heads; ++i, now = 1 - now) {
            DecodeBlock &d = two[now], &before = two[1 - now];
            d.n = n, d.g = t.first + i, d.state = state;
            const bool free = seen && (!masked || (plain && is_open(c, t.b, d.g, s0)));
            if (free && plain) {
                d.v = t.v.rows(s0, t.end, i);
                plain_pass<TYPE, ROTATED, ONE>(d, before, t.k.rows(s0, t.end, i), s0, q, coded);
            } else {
                d.s0 = s0, d.q = q, d.coded = coded;
                d.k = t.k.rows(s0, t.end, i), d.v = t.v.rows(s0, t.end, i);
                block_pass<TYPE, ROTATED, HALF>(d, before);
                c.score == BA_SOFTMAX ? weigh_block<BA_SOFTMAX>(d, free) : weigh_block<BA_EXPRESSIVE>(d, free);
            }
            q += few * f.Hp, coded += few, state += few * state_row;
        }
    }
    two[now].n = 0;
    block_pass<TYPE, ROTATED, HALF>(two[now], two[1 - now]);
}

typedef void (*ReadKeys)(Task, DecodeBlock*);

template <int TYPE> static ReadKeys read_keys_of(const ba_call& c) {
    const bool one = c.k == c.v;
    if (c.rotary_cos != NULL) return one ? read_keys<TYPE, true, true> : read_keys<TYPE, true, false>;
    return one ? read_keys<TYPE, false, true> : read_keys<TYPE, false, false>;
}

static void decode_task(void* context, int64_t task, float* scratch) {
    const Decode& f = *static_cast<const Decode*>(context);
    const ba_call& c = *f.c;
    const int type = c.k_scale != NULL ? INT8 : static_cast<int>(c.dtype);
    const int64_t size = bytes_of(type), tasks = c.G / f.heads, rest = task / f.runs;
    Task t = {};
    t.f = &f, t.b = rest / tasks, t.first = rest % tasks * f.heads;
    t.start = f.begin + task % f.runs * f.run * f.chunk;
    t.end = t.start + f.run * f.chunk < f.end ? t.start + f.run * f.chunk : f.end;
    const Restriction causality = restriction(c, t.b, 0);
    t.seen_from = first_key(causality, c.L - 1), t.seen_to = end_key(causality, 0);
    const void *k = static_cast<const char*>(c.k) + t.b * c.k_b * size, *v = static_cast<const char*>(c.v) + t.b * c.v_b * size;
    t.k = cache_of(k, t.first, c.key_group > 1 ? c.key_group : 1, c.k_s * size, c.k_g * size, c.H * size, f.heads);
    t.v = cache_of(v, t.first, c.value_group > 1 ? c.value_group : 1, c.v_s * size, c.v_g * size, c.W * size, f.heads);
    t.states = f.parts + (t.b * c.G + t.first) * f.few * f.chunks * f.state;
    const Angles angles = c.rotary_cos == NULL ? Angles{} : angles_of(c, scratch + 3 * f.few * LANES);
    DecodeBlock two[2] = {};
    for (int i = 0; i < 2; ++i) {
        DecodeBlock& d = two[i];
        d.c = &c, d.f = &f, d.b = t.b, d.angles = &angles;
        d.scores = scratch, d.weights = scratch + (1 + i) * f.few * LANES;
        d.state_row = f.chunks * f.state;
    }
    const ReadKeys read = f.integer ? read_keys_of<CODED>(c)
                        : type == INT8 ? read_keys_of<INT8>(c)
                        : type == BA_F32 ? read_keys_of<BA_F32>(c) : read_keys_of<BA_BF16>(c);
    read(t, two);
}

// The chunks of one row together.
static void combine(const Decode& f, int64_t b, int64_t g, int64_t r, float* scratch) {
    const ba_call& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const float* parts = f.parts + ((b * c.G + g) * f.few + r) * f.chunks * f.state;
    float high = -INF, total = 0.0f;
    for (int64_t i = 0; i < f.chunks; ++i) {
        const float shift = parts[i * f.state + LANES];
        high = shift > high ? shift : high;
    }
    for (int64_t w = 0; w < f.Wp; w += LANES) store(scratch + w, V{});
    for (int64_t i = 0; i < f.chunks; ++i) {
        const float* part = parts + i * f.state;
        const float sum = sum_of(load(part));
        if (sum == 0.0f) continue;
        const float factor = high == -INF ? 1.0f : exp_of(fill(part[LANES] - high))[0];  // -inf: no exponents at all
        total += sum * factor;
        for (int64_t w = 0; w < f.Wp; w += LANES)
            store(scratch + w, load(scratch + w) + load(part + 2 * LANES + w) * factor);
    }
    const int64_t l = r % c.L, n = g * f.group + r / c.L;
    void* out = shifted(c.out, b * c.out_b + n * c.out_n + l * c.out_l, bf16);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t w = 0; w < c.W; w += LANES) store_row(out, bf16, w, load(scratch + w) * inverse, c.W - w);
    if (c.stats != NULL) {
        float* stats = c.stats + 2 * ((b * c.N + n) * c.L + l);
        stats[0] = total == 0.0f ? INF : total;
        stats[1] = high == -INF ? 0.0f : high;
    }
    if (c.score == BA_EXPRESSIVE && total < FAINT) careful_forward(c, b, n, l, scratch);
}

static void combine_task(void* context, int64_t head, float* scratch) {
    const Decode& f = *static_cast<const Decode*>(context);
    for (int64_t r = 0; r < f.few; ++r) combine(f, head / f.c->G, head % f.c->G, r, scratch);
}

// Whether decoding alone knows how to read the cache.
static bool is_special(const ba_call& c) { return c.k_scale != NULL || c.rotary_cos != NULL || c.slopes != NULL; }

// The same call, of whose pairs several share a head where one would have too many queries for decoding.
static ba_call regrouped(const ba_call& c) {
    ba_call r = c;
    const int64_t group = c.G > 0 ? c.N / c.G : 1;
    int64_t heads = c.L > 0 && c.L <= FEW ? FEW / c.L : group;  // of queries, at most
    if (group <= heads) return r;
    while (group % heads != 0) --heads;
    const int64_t pairs = group / heads;
    r.G *= pairs;
    r.key_group = pairs * (c.key_group > 1 ? c.key_group : 1), r.value_group = pairs * (c.value_group > 1 ? c.value_group : 1);
    return r;
}

static bool is_decode(const ba_call& c) {
    return c.dropout == 0.0 && c.G > 0 && c.N / c.G * c.L <= FEW && (c.S >= 2 * LANES || is_special(c));
}

// Backwards, panels serve these too. Their scores differ in the last bits, so the normalisers have to be theirs as well:
// where scores cancel, weights and a normaliser of another rounding would not add up to one.
static int64_t decode_backward(const ba_call& c) {
    const int64_t rows = c.B * c.N * c.L;
    float* memory = ba_allocate(rows * (c.W + 2) + 16);
    if (memory == NULL) return BA_NO_MEMORY;
    ba_call again = c;
    again.stats = memory;
    again.out = memory + ba_padded(2 * rows);
    again.out_l = c.W, again.out_n = c.L * c.W, again.out_b = c.N * c.L * c.W;
    int64_t status = wide_forward(again);
    if (status == BA_OK) status = wide_backward(again);
    ba_release(memory);
    return status;
}

static int64_t decode(const ba_call& c) {
    Decode f = {};
    f.c = &c;
    f.group = c.N / c.G;
    f.few = f.group * c.L;
    f.heads = c.G > 1 && c.v_g < c.v_s ? c.G : c.G % APART == 0 ? APART : 1;
    const Restriction causality = restriction(c, 0, 0);
    f.begin = first_key(causality, 0), f.end = end_key(causality, c.L - 1);
    const int64_t keys = f.end > f.begin ? f.end - f.begin : 0;
    f.chunk = CHUNK;
    if (c.B * c.G / f.heads < PARTS) {  // few heads to share out
        f.chunk = (keys / PARTS + LANES) / LANES * LANES;
        if (f.chunk > CHUNK) f.chunk = CHUNK;
    }
    f.chunks = (keys + f.chunk - 1) / f.chunk;
    const int64_t most = RUN / (f.heads * f.chunk * (c.H + c.W) * 4), each = c.B * c.G / f.heads * f.chunks / TASKS;
    f.run = most < each ? most : each;
    if (f.run < 1) f.run = 1;
    f.runs = (f.chunks + f.run - 1) / f.run;
    f.Hp = (c.H + LANES - 1) / LANES * LANES;
    f.Wp = (c.W + LANES - 1) / LANES * LANES;
    f.state = ba_padded(2 * LANES + f.Wp);
    const int64_t rows = c.B * c.G * f.few;
    if (rows == 0) return BA_OK;
    f.one_scale = one_scale(c);
    f.integer = c.k_scale != NULL && codes_serve(c);
    const int64_t coded = f.integer ? ba_padded(rows * int64_t{sizeof(CodedQuery) / sizeof(float)}) : 0;
    f.q = ba_allocate(rows * f.Hp + coded + rows * f.chunks * f.state);
    if (f.q == NULL) return BA_NO_MEMORY;
    f.coded = reinterpret_cast<CodedQuery*>(f.q + rows * f.Hp);
    f.parts = f.q + rows * f.Hp + coded;
    const bool bf16 = c.dtype == BA_BF16;
    const float factor = static_cast<float>(c.scale);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = i % f.few, g = i / f.few % c.G, b = i / f.few / c.G;
        const Row q = {shifted(c.q, b * c.q_b + (g * f.group + r / c.L) * c.q_n + r % c.L * c.q_l, bf16), bf16};
        for (int64_t h = 0; h < f.Hp; h += LANES)
            store(f.q + i * f.Hp + h, (h < c.H ? load_row(q, h, c.H - h) : V{}) * factor);
    }
    if (f.integer)
        for (int64_t i = 0; i < rows; ++i) code_query(c, f.q + i * f.Hp, &f.coded[i]);
    const int64_t scratch = 3 * f.few * LANES + angle_floats(c);
    int64_t status = ba_parallel(c.threads, c.B * c.G / f.heads * f.runs, scratch, decode_task, &f);
    const int64_t spare = f.Wp > 2 * c.S + 2 ? f.Wp : 2 * c.S + 2;
    if (status == BA_OK)
        status = ba_parallel(1, c.B * c.G, c.score == BA_EXPRESSIVE ? spare : f.Wp, combine_task, &f);
    ba_release(f.q);
    return status;
}

}  // namespace
}  // namespace BA_ISA
