#pragma once
// Vectors of floats for one instruction set, in the compilers' own vector types. Each isa_*.cpp defines
// BA_ISA (a namespace), BA_LANES and BA_WIDE (vectors side by side in a panel) and includes kernels.hpp.
//
// Everything is static: the same inline function compiled for two instruction sets must never be merged by the linker.
// For the same reason nothing here uses the C++ library.

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define BA_INLINE static inline __attribute__((always_inline))

namespace BA_ISA {
namespace {

constexpr int64_t LANES = BA_LANES;

typedef float V __attribute__((vector_size(4 * BA_LANES)));
typedef int32_t I __attribute__((vector_size(4 * BA_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * BA_LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * BA_LANES)));
typedef uint8_t UnalignedU8 __attribute__((vector_size(BA_LANES), aligned(1), may_alias));
typedef float UnalignedV __attribute__((vector_size(4 * BA_LANES), aligned(4), may_alias));
typedef uint16_t UnalignedU16 __attribute__((vector_size(2 * BA_LANES), aligned(2), may_alias));

constexpr float INF = __builtin_inff();

BA_INLINE V load(const float* p) { return *reinterpret_cast<const UnalignedV*>(p); }
BA_INLINE void store(float* p, V x) { *reinterpret_cast<UnalignedV*>(p) = x; }
BA_INLINE V fill(float x) { return V{} + x; }
BA_INLINE V select(I where, V yes, V no) { return where ? yes : no; }
BA_INLINE V at_least(float low, V x) { return x < low ? fill(low) : x; }    // NaN stays NaN
BA_INLINE V at_most(float high, V x) { return x > high ? fill(high) : x; }  // NaN stays NaN
BA_INLINE V larger(V a, V b) { return a > b ? a : b; }

BA_INLINE I first_lanes() {
    I x;
    for (int i = 0; i < BA_LANES; ++i) x[i] = i;
    return x;
}

BA_INLINE bool any(I mask) {
#if BA_LANES == 16 && defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif BA_LANES == 8 && defined(__AVX2__)
    return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
    int32_t seen = 0;
    for (int i = 0; i < BA_LANES; ++i) seen |= mask[i];
    return seen != 0;
#endif
}

BA_INLINE V reciprocal(V x) {  // to about one unit in the last place; x >= 1 here
#if BA_LANES == 16 && defined(__AVX512F__)
    V r = reinterpret_cast<V>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

constexpr float LOG2E = 1.44269504088896340736f;
// log 2 in two parts. The first has 17 bits, so that its product with an integer below 128 is exact.
constexpr float LN2_HIGH = 6.93138122558593750000e-1f;
constexpr float LN2_LOW = 9.05800061445916071534e-6f;

BA_INLINE V exp_of(V x) {
    // e^x = 2^n e^r with n the integer nearest to x log2(e), |r| <= log(2) / 2; 0 below -88.05, finite above 88.
    // Only n depends on the product with log2(e): its rounding, |x| units in the last place, does not reach r.
    x = at_most(88.0f, at_least(-88.05f, x));
    // Adding 1.5 * 2^23 rounds to an integer, which sits in the low bits: with 127 more, the exponent field of 2^n.
    const float magic = 12582912.0f + 127.0f;
    const V shifted = x * LOG2E + magic;
    const V whole = shifted - magic;
    const V r = (x - whole * LN2_HIGH) - whole * LN2_LOW;
    // Minimax polynomial of e^r in relative error, with the first two coefficients 1: 3.1e-9 before rounding.
    V p = fill(1.38210924342e-3f);
    p = p * r + 8.36868863553e-3f;
    p = p * r + 4.16682660580e-2f;
    p = p * r + 1.66665211320e-1f;
    p = p * r + 4.99999940395e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * reinterpret_cast<V>(reinterpret_cast<U>(shifted) << 23);
}

BA_INLINE float sum_of(V x) {
    float s = 0.0f;
    for (int i = 0; i < BA_LANES; ++i) s += x[i];
    return s;
}

BA_INLINE float max_of(V x) {
    float m = x[0];
    for (int i = 1; i < BA_LANES; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

// --- element types -----------------------------------------------------------------------------------------------

BA_INLINE float from_bf16(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

BA_INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

BA_INLINE V load_bf16(const uint16_t* p) {
    U16 x = *reinterpret_cast<const UnalignedU16*>(p);
    return reinterpret_cast<V>(__builtin_convertvector(x, U) << 16);
}

BA_INLINE void store_bf16(uint16_t* p, V x) {
    U bits = reinterpret_cast<U>(x);
    U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    U nan = (bits >> 16) | 0x40;
    U chosen = (x == x) ? rounded : nan;
    *reinterpret_cast<UnalignedU16*>(p) = __builtin_convertvector(chosen, U16);
}

BA_INLINE I load_bytes(const uint8_t* p) {  // compilers take the general conversion apart byte by byte
#if BA_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<I>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif BA_LANES == 8 && defined(__AVX2__)
    return reinterpret_cast<I>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(*reinterpret_cast<const UnalignedU8*>(p), I);
#endif
}

BA_INLINE V load_int8(const int8_t* p) {
#if BA_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<V>(
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif BA_LANES == 8 && defined(__AVX2__)
    return reinterpret_cast<V>(
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
    typedef int8_t UnalignedI8 __attribute__((vector_size(BA_LANES), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const UnalignedI8*>(p), V);
#endif
}

BA_INLINE V load_some(const float* p, int64_t n) {  // the first n < LANES, zeros behind
#if BA_LANES == 16 && defined(__AVX512F__)
    return reinterpret_cast<V>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
#else
    V x = {};
    memcpy(&x, p, static_cast<size_t>(n) * 4);
    return x;
#endif
}

BA_INLINE void store_some(float* p, V x, int64_t n) {
#if BA_LANES == 16 && defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(x));
#else
    memcpy(p, &x, static_cast<size_t>(n) * 4);
#endif
}

// Element i of a row of either type, up to n of them.
struct Row {
    const void* p;
    bool bf16;
};

BA_INLINE V load_row(Row r, int64_t i, int64_t n) {
    if (!r.bf16) {
        const float* p = static_cast<const float*>(r.p) + i;
        return n >= LANES ? load(p) : load_some(p, n);
    }
    const uint16_t* p = static_cast<const uint16_t*>(r.p) + i;
    if (n >= LANES) return load_bf16(p);
    V x = {};
    for (int64_t j = 0; j < n; ++j) x[j] = from_bf16(p[j]);
    return x;
}

BA_INLINE void store_row(void* row, bool bf16, int64_t i, V x, int64_t n) {
    if (!bf16) {
        float* p = static_cast<float*>(row) + i;
        if (n >= LANES) store(p, x);
        else store_some(p, x, n);
        return;
    }
    uint16_t* p = static_cast<uint16_t*>(row) + i;
    if (n >= LANES) store_bf16(p, x);
    else
        for (int64_t j = 0; j < n; ++j) p[j] = to_bf16(x[j]);
}

BA_INLINE const void* shifted(const void* p, int64_t elements, bool bf16) {
    return static_cast<const char*>(p) + elements * (bf16 ? 2 : 4);
}
BA_INLINE void* shifted(void* p, int64_t elements, bool bf16) {
    return static_cast<char*>(p) + elements * (bf16 ? 2 : 4);
}

// --- a square of LANES x LANES numbers turned over ---------------------------------------------------------------

template <int... I> struct Indices {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Indices<I...> type; };

template <int D, typename T, int... J> BA_INLINE void exchange(T& a, T& b, Indices<J...>) {
    T low = __builtin_shufflevector(a, b, ((J & D) ? BA_LANES + J - D : J)...);
    T high = __builtin_shufflevector(a, b, ((J & D) ? BA_LANES + J : J + D)...);
    a = low;
    b = high;
}

template <int D> BA_INLINE void turn_over(V (&x)[BA_LANES]) {
    if constexpr (D < BA_LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < BA_LANES; ++i)
            if (!(i & D)) exchange<D>(x[i], x[i + D], typename Count<BA_LANES>::type());
        turn_over<2 * D>(x);
    }
}

// Lane i of the result is the sum of row i. The rows are used up.
template <int D, typename T> BA_INLINE T row_sums(T (&x)[BA_LANES]) {
    if constexpr (D < BA_LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < BA_LANES; i += 2 * D) {
            exchange<D>(x[i], x[i + D], typename Count<BA_LANES>::type());
            x[i] += x[i + D];
        }
        return row_sums<2 * D>(x);
    } else {
        return x[0];
    }
}

}  // namespace
}  // namespace BA_ISA
