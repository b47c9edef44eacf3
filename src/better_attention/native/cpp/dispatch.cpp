// Which instruction sets were built and run here, and the way from the C interface to the best of them.

#include "api.h"
#include "cpu.hpp"

namespace {

#define BA_MEMBER(name, structure) int64_t (*name)(const structure&);

struct Set {
    BA_KERNELS(BA_MEMBER)
};

}  // namespace

#define BA_DECLARE(name, structure) int64_t name(const structure&);
#define BA_ADDRESS(name, structure) name,

// The kernels of one instruction set, which its isa_*.cpp defines.
#define BA_SET(isa)                                  \
    namespace ba_##isa {                             \
    BA_KERNELS(BA_DECLARE)                           \
    static const Set SET = {BA_KERNELS(BA_ADDRESS)}; \
    }

BA_SET(portable)
#if defined(BA_HAS_NEON)
BA_SET(neon)
#endif
#if defined(BA_HAS_AVX2)
BA_SET(avx2)
#endif
#if defined(BA_HAS_AVX512)
BA_SET(avx512)
#endif

namespace {

int64_t find_isas() {
    int64_t found = 1 << BA_PORTABLE;
#if defined(BA_HAS_NEON)
    found |= 1 << BA_NEON;
#endif
#if defined(BA_HAS_AVX2) || defined(BA_HAS_AVX512)
    const ba_cpu cpu = ba_cpu_of(ba_ask_cpu());
#endif
#if defined(BA_HAS_AVX2)
    if (cpu.avx2 && cpu.fma) found |= 1 << BA_AVX2;
#endif
#if defined(BA_HAS_AVX512)
    // isa_avx512.cpp is compiled with -mfma, too.
    if (cpu.avx512f && cpu.avx512bw && cpu.avx512dq && cpu.avx512vl && cpu.fma) found |= 1 << BA_AVX512;
#endif
    return found;
}

const Set* set_of(int64_t isa) {
    static const int64_t here = find_isas();
    if (isa == BA_BEST)
        for (isa = BA_AVX512; !(here >> isa & 1);) --isa;
    if (isa < 0 || isa > BA_AVX512 || !(here >> isa & 1)) return 0;
    switch (isa) {
#if defined(BA_HAS_AVX512)
    case BA_AVX512: return &ba_avx512::SET;
#endif
#if defined(BA_HAS_AVX2)
    case BA_AVX2: return &ba_avx2::SET;
#endif
#if defined(BA_HAS_NEON)
    case BA_NEON: return &ba_neon::SET;
#endif
    case BA_PORTABLE: return &ba_portable::SET;
    default: return 0;
    }
}

#if defined(BA_HAS_AVX512)
bool find_byte_products() {
    const ba_cpu cpu = ba_cpu_of(ba_ask_cpu());
    return cpu.avx512vnni && cpu.avx512vbmi;
}
#endif

}  // namespace

bool ba_has_byte_products() {
#if defined(BA_HAS_AVX512)
    static const bool here = find_byte_products();
    return here;
#else
    return false;
#endif
}

namespace {

// Whether the kernels compute a call's score. Another one must not fall to whichever comes last in a chain of tests.
bool knows_score(const ba_call& c) { return c.score == BA_SOFTMAX || c.score == BA_EXPRESSIVE; }
bool knows_score(const ba_step& c) { return knows_score(c.attention); }
bool knows_score(const ba_layer& c) { return c.score == BA_SOFTMAX || c.score == BA_EXPRESSIVE; }
bool knows_score(const ba_align&) { return true; }  // it has none
bool knows_score(const ba_drop&) { return true; }

}  // namespace

extern "C" {

int64_t ba_abi(void) { return BA_ABI; }

int64_t ba_isas(void) { return find_isas(); }

#define BA_PASS_ON(name, structure)                       \
    int64_t ba_##name(const structure* call) {            \
        const Set* set = set_of(call->isa);               \
        if (!set) return BA_NO_SUCH_ISA;                  \
        if (!knows_score(*call)) return BA_NO_SUCH_SCORE; \
        return set->name(*call);                          \
    }

BA_KERNELS(BA_PASS_ON)

}  // extern "C"
