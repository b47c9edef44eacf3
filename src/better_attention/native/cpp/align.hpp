// The alignment kernel W_A on the values (arXiv 2403.01643, definition 4) and its gradients, for the whole batch.
//
//     out[b][i][g] = sum_j weight[g][i][j] value[b][j][g] + bias[g][i]
//
// W_A is read number by number, values as they lie in strips of columns: a lower triangular W_A just ends each row
// earlier, up to small squares on the diagonal.

namespace BA_ISA {
namespace {

constexpr int64_t SQUARE = 12;  // rows that end at the same column; beyond their diagonal the kernel counts as zero
constexpr int64_t STEP = 120;   // positions multiplied at a time: 30 KiB of values

struct Align {
    const ba_align* c;
    int64_t strip, strips, pitch, blocks;  // columns of a strip, strips of W, positions of a task and how many
};

// Rows [i0, i0 + n) and columns [j0, j0 + m) of weight as floats, `pitch` apart; zero above the diagonal if causal.
static void kernel_part(
    const ba_align& c, int64_t g, int64_t i0, int64_t n, int64_t j0, int64_t m, float* out, int64_t pitch) {
    const bool bf16 = c.dtype == BA_BF16;
    for (int64_t i = 0; i < n; ++i) {
        const void* row = shifted(c.weight, g * c.weight_g + (i0 + i) * c.weight_i + j0, bf16);
        int64_t seen = c.causal && i0 + i - j0 + 1 < m ? i0 + i - j0 + 1 : m;
        if (seen < 0) seen = 0;
        for (int64_t j = 0; j < seen; ++j)
            out[i * pitch + j] = bf16 ? from_bf16(static_cast<const uint16_t*>(row)[j]) : static_cast<const float*>(row)[j];
        for (int64_t j = seen; j < m; ++j) out[i * pitch + j] = 0.0f;
    }
}

// One strip of columns of one batch element: out = W_A values + bias, or values' gradient = W_A^T grad.
static void align_task(void* context, int64_t task, float* scratch) {
    const Align& f = *static_cast<const Align*>(context);
    const ba_align& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16, back = c.grad != NULL;
    const int64_t strip = task % f.strips, g = task / f.strips % c.G, b = task / f.strips / c.G;
    const int64_t w0 = strip * f.strip, width = c.W - w0 < f.strip ? c.W - w0 : f.strip;
    const int64_t vectors = (width + LANES - 1) / LANES;
    const int64_t out_s = c.G * c.W;
    void* out = shifted(back ? c.dvalue : c.out, b * c.S * out_s + g * c.W + w0, bf16);
    const int64_t in_s = back ? c.grad_s : c.value_s;
    const void* in = back ? shifted(c.grad, b * c.grad_b + g * c.grad_g + w0, bf16)
                          : shifted(c.value, b * c.value_b + g * c.value_g + w0, bf16);
    const bool direct = !bf16 && width % LANES == 0;  // sums may be kept in the output itself
    float* sums = direct ? static_cast<float*>(out) : scratch;
    const int64_t sums_s = direct ? out_s : f.pitch;
    float* rows = scratch + (direct ? 0 : c.S * f.pitch);
    float* kernel = rows + STEP * f.pitch;  // [STEP][STEP]
    for (int64_t j0 = 0; j0 < c.S; j0 += STEP) {
        const int64_t m = c.S - j0 < STEP ? c.S - j0 : STEP;
        const Row from = {shifted(in, j0 * in_s, bf16), bf16};
        const float* x = static_cast<const float*>(from.p);
        int64_t x_s = in_s;
        if (bf16 || width % LANES != 0 || in_s * 4 % 2048 == 0) {
            copy_rows(from, in_s, m, width, rows, f.pitch);
            x = rows, x_s = f.pitch;
        }
        for (int64_t i0 = 0; i0 < c.S; i0 += STEP) {
            const int64_t n = c.S - i0 < STEP ? c.S - i0 : STEP;
            const bool add = j0 > 0;
            if (!back) {
                if (c.causal && i0 + n <= j0) continue;  // above the diagonal
                const bool edge = c.causal && i0 < j0 + m;
                const float* a = static_cast<const float*>(c.weight) + g * c.weight_g + i0 * c.weight_i + j0;
                int64_t a_s = c.weight_i;
                if (edge || bf16) {
                    kernel_part(c, g, i0, n, j0, m, kernel, STEP);
                    a = kernel, a_s = STEP;
                }
                if (!edge) {
                    wide_product<false>(vectors, n, m, a, a_s, x, x_s, sums + i0 * sums_s, sums_s, add);
                } else {
                    for (int64_t i = 0; i < n; i += SQUARE) {
                        const int64_t some = n - i < SQUARE ? n - i : SQUARE;
                        int64_t seen = i0 + i + some - j0;
                        seen = seen < 0 ? 0 : seen < m ? seen : m;
                        wide_product<false>(vectors, some, seen, a + i * a_s, a_s, x, x_s, sums + (i0 + i) * sums_s,
                            sums_s, add);
                    }
                }
            } else {
                // Here j counts rows of W_A and i its columns: sums[i] += W_A[j][i] x[j].
                if (c.causal && j0 + m <= i0) {
                    if (!add)
                        for (int64_t i = 0; i < n; ++i)
                            memset(sums + (i0 + i) * sums_s, 0, static_cast<size_t>(vectors * LANES) * sizeof(float));
                    continue;
                }
                const bool edge = c.causal && j0 < i0 + n;
                const float* a = static_cast<const float*>(c.weight) + g * c.weight_g + j0 * c.weight_i + i0;
                int64_t a_s = c.weight_i;
                if (edge || bf16) {
                    kernel_part(c, g, j0, m, i0, n, kernel, STEP);
                    a = kernel, a_s = STEP;
                }
                if (!edge) {
                    wide_product<true>(vectors, n, m, a, a_s, x, x_s, sums + i0 * sums_s, sums_s, add);
                } else {
                    for (int64_t i = 0; i < n; i += SQUARE) {
                        const int64_t some = n - i < SQUARE ? n - i : SQUARE;
                        int64_t skip = i0 + i - j0;
                        skip = skip < 0 ? 0 : skip < m ? skip : m;
                        wide_product<true>(vectors, some, m - skip, a + i + skip * a_s, a_s, x + skip * x_s, x_s,
                            sums + (i0 + i) * sums_s, sums_s, add);
                    }
                }
            }
        }
    }
    if (c.bias != NULL && !back) {
        const void* bias = shifted(c.bias, g * c.bias_g, bf16);
        for (int64_t i = 0; i < c.S; ++i) {
            const float x = load_row({bias, bf16}, i, 1)[0];
            for (int64_t w = 0; w < vectors * LANES; w += LANES) store(sums + i * sums_s + w, load(sums + i * sums_s + w) + x);
        }
    }
    if (!direct)
        for (int64_t i = 0; i < c.S; ++i)
            for (int64_t w = 0; w < width; w += LANES)
                store_row(shifted(out, i * out_s, bf16), bf16, w, load(sums + i * sums_s + w), width - w);
}

// Columns [j0, j0 + pitch) of W_A's gradient: sum over batch and features of grad[i] value[j].
static void align_weight_task(void* context, int64_t task, float* scratch) {
    const Align& f = *static_cast<const Align*>(context);
    const ba_align& c = *f.c;
    const bool bf16 = c.dtype == BA_BF16;
    const int64_t columns = (c.S + f.pitch - 1) / f.pitch;
    const int64_t rows = task % f.blocks, panel = task / f.blocks % columns, g = task / f.blocks / columns;
    const int64_t j0 = panel * f.pitch, count = c.S - j0 < f.pitch ? c.S - j0 : f.pitch;
    const int64_t vectors = (count + LANES - 1) / LANES, pitch = vectors * LANES;
    const int64_t first = rows * c.S / f.blocks, last = (rows + 1) * c.S / f.blocks;
    const int64_t i0 = c.causal && first < j0 ? (last < j0 ? last : j0) : first;
    float* turned = scratch;                    // values [W of a strip][pitch]
    float* grads = turned + f.strip * f.pitch;  // [rows][strip], where they have to be converted
    float* sums = grads + (bf16 ? c.S * f.strip : 0);
    const int64_t n = last - i0;
    for (int64_t i = 0; i < n * pitch; i += LANES) store(sums + i, V{});
    for (int64_t b = 0; n > 0 && b < c.B; ++b)
        for (int64_t w0 = 0; w0 < c.W; w0 += f.strip) {
            const int64_t width = c.W - w0 < f.strip ? c.W - w0 : f.strip;
            turn_rows({shifted(c.value, b * c.value_b + g * c.value_g + w0 + j0 * c.value_s, bf16), bf16}, c.value_s,
                count, width, 1.0f, turned, pitch);
            const Row grad = {shifted(c.grad, b * c.grad_b + g * c.grad_g + w0 + i0 * c.grad_s, bf16), bf16};
            const float* a = static_cast<const float*>(grad.p);
            int64_t a_s = c.grad_s;
            if (bf16) {
                copy_rows(grad, c.grad_s, n, width, grads, f.strip);
                a = grads, a_s = f.strip;
            }
            wide_product<false>(vectors, n, width, a, a_s, turned, pitch, sums, pitch, true);
        }
    for (int64_t i = first; i < last; ++i) {
        void* out = shifted(c.dweight, (g * c.S + i) * c.S + j0, bf16);
        for (int64_t j = 0; j < count; j += LANES) {
            V x = i < i0 ? V{} : load(sums + (i - i0) * pitch + j);
            if (c.causal) x = select(first_lanes() + static_cast<int32_t>(j0 + j - i) > 0, V{}, x);
            store_row(out, bf16, j, x, count - j);
        }
    }
}

static Align align_plan(const ba_align& c) {
    Align f = {};
    f.c = &c;
    f.strip = BA_WIDE * LANES;
    f.strips = (c.W + f.strip - 1) / f.strip;
    f.pitch = f.strip;
    return f;
}

static int64_t align_values(const ba_align& c) {
    Align f = align_plan(c);
    const int64_t floats = (c.S + STEP) * f.pitch + STEP * STEP;
    return ba_parallel(c.threads, c.B * c.G * f.strips, floats, align_task, &f);
}

static int64_t align_gradients(const ba_align& c) {
    int64_t status = BA_OK;
    if (c.dvalue != NULL) status = align_values(c);
    if (status != BA_OK || c.dweight == NULL) return status;
    Align f = align_plan(c);
    const int64_t columns = (c.S + f.pitch - 1) / f.pitch;
    f.blocks = c.S >= 4 * SQUARE && c.G * columns < 8 ? 4 : 1;
    const int64_t floats = f.strip * f.pitch + c.S * f.strip + c.S * f.pitch;
    return ba_parallel(c.threads, c.G * columns * f.blocks, floats, align_weight_task, &f);
}

}  // namespace
}  // namespace BA_ISA
