// Which instruction sets were built and run here, and the way from the C interface to the best of them.

#include "api.h"

#define BA_DECLARE(name)                         \
    namespace ba_##name {                        \
    int64_t forward(const ba_call&);             \
    int64_t backward(const ba_call&);            \
    int64_t layer_forward(const ba_layer&);      \
    int64_t align_forward(const ba_align&);      \
    int64_t align_backward(const ba_align&);     \
    }

BA_DECLARE(portable)
#if defined(BA_HAS_NEON)
BA_DECLARE(neon)
#endif
#if defined(BA_HAS_AVX2)
BA_DECLARE(avx2)
#endif
#if defined(BA_HAS_AVX512)
BA_DECLARE(avx512)
#endif

namespace {

struct Set {
    int64_t (*forward)(const ba_call&);
    int64_t (*backward)(const ba_call&);
    int64_t (*layer_forward)(const ba_layer&);
    int64_t (*align_forward)(const ba_align&);
    int64_t (*align_backward)(const ba_align&);
};

#define BA_SET(name)                                                                              \
    {ba_##name::forward, ba_##name::backward, ba_##name::layer_forward, ba_##name::align_forward, \
     ba_##name::align_backward}

const Set PORTABLE = BA_SET(portable);
#if defined(BA_HAS_NEON)
const Set NEON = BA_SET(neon);
#endif
#if defined(BA_HAS_AVX2)
const Set AVX2 = BA_SET(avx2);
#endif
#if defined(BA_HAS_AVX512)
const Set AVX512 = BA_SET(avx512);
#endif

int64_t find_isas() {
    int64_t found = 1 << BA_PORTABLE;
#if defined(BA_HAS_NEON)
    found |= 1 << BA_NEON;
#endif
#if defined(BA_HAS_AVX2) || defined(BA_HAS_AVX512)
    __builtin_cpu_init();
#endif
#if defined(BA_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= 1 << BA_AVX2;
#endif
#if defined(BA_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found |= 1 << BA_AVX512;
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
    case BA_AVX512: return &AVX512;
#endif
#if defined(BA_HAS_AVX2)
    case BA_AVX2: return &AVX2;
#endif
#if defined(BA_HAS_NEON)
    case BA_NEON: return &NEON;
#endif
    case BA_PORTABLE: return &PORTABLE;
    default: return 0;
    }
}

}  // namespace

extern "C" {

int64_t ba_abi(void) { return BA_ABI; }

int64_t ba_isas(void) { return find_isas(); }

int64_t ba_forward(const ba_call* call) {
    const Set* set = set_of(call->isa);
    return set ? set->forward(*call) : int64_t{BA_NO_SUCH_ISA};
}

int64_t ba_backward(const ba_call* call) {
    const Set* set = set_of(call->isa);
    return set ? set->backward(*call) : int64_t{BA_NO_SUCH_ISA};
}

int64_t ba_layer_forward(const ba_layer* call) {
    const Set* set = set_of(call->isa);
    return set ? set->layer_forward(*call) : int64_t{BA_NO_SUCH_ISA};
}

int64_t ba_align_forward(const ba_align* call) {
    const Set* set = set_of(call->isa);
    return set ? set->align_forward(*call) : int64_t{BA_NO_SUCH_ISA};
}

int64_t ba_align_backward(const ba_align* call) {
    const Set* set = set_of(call->isa);
    return set ? set->align_backward(*call) : int64_t{BA_NO_SUCH_ISA};
}

}  // extern "C"
