#pragma once
// What this x86 processor and its operating system offer, asked of them directly.
//
// __builtin_cpu_supports would answer it in a line, but under zig, which cross-compiles the wheels, its table is never
// filled in: it says no to everything, and the library would run the portable kernels without a word. So cpuid and
// xgetbv are asked here, as Intel's Software Developer's Manual has it (volume 1, chapters 13 and 14, and chapter 18 for
// AMX): an instruction set counts where the processor has it and the operating system saves its registers.

#if defined(__x86_64__) || defined(__i386__)

#include <cpuid.h>
#include <stdint.h>

// What cpuid says: leaf 1 (ecx), leaf 7 (subleaf 0: ebx, ecx, edx; subleaf 1: eax); and register XCR0, 0 without xgetbv.
struct ba_cpuid {
    uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax;
    uint64_t xcr0;
};

struct ba_cpu {
    bool avx2, fma;
    bool avx512f, avx512bw, avx512dq, avx512vl, avx512vbmi, avx512vnni, avx512bf16, avx512fp16;
    bool amx_tile, amx_int8, amx_bf16;  // the hardware and XCR0; Linux also wants to be asked (arch_prctl)
};

static inline ba_cpu ba_cpu_of(const ba_cpuid& id) {
    const uint64_t ymm = 0x6, zmm = 0xe6, tiles = 0x60000;  // XCR0: SSE and AVX; opmask, ZMM_Hi256, Hi16_ZMM; TILE*
    const bool os_avx = (id.leaf1_ecx >> 27 & 1) && (id.xcr0 & ymm) == ymm;  // bit 27: OSXSAVE
    const bool avx = os_avx && (id.leaf1_ecx >> 28 & 1);
    const bool avx512 = avx && (id.xcr0 & zmm) == zmm && (id.leaf7_ebx >> 16 & 1);
    const bool amx = os_avx && (id.xcr0 & tiles) == tiles && (id.leaf7_edx >> 24 & 1);
    ba_cpu cpu = {};
    cpu.avx2 = avx && (id.leaf7_ebx >> 5 & 1);
    cpu.fma = avx && (id.leaf1_ecx >> 12 & 1);
    cpu.avx512f = avx512;
    cpu.avx512dq = avx512 && (id.leaf7_ebx >> 17 & 1);
    cpu.avx512bw = avx512 && (id.leaf7_ebx >> 30 & 1);
    cpu.avx512vl = avx512 && (id.leaf7_ebx >> 31 & 1);
    cpu.avx512vbmi = avx512 && (id.leaf7_ecx >> 1 & 1);
    cpu.avx512vnni = avx512 && (id.leaf7_ecx >> 11 & 1);
    cpu.avx512bf16 = avx512 && (id.leaf7_1_eax >> 5 & 1);
    cpu.avx512fp16 = avx512 && (id.leaf7_edx >> 23 & 1);
    cpu.amx_tile = amx;
    cpu.amx_int8 = amx && (id.leaf7_edx >> 25 & 1);
    cpu.amx_bf16 = amx && (id.leaf7_edx >> 22 & 1);
    return cpu;
}

static inline ba_cpuid ba_ask_cpu() {
    ba_cpuid id = {};
    uint32_t eax, ebx, ecx, edx;
    // __get_cpuid asks for the highest leaf first: beyond it, old processors answer with that of another.
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) id.leaf1_ecx = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        id.leaf7_ebx = ebx, id.leaf7_ecx = ecx, id.leaf7_edx = edx;
        if (eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) id.leaf7_1_eax = eax;
    }
    if (id.leaf1_ecx >> 27 & 1) {
        uint32_t low, high;
        // In assembly, since the intrinsic needs a compiler flag that would let the compiler use more than was asked.
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        id.xcr0 = static_cast<uint64_t>(high) << 32 | low;
    }
    return id;
}

#endif
