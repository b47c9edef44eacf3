/* What a compiled library of kernels says of itself on the machine that it runs on, without Python and torch.
 *
 *   probe LIBRARY
 *
 * It prints the number of the interface, the instruction sets, and for each set and both scores the largest difference
 * of ba_forward to a sum in double; it fails where that is above 1e-5. The library is loaded as Python loads it.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "api.h"

#if defined(_WIN32)
#include <windows.h>
static void* load(const char* file) { return (void*)LoadLibraryA(file); }
static void* find(void* library, const char* name) { return (void*)GetProcAddress((HMODULE)library, name); }
static const char* reason(void) { return "LoadLibrary refused it"; }
#else
#include <dlfcn.h>
static void* load(const char* file) { return dlopen(file, RTLD_NOW | RTLD_LOCAL); }
static void* find(void* library, const char* name) { return dlsym(library, name); }
static const char* reason(void) { return dlerror(); }
#endif

enum { L = 5, S = 37, H = 16, W = 24 };
static float q[L * H], k[S * H], v[S * W], out[L * W];

static void draw(float* x, int n, unsigned seed) {
    for (int i = 0; i < n; ++i) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) / (1 << 24) - 0.5f;
    }
}

static double expected(int64_t score, double scale, int l, int w) {
    double sum = 0, value = 0;
    for (int s = 0; s < S; ++s) {
        double z = 0;
        for (int h = 0; h < H; ++h) z += (double)q[l * H + h] * k[s * H + h];
        z *= scale;
        const double weight = score == BA_SOFTMAX ? exp(z) : z * z / (1 + z * z);
        sum += weight;
        value += weight * v[s * W + w];
    }
    return value / sum;
}

int main(int n, char** words) {
    static const char* const names[] = {"", "portable", "neon", "avx2", "avx512"};
    if (n != 2) return fprintf(stderr, "usage: probe LIBRARY\n"), 2;
    void* library = load(words[1]);
    if (library == NULL) return fprintf(stderr, "%s: %s\n", words[1], reason()), 1;
    int64_t (*abi)(void) = (int64_t(*)(void))find(library, "ba_abi");
    int64_t (*isas)(void) = (int64_t(*)(void))find(library, "ba_isas");
    int64_t (*forward)(const ba_call*) = (int64_t(*)(const ba_call*))find(library, "ba_forward");
    if (abi == NULL || isas == NULL || forward == NULL) return fprintf(stderr, "a function is missing\n"), 1;
    if (abi() != BA_ABI) return fprintf(stderr, "interface %d, expected %d\n", (int)abi(), BA_ABI), 1;
    draw(q, L * H, 1), draw(k, S * H, 2), draw(v, S * W, 3);
    int failed = 0;
    for (int64_t isa = BA_AVX512; isa >= BA_PORTABLE; --isa) {
        if (!(isas() >> isa & 1)) continue;
        double worst = 0;
        for (int64_t score = BA_SOFTMAX; score <= BA_EXPRESSIVE; ++score) {
            ba_call c;
            memset(&c, 0, sizeof c);
            c.isa = isa, c.threads = 3, c.dtype = BA_F32, c.score = score, c.scale = 0.25;
            c.B = c.N = c.G = 1, c.L = L, c.S = S, c.H = H, c.W = W;
            c.q = q, c.k = k, c.v = v, c.out = out;
            c.q_l = H, c.k_s = H, c.v_s = W, c.out_l = W;
            c.mask_type = c.padding_type = BA_NONE;
            const int64_t status = forward(&c);
            if (status != BA_OK) return fprintf(stderr, "%s: ba_forward gave %d\n", names[isa], (int)status), 1;
            for (int l = 0; l < L; ++l)
                for (int w = 0; w < W; ++w) worst = fmax(worst, fabs(out[l * W + w] - expected(score, c.scale, l, w)));
        }
        printf("%s %.1e\n", names[isa], worst);
        failed |= !(worst < 1e-5);
    }
    return failed;
}
