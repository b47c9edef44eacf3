// Every kernel for one instruction set. An isa_*.cpp says which and includes this.

#include "api.h"
#include "lanes.hpp"
#include "parallel.hpp"
#include "products.hpp"
#include "masks.hpp"
#include "scores.hpp"
#include "dropout.hpp"
#include "decode_rows.hpp"
#include "decode_codes.hpp"
#include "forward.hpp"
#include "backward.hpp"
#include "decode.hpp"
#include "align.hpp"
#include "layer.hpp"
#include "step.hpp"

namespace BA_ISA {

int64_t forward(const ba_call& c) {
    if (c.B * c.N * c.L == 0) return BA_OK;
    const ba_call call = within_reach(c), pairs = regrouped(call);
    if (is_special(pairs) && !is_decode(pairs)) return BA_DECODES_ONLY;
    return is_decode(pairs) ? decode(pairs) : wide_forward(call);
}

int64_t backward(const ba_call& c) {
    const ba_call call = within_reach(c);
    if (is_special(call)) return BA_DECODES_ONLY;
    // With `delta` the normalisers are those of more keys than these, and cannot be computed again.
    return call.delta == NULL && is_decode(regrouped(call)) ? decode_backward(call) : wide_backward(call);
}

int64_t layer_forward(const ba_layer& c) { return c.B * c.L == 0 ? int64_t{BA_OK} : whole_layer(c); }

int64_t layer_step(const ba_step& c) { return c.attention.B * c.attention.L == 0 ? int64_t{BA_OK} : step_through(c); }

int64_t align_forward(const ba_align& c) {
    ba_align only = c;
    only.grad = NULL;
    return c.B * c.G * c.S * c.W == 0 ? int64_t{BA_OK} : align_values(only);
}

int64_t align_backward(const ba_align& c) { return c.B * c.G * c.S * c.W == 0 ? int64_t{BA_OK} : align_gradients(c); }

int64_t drop_numbers(const ba_drop& c) { return c.B * c.L * c.S == 0 ? int64_t{BA_OK} : drop_all(c); }

}  // namespace BA_ISA
