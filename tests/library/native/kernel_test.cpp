// Tests of the compiled kernels through api.h, without Python and torch. kernel_cases.cpp lists what is tested.
//
//   kernel_test [--quick] [--pages] [--verbose] [--list] [--isa NAME]... [--case PART OF A NAME] [--seed N]
//
// --quick: fewer cases, for emulators. --pages: tensors end where a forbidden page begins, instead of one heap
// allocation each. Ends with 1 and the failing cases, if any.
#include <chrono>
#include <csignal>

#include "kernel_cases.hpp"

Options options;
std::vector<std::string> failures;
double worst_margin = 0;

namespace {

const char *const ISAS[] = {"best", "portable", "neon", "avx2", "avx512"};
std::string current = "none yet"; // the case that runs, for the message of a crash
int64_t begun = 0;

extern "C" void crashed(int signal) {
    const char *text[] = {"\ncrashed in case: ", current.c_str(), "\n"};
    for (const char *part : text) (void)!write(2, part, std::strlen(part));
    std::signal(signal, SIG_DFL), std::raise(signal);
}

int usage(const char *what) {
    const char *known = "--quick --pages --verbose --list --isa NAME --case TEXT --seed N";
    std::fprintf(stderr, "kernel_test: %s; options: %s\n", what, known);
    return 2;
}

std::string describe(const Case &c) {
    const char *const types[] = {"f32", "bf16", "bool", "none"};
    char text[512];
    std::snprintf(text, sizeof text,
                  "%s: %s %s B %d N %d G %d, groups %d %d, L %d S %d H %d W %d%s%s scale %g layouts %d %d %d "
                  "fill %d of %g, mask %s dims %d layout %d hide %.2f size %.2f, padding %s form %d",
                  c.name.c_str(), c.score == BA_SOFTMAX ? "softmax" : "expressive", types[c.dtype], (int)c.B, (int)c.N,
                  (int)c.G, (int)c.key_group, (int)c.value_group, (int)c.L, (int)c.S, (int)c.H, (int)c.W,
                  c.causal ? " causal" : "", c.shared ? " shared" : "", c.scale, c.in, c.keys, c.out, c.fill, c.amount,
                  types[c.mask.type], c.mask.dims, c.mask.layout, c.mask.hide, c.mask.size, types[c.padding.type],
                  c.padding.form);
    return text;
}

int list_all() {
    for (const Case &c : attention_cases())
        if (c.name.find(options.filter) != std::string::npos) std::printf("%s\n", describe(c).c_str());
    for (const CacheCase &c : cache_cases()) std::printf("%s\n", describe(c.call).c_str());
    for (const AlignCase &c : align_cases()) std::printf("%s\n", c.name.c_str());
    for (const LayerCase &c : layer_cases()) std::printf("%s\n", c.name.c_str());
    for (const StepCase &c : step_cases()) std::printf("%s\n", c.name.c_str());
    return 0;
}

} // namespace

const char *isa_name(int64_t isa) { return ISAS[isa]; }

bool chosen(const std::string &name) {
    if (name.find(options.filter) == std::string::npos) return false;
    current = name, ++begun;
    if (options.verbose) std::fprintf(stderr, "%s\n", name.c_str());
    return true;
}

void fail(const std::string &name, int64_t isa, const std::string &what) {
    failures.push_back(name + " [" + isa_name(isa) + "]: " + what);
    if (failures.size() > 60) return;
    std::fprintf(stderr, "FAIL %s (--seed %llu)\n", failures.back().c_str(), (unsigned long long)options.seed);
}

int main(int count, char **words) {
    bool list = false;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--quick") options.quick = true;
        else if (word == "--pages") options.pages = true;
        else if (word == "--verbose") options.verbose = true;
        else if (word == "--list") list = true;
        else if (i + 1 == count) return usage((word + " is unknown, or its value is missing").c_str());
        else if (word == "--case") options.filter = words[++i];
        else if (word == "--seed") options.seed = std::strtoull(words[++i], nullptr, 10);
        else if (word == "--isa") {
            const std::string name = words[++i];
            int64_t isa = BA_PORTABLE;
            while (isa <= BA_AVX512 && name != ISAS[isa]) ++isa;
            if (isa > BA_AVX512 || !(ba_isas() >> isa & 1)) return usage((name + " does not run here").c_str());
            options.isas.push_back(isa);
        } else return usage((word + " is unknown").c_str());
    }
    if (list) return list_all();
    const bool all = options.isas.empty();
    for (int64_t isa = BA_AVX512; all && isa >= BA_PORTABLE; --isa)
        if (ba_isas() >> isa & 1) options.isas.push_back(isa);
    std::printf("instruction sets:");
    for (int64_t isa : options.isas) std::printf(" %s", isa_name(isa));
    std::printf("\n");
    std::fflush(stdout);
#ifndef __SANITIZE_ADDRESS__ // which reports crashes itself
    for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, crashed);
#endif
    const auto start = std::chrono::steady_clock::now();
    for (const Case &c : attention_cases()) run_attention(c);
    for (const CacheCase &c : cache_cases()) run_cache(c);
    run_cache_refusals();
    for (const AlignCase &c : align_cases()) run_align(c);
    for (const LayerCase &c : layer_cases()) run_layer(c);
    for (const StepCase &c : step_cases()) run_step(c);
    run_special();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%d cases, %zu failures, largest error %.2f of its bound, %.1f s\n", (int)begun, failures.size(),
                worst_margin, seconds);
    if (begun == 0) return usage("no case has this name");
    return failures.empty() ? 0 : 1;
}
