// What hides keys, and what is added to their log weights: one tile of numbers for a block of keys and queries.
//
// A tile holds 0 for an open key, a bias, or -inf for a hidden one. Masks lie in memory key by key,
// the kernels want query beside query, so mask rows are turned over a block at a time: nothing of size L x S appears.

namespace BA_ISA {
namespace {

constexpr float LOWEST_BF16 = -3.38953138925153547590e38f;

enum State { OPEN, HIDES, BIASES, CLOSED };  // nothing to apply; 0 and -inf only; biases too; no key is open

struct Restriction {  // of one batch element and head
    const void* mask;
    int64_t mask_type, mask_l, mask_s;
    const void* padding;
    int64_t padding_type, padding_s;
    bool causal, softmax;
    int64_t offset, window, S;  // under causality: where query 0 stands among the S keys, and what it sees; 0: all
    bool exponent;  // the expressive score under a mask of numbers: every block has a tile, so that one shift holds
};

static int64_t size_of(int64_t type) { return type == BA_F32 ? 4 : type == BA_BF16 ? 2 : 1; }

static Restriction restriction(const ba_call& c, int64_t b, int64_t n) {
    Restriction r = {};
    r.mask_type = c.mask_type;
    if (c.mask_type != BA_NONE)
        r.mask = static_cast<const char*>(c.mask) + (b * c.mask_b + n * c.mask_n) * size_of(c.mask_type);
    r.mask_l = c.mask_l;
    r.mask_s = c.mask_s;
    r.padding_type = c.padding_type;
    if (c.padding_type != BA_NONE)
        r.padding = static_cast<const char*>(c.padding) + b * c.padding_b * size_of(c.padding_type);
    r.padding_s = c.padding_s;
    r.causal = c.causal != 0;
    r.offset = c.offset;
    r.window = c.window;
    r.S = c.S;
    r.softmax = c.score == BA_SOFTMAX;
    r.exponent = !r.softmax && (c.mask_type < BA_BOOL || c.padding_type < BA_BOOL);
    return r;
}

struct Seen {
    bool biased, open, hides;  // any number beside 0 and -inf; any number but -inf; any -inf
};

// Numbers [from, from + n) of a mask's row into out.
static Seen read_mask(const void* row, int64_t type, int64_t stride, int64_t n, bool softmax, float* out) {
    if (type == BA_BOOL) {
        const uint8_t* p = static_cast<const uint8_t*>(row);
        int32_t open = 0, closed = 0;
        int64_t i = 0;
        if (stride == 1) {
            I seen = {}, unseen = {};
            for (; i + LANES <= n; i += LANES) {
                const I x = load_bytes(p + i);
                seen |= x;
                unseen |= x == 0;
                store(out + i, select(x != 0, V{}, fill(-INF)));
            }
            open = any(seen);
            closed = any(unseen);
        }
        for (; i < n; ++i) {
            const uint8_t x = p[i * stride];
            out[i] = x ? 0.0f : -INF;
            open |= x;
            closed |= !x;
        }
        return {false, open != 0, closed != 0};
    }
    // The expressive score has no exponential to drown a very low bias in: the type's lowest number hides.
    const float floor = softmax ? -INF : type == BA_F32 ? -FLT_MAX : LOWEST_BF16;
    int32_t open = 0, biased = 0, hides = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float x = type == BA_F32 ? static_cast<const float*>(row)[i * stride]
                                       : from_bf16(static_cast<const uint16_t*>(row)[i * stride]);
        const bool hidden = x <= floor;
        out[i] = hidden ? -INF : x;
        open |= !hidden;
        hides |= hidden;
        biased |= !hidden & (x != 0.0f);
    }
    return {biased != 0, open != 0, hides != 0};
}

// The keys that causality leaves to query l: [first_key, end_key).
static int64_t first_key(const Restriction& r, int64_t l) {
    const int64_t s = r.causal && r.window ? l + r.offset - r.window + 1 : 0;
    return s < 0 ? 0 : s > r.S ? r.S : s;
}

static int64_t end_key(const Restriction& r, int64_t l) {
    const int64_t s = r.causal ? l + r.offset + 1 : r.S;
    return s < 0 ? 0 : s > r.S ? r.S : s;
}

// The same call with an offset of S at most and a window only where it hides a key: numbers that fit into lanes.
static ba_call within_reach(const ba_call& c) {
    ba_call r = c;
    if (!r.causal) r.offset = r.window = 0;
    if (r.offset > r.S) {  // queries behind all keys: only where their windows begin counts
        const int64_t behind = r.offset - r.S;
        r.offset = r.S;
        if (r.window) r.window = r.window > behind ? r.window - behind : 1;
    }
    if (r.window >= r.offset + r.L) r.window = 0;
    return r;
}

static bool sees(const Restriction& r, int64_t l, int64_t s, float* bias) {  // one key of one query
    *bias = 0.0f;
    if (s < first_key(r, l) || s >= end_key(r, l)) return false;
    const void* rows[2] = {r.mask, r.padding};
    const int64_t types[2] = {r.mask_type, r.padding_type};
    const int64_t at[2] = {l * r.mask_l + s * r.mask_s, s * r.padding_s};
    for (int i = 0; i < 2; ++i) {
        if (types[i] == BA_NONE) continue;
        float x;
        read_mask(static_cast<const char*>(rows[i]) + at[i] * size_of(types[i]), types[i], 1, 1, r.softmax, &x);
        if (x == -INF) return false;
        *bias += x;
    }
    return true;
}

static int64_t tile_spare(int64_t pitch, int64_t keys) { return (pitch + 1) * ba_padded(keys); }

// The tile for queries l0 + [0, rows) and keys s0 + [0, n): tile[s][lane], `pitch` lanes to a row. Only masks; of
// causality it knows nothing. `spare` has tile_spare(pitch, n) floats.
static State mask_tile(
    const Restriction& r, int64_t l0, int64_t rows, int64_t s0, int64_t n, int64_t pitch, float* tile, float* spare) {
    if (r.mask_type == BA_NONE && r.padding_type == BA_NONE) return OPEN;
    const int64_t length = ba_padded(n);
    float* keys = spare;  // what holds for a key whatever the query
    float* natural = spare + length;
    bool biased = r.exponent, hides = false;
    for (int64_t i = 0; i < n; ++i) keys[i] = 0.0f;
    const bool per_query = r.mask_type != BA_NONE && r.mask_l != 0 && rows > 1;
    for (int i = 0; i < 2; ++i) {
        const int64_t type = i ? r.padding_type : r.mask_type;
        if (type == BA_NONE || (i == 0 && per_query)) continue;
        const int64_t stride = i ? r.padding_s : r.mask_s;
        const int64_t at = (i ? 0 : l0 * r.mask_l) + s0 * stride;
        const Seen seen = read_mask(
            static_cast<const char*>(i ? r.padding : r.mask) + at * size_of(type), type, stride, n, r.softmax, natural);
        if (!seen.open) return CLOSED;
        biased |= seen.biased;
        for (int64_t s = 0; s < n; ++s) keys[s] += natural[s];
    }
    for (int64_t s = 0; s < n; ++s) hides |= keys[s] == -INF;
    if (!per_query) {
        if (!hides && !biased) return OPEN;
        for (int64_t s = 0; s < n; ++s)
            for (int64_t lane = 0; lane < pitch; lane += LANES) store(tile + s * pitch + lane, fill(keys[s]));
        return biased ? BIASES : HIDES;
    }
    bool open = false;
    for (int64_t l = 0; l < rows; ++l) {
        float* out = natural + l * length;
        const int64_t at = (l0 + l) * r.mask_l + s0 * r.mask_s;
        const Seen seen = read_mask(
            static_cast<const char*>(r.mask) + at * size_of(r.mask_type), r.mask_type, r.mask_s, n, r.softmax, out);
        biased |= seen.biased;
        open |= seen.open;
        hides |= seen.hides;
    }
    if (!open) return CLOSED;
    if (!hides && !biased) return OPEN;
    // turn_rows multiplies, and -inf * 1 stays what it is.
    turn_rows({natural, false}, length, rows, n, 1.0f, tile, pitch);
    for (int64_t s = 0; s < n; ++s)
        if (keys[s] != 0.0f)
            for (int64_t lane = 0; lane < pitch; lane += LANES)
                store(tile + s * pitch + lane, load(tile + s * pitch + lane) + keys[s]);
    return biased ? BIASES : HIDES;
}

// The keys that a panel of queries l0 + [0, rows), in `vectors` vectors, needs: run(vectors, lane, s0, n) for one block
// after another. Keys that all lanes see come in blocks of up to `keys`; on the edges of the band, where vectors of
// queries drop out one by one, in blocks of a vector's width. Nothing outside the band is touched.
template <class Run>
BA_INLINE void band_blocks(const Restriction& r, int64_t l0, int64_t rows, int64_t vectors, int64_t keys, Run run) {
    const int64_t begin = first_key(r, l0), end = end_key(r, l0 + rows - 1), here = l0 + r.offset;
    const int64_t inner = r.causal && r.window ? first_key(r, l0 + vectors * LANES - 1) : 0;
    const int64_t whole_end = !r.causal || here > end ? end : here < begin ? begin : here;
    const int64_t whole = inner < begin ? begin : inner < whole_end ? inner : end;
    int64_t s = begin;
    while (s < end) {
        if (s >= whole && s < whole_end) {
            const int64_t n = whole_end - s < keys ? whole_end - s : keys;
            run(vectors, 0, s, n);
            s += n;
            continue;
        }
        const int64_t stop = s < whole ? whole : end, n = stop - s < LANES ? stop - s : LANES;
        const int64_t first = s > here ? (s - here) / LANES : 0;
        const int64_t beyond = r.window ? (s + n - 1 - (here - r.window + 1)) / LANES + 1 : vectors;
        run((beyond < vectors ? beyond : vectors) - first, first * LANES, s, n);
        s += n;
    }
}

}  // namespace
}  // namespace BA_ISA
