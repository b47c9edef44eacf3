// What the tests of the compiled kernels stand on: random numbers, bfloat16, tensors with canaries, options, failures.
// Standard library alone; nothing here is shared with the kernels.
#ifndef KERNEL_SUPPORT_HPP
#define KERNEL_SUPPORT_HPP

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

#ifdef __FAST_MATH__
#error "the oracle needs IEEE arithmetic: infinities and NaN are part of what is tested"
#endif

struct Options {
    bool quick = false, pages = false, verbose = false;
    uint64_t seed = 1;
    std::string filter;          // run only cases whose name contains it
    std::vector<int64_t> isas;   // instruction sets to run, as ba_isas() numbers them
};
extern Options options;
extern std::vector<std::string> failures;
extern double worst_margin;      // largest error / bound of all comparisons that passed

const char *isa_name(int64_t isa);
bool chosen(const std::string &name); // whether the filter lets this case run; if so, it is the current one
void fail(const std::string &name, int64_t isa, const std::string &what);

// --- numbers ----------------------------------------------------------------------------------------------------

// xorshift64*: the same numbers on every machine.
struct Random {
    uint64_t state;

    explicit Random(const std::string &name) : state(0x9E3779B97F4A7C15ull * (2 * options.seed + 1)) {
        for (unsigned char c : name) state = (state ^ c) * 0x100000001B3ull;
        state |= 1;
        for (int i = 0; i < 8; ++i) next();
    }
    uint64_t next() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return state * 0x2545F4914F6CDD1Dull;
    }
    double uniform() { return (double)(next() >> 11) * 0x1p-53; }
    double normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * std::sqrt(3.0); }
    int64_t below(int64_t n) { return (int64_t)(next() % (uint64_t)n); }
    bool chance(double p) { return uniform() < p; }
    template <class T> const T &pick(const std::vector<T> &from) { return from[(size_t)below((int64_t)from.size())]; }
};

inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); // to nearest, ties to even
}

constexpr double LOWEST_F32 = -3.4028234663852886e38, LOWEST_BF16 = -3.3895313892515355e38;

// --- memory -----------------------------------------------------------------------------------------------------

// Exactly `size` bytes: one heap allocation (for AddressSanitizer), or, with --pages, the end of a page before one
// that may not be touched. The second sees what the first does not: masked vector loads, which are not instrumented.
class Block {
public:
    explicit Block(size_t size = 0) : size_(size) {
        if (size == 0) return;
        if (!options.pages) {
            begin_ = static_cast<char *>(std::malloc(size));
            if (begin_ == nullptr) std::abort();
            return;
        }
        const size_t page = (size_t)sysconf(_SC_PAGESIZE);
        mapped_ = (size + page - 1) / page * page + page;
        void *map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (map == MAP_FAILED) std::abort();
        map_ = static_cast<char *>(map);
        begin_ = map_ + mapped_ - page - size;
        if (mprotect(map_ + mapped_ - page, page, PROT_NONE) != 0) std::abort();
    }
    Block(Block &&other) noexcept { swap(other); }
    Block &operator=(Block &&other) noexcept { swap(other); return *this; }
    ~Block() { map_ ? (void)munmap(map_, mapped_) : std::free(begin_); }
    char *begin() const { return begin_; }
    size_t size() const { return size_; }
    bool same(const Block &other) const {
        return size_ == other.size_ && (size_ == 0 || std::memcmp(begin_, other.begin_, size_) == 0);
    }

private:
    void swap(Block &other) {
        std::swap(begin_, other.begin_), std::swap(map_, other.map_);
        std::swap(size_, other.size_), std::swap(mapped_, other.mapped_);
    }
    char *begin_ = nullptr, *map_ = nullptr;
    size_t size_ = 0, mapped_ = 0;
};

// --- tensors ----------------------------------------------------------------------------------------------------

using Shape = std::array<int64_t, 4>;

inline size_t volume(const Shape &s) { return (size_t)(s[0] * s[1] * s[2] * s[3]); }

// How four dimensions lie in memory; the names are those of (B, N, L, H).
enum Layout {
    CONTIGUOUS,
    HEADS_INSIDE,   // a view of (B, L, N H): what a projection leaves
    PACKED,         // the middle third of (B, L, 3 N H): what one projection for q, k and v leaves
    BATCH_SECOND,   // a view of (L, B, N, H)
    GAPPED,         // gaps after every row and every head, and one element before the first
    ONE_BATCH,      // stride 0 over B: expanded; inputs only
    ONE_ROW,        // stride 0 over L: expanded; inputs only
    TRANSPOSED,     // the last two dimensions swapped, with a gap; masks only
    LAYOUTS
};

constexpr int64_t STORED_INT8 = 8; // an element type beside api.h's: numbers of an int8 cache

// A strided view with its memory. What the view does not reach holds canaries: NaN, for single bytes 0xA5.
class Tensor {
public:
    int64_t type = BA_NONE;
    Shape size{}, stride{};

