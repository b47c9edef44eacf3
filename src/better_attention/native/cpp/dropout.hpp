// Which weights dropout drops: a function of the call's seed, the row (batch element, head, query) and the key alone, so
// that the backward pass finds the same ones, whatever the blocks, the threads and the instruction set. A process that
// computes a part of a batch gives the places of its batch elements in all of it, and so drops what one process would.
//
//     row:  r = splitmix64(seed + (2 i + 1) G),  i = ((batch_first + b batch_step) N + n) L + l,  G = 0x9e3779b97f4a7c15
//     key:  c = mix(s 0x9e3779b9 + (splitmix64(seed) mod 2^32))        mod 2^32
//     x = (r mod 2^32) ^ c;  x = (x ^ x >> 16) 0x7feb352d + (r >> 32);  x = (x ^ x >> 15) 0x846ca68b;  x = x ^ x >> 16
//     dropped if x < floor(p 2^32); what is left is divided by 1 - p
//
// splitmix64 is Steele, Lea and Flood's (2014) finaliser, mix Wellons' 32-bit one with the same two multipliers.

namespace BA_ISA {
namespace {

struct Drops {
    uint64_t seed;
    uint32_t salt, below;
    float kept;  // what a kept weight is multiplied by
    bool any;
};

static uint64_t splitmix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

template <class C> static Drops drops_of(const C& c) {  // C: ba_call or ba_drop
    Drops d = {};
    d.any = c.dropout > 0.0;
    d.seed = static_cast<uint64_t>(c.seed);
    d.salt = static_cast<uint32_t>(splitmix64(d.seed));
    d.below = c.dropout < 1.0 ? static_cast<uint32_t>(c.dropout * 4294967296.0) : 0xffffffffu;
    d.kept = c.dropout < 1.0 ? static_cast<float>(1.0 / (1.0 - c.dropout)) : 0.0f;
    return d;
}

template <class C> static uint64_t row_of(const C& c, int64_t b, int64_t n, int64_t l) {
    const uint64_t place = static_cast<uint64_t>(c.batch_first + b * (c.batch_step ? c.batch_step : 1));
    return (place * static_cast<uint64_t>(c.N) + static_cast<uint64_t>(n)) * static_cast<uint64_t>(c.L) +
        static_cast<uint64_t>(l);
}

static uint64_t row_number(const Drops& d, uint64_t row) { return splitmix64(d.seed + (2 * row + 1) * 0x9e3779b97f4a7c15u); }

template <class T> BA_INLINE T meet(T low, T high, uint32_t key) {  // T: U, or uint32_t for one row
    T x = low ^ key;
    x = (x ^ (x >> 16)) * 0x7feb352du + high;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

BA_INLINE uint32_t key_number(const Drops& d, int64_t s) {
    return meet<uint32_t>(static_cast<uint32_t>(s) * 0x9e3779b9u + d.salt, 0, 0);
}

static float factor_of(const Drops& d, uint64_t row, int64_t s) {  // of one weight
    if (!d.any) return 1.0f;
    const uint64_t r = row_number(d, row);
    const uint32_t x = meet<uint32_t>(static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), key_number(d, s));
    return x < d.below ? 0.0f : d.kept;
}

// The numbers of `rows` rows from `first` on: low halves in numbers[0 ... pitch), high halves behind; lanes beyond: any.
static void row_numbers(const Drops& d, uint64_t first, int64_t rows, int64_t pitch, float* numbers) {
    for (int64_t l = 0; l < pitch; ++l) {
        const uint64_t r = l < rows ? row_number(d, first + static_cast<uint64_t>(l)) : 0;
        const uint32_t low = static_cast<uint32_t>(r), high = static_cast<uint32_t>(r >> 32);
        memcpy(numbers + l, &low, 4);
        memcpy(numbers + pitch + l, &high, 4);
    }
}

// Factors 0 and `kept` for keys s0 + [0, n). ONTO: multiplies `out` by them, else they are written there.
template <int NV, bool ONTO>
static __attribute__((noinline)) void drop(
    const Drops& d, const float* numbers, int64_t s0, int64_t n, int64_t pitch, float* out) {
    U low[NV], high[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        low[v] = reinterpret_cast<U>(load(numbers + v * LANES));
        high[v] = reinterpret_cast<U>(load(numbers + pitch + v * LANES));
    }
    for (int64_t s = 0; s < n; ++s) {
        const uint32_t key = key_number(d, s0 + s);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            float* p = out + s * pitch + v * LANES;
            const V kept = ONTO ? load(p) * d.kept : fill(d.kept);
            store(p, meet<U>(low[v], high[v], key) < d.below ? V{} : kept);
        }
    }
}

// --- numbers that are no weights -------------------------------------------------------------------------------------

constexpr int64_t DROP_ROWS = 16;  // of a task

struct Dropping {
    const ba_drop* c;
    Drops drops;
    const uint32_t* keys;  // key_number of each column, up to a whole vector
};

static void drop_task(void* context, int64_t task, float*) {
    typedef uint32_t UnalignedU __attribute__((vector_size(4 * BA_LANES), aligned(4), may_alias));
    const Dropping& f = *static_cast<const Dropping*>(context);
    const ba_drop& c = *f.c;
    const int64_t end = (task + 1) * DROP_ROWS < c.B * c.L ? (task + 1) * DROP_ROWS : c.B * c.L;
    for (int64_t row = task * DROP_ROWS; row < end; ++row) {
        const uint64_t r = row_number(f.drops, row_of(c, row / c.L, 0, row % c.L));
        const U low = U{} + static_cast<uint32_t>(r), high = U{} + static_cast<uint32_t>(r >> 32);
        const float* x = c.x + row * c.S;
        float* out = c.out + row * c.S;
        for (int64_t s = 0; s < c.S; s += LANES) {
            const U key = *reinterpret_cast<const UnalignedU*>(f.keys + s);
            U number = low ^ key;
            number = (number ^ (number >> 16)) * 0x7feb352du + high;
            number = (number ^ (number >> 15)) * 0x846ca68bu;
            number = number ^ (number >> 16);
            const V kept = load_row({x, false}, s, c.S - s) * f.drops.kept;
            store_row(out, false, s, number < f.drops.below ? V{} : kept, c.S - s);
        }
    }
}

static int64_t drop_all(const ba_drop& c) {
    const int64_t width = ba_padded(c.S);
    float* memory = ba_allocate(width);
    if (memory == NULL) return BA_NO_MEMORY;
    Dropping f = {&c, drops_of(c), reinterpret_cast<uint32_t*>(memory)};
    for (int64_t s = 0; s < width; ++s) {
        const uint32_t key = key_number(f.drops, s);
        memcpy(memory + s, &key, 4);
    }
    const int64_t tasks = (c.B * c.L + DROP_ROWS - 1) / DROP_ROWS;
    const int64_t threads = c.B * c.L * c.S < (1 << 16) ? 1 : c.threads;  // a second thread costs more than it saves
    const int64_t status = ba_parallel(threads, tasks, 0, drop_task, &f);
    ba_release(memory);
    return status;
}

}  // namespace
}  // namespace BA_ISA