    Tensor() = default;
    Tensor(int64_t of, Shape shape, Layout layout = CONTIGUOUS) : type(of), size(shape) {
        const int64_t N = size[1], L = size[2], H = size[3];
        switch (layout) {
        case HEADS_INSIDE: stride = {L * N * H, H, N * H, 1}; break;
        case PACKED: stride = {L * 3 * N * H, H, 3 * N * H, 1}, offset_ = N * H; break;
        case BATCH_SECOND: stride = {N * H, H, size[0] * N * H, 1}; break;
        case GAPPED: stride = {N * (L * (H + 3) + 5) + 2, L * (H + 3) + 5, H + 3, 1}, offset_ = 1; break;
        case ONE_BATCH: stride = {0, L * H, H, 1}; break;
        case ONE_ROW: stride = {N * H, H, 0, 1}; break;
        case TRANSPOSED: stride = {N * H * (L + 1), H * (L + 1), 1, L + 1}; break;
        default: stride = {N * L * H, L * H, H, 1};
        }
        int64_t last = offset_;
        for (int d = 0; d < 4; ++d) last += (size[d] - 1) * stride[d];
        if (volume(size) == 0) return; // no memory at all: a null pointer
        block_ = Block((size_t)(last + 1) * width());
        for (int64_t i = 0; i <= last; ++i) write_canary(i);
    }
    size_t width() const { return type == BA_F32 ? 4 : type == BA_BF16 ? 2 : 1; }
    void *data() const { return block_.begin() ? block_.begin() + (size_t)offset_ * width() : nullptr; }
    const Block &block() const { return block_; }
    bool empty() const { return block_.begin() == nullptr; }

    double get(int64_t i, int64_t j, int64_t k, int64_t l) const {
        const char *at = block_.begin() + (size_t)place(i, j, k, l) * width();
        if (type == BA_BOOL) return (double)*at;
        if (type == STORED_INT8) return (double)*reinterpret_cast<const signed char *>(at);
        if (type == BA_BF16) {
            uint16_t bits;
            std::memcpy(&bits, at, 2);
            return from_bf16(bits);
        }
        float x;
        std::memcpy(&x, at, 4);
        return x;
    }
    void set(int64_t i, int64_t j, int64_t k, int64_t l, double value) {
        char *at = block_.begin() + (size_t)place(i, j, k, l) * width();
        const float x = (float)value;
        const uint16_t half = to_bf16(x);
        if (type == BA_BOOL) *at = value != 0;
        else if (type == STORED_INT8) *reinterpret_cast<signed char *>(at) = (signed char)value;
        else if (type == BA_BF16) std::memcpy(at, &half, 2);
        else std::memcpy(at, &x, 4);
    }
    // Every element in turn, as f(index, value) -> new value.
    template <class F> void fill(F f) {
        each([&](int64_t i, int64_t j, int64_t k, int64_t l) { set(i, j, k, l, f(i, j, k, l)); });
    }
    std::vector<double> dense() const {
        std::vector<double> all;
        all.reserve(volume(size));
        each([&](int64_t i, int64_t j, int64_t k, int64_t l) { all.push_back(get(i, j, k, l)); });
        return all;
    }
    // Whether everything that the view does not reach still holds its canary, bit for bit.
    bool canaries_live() const {
        if (empty()) return true;
        Tensor other(*this, 0);
        std::memcpy(other.block_.begin(), block_.begin(), block_.size());
        each([&](int64_t i, int64_t j, int64_t k, int64_t l) {
            other.write_canary(place(i, j, k, l));
        });
        Tensor fresh(*this, 0);
        for (int64_t i = 0; i < (int64_t)(block_.size() / width()); ++i) fresh.write_canary(i);
        return other.block_.same(fresh.block_);
    }
    // The same bits everywhere, gaps too.
    bool same(const Tensor &other) const { return block_.same(other.block_); }
    Tensor copy() const {
        Tensor twin(*this, 0);
        if (block_.size()) std::memcpy(twin.block_.begin(), block_.begin(), block_.size());
        return twin;
    }

private:
    Tensor(const Tensor &like, int) : type(like.type), size(like.size), stride(like.stride), offset_(like.offset_) {
        block_ = Block(like.block_.size());
    }
    int64_t place(int64_t i, int64_t j, int64_t k, int64_t l) const {
        return offset_ + i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
    }
    void write_canary(int64_t i) {
        const uint32_t wide = 0x7FC0DEAD;
        const uint16_t half = 0x7FDE;
        char *at = block_.begin() + (size_t)i * width();
        if (type == BA_F32) std::memcpy(at, &wide, 4);
        else if (type == BA_BF16) std::memcpy(at, &half, 2);
        else *at = (char)0xA5;
    }
    template <class F> void each(F f) const {
        for (int64_t i = 0; i < size[0]; ++i)
            for (int64_t j = 0; j < size[1]; ++j)
                for (int64_t k = 0; k < size[2]; ++k)
                    for (int64_t l = 0; l < size[3]; ++l) f(i, j, k, l);
    }
    int64_t offset_ = 0;
    Block block_;
};

#endif
