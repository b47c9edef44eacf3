// The compiled kernels as targets of XLA's foreign function interface. Built against jaxlib's headers, which say how a
// call arrives; against api.h, which says what the kernels take; and not against the kernels' library, whose functions
// are handed in. Shapes as in Keras: q (B, L, N, H), k (B, S, G, H), v (B, S, G, W). __init__.py checks them.
#include <cstdint>

#include "api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Kernel = int64_t (*)(const ba_call *);
Kernel forward_kernel = nullptr, backward_kernel = nullptr;

struct Settings {
    int64_t score, threads, isa;
    bool causal, masked;
    double scale;
};

ba_call describe(const Settings &s, const ffi::AnyBuffer &q, const ffi::AnyBuffer &k, const ffi::AnyBuffer &v,
                 const ffi::AnyBuffer &mask, void *out, float *stats) {
    ba_call c{};
    auto qd = q.dimensions(), kd = k.dimensions(), vd = v.dimensions(), md = mask.dimensions();
    c.isa = s.isa, c.threads = s.threads, c.score = s.score, c.causal = s.causal, c.scale = s.scale;
    c.dtype = q.element_type() == ffi::DataType::BF16 ? BA_BF16 : BA_F32;
    c.B = qd[0], c.L = qd[1], c.N = qd[2], c.H = qd[3], c.S = kd[1], c.G = kd[2], c.W = vd[3];
    c.q = q.untyped_data(), c.k = k.untyped_data(), c.v = v.untyped_data();
    c.q_n = c.H, c.q_l = c.N * c.H, c.q_b = c.L * c.N * c.H;
    c.k_g = c.H, c.k_s = c.G * c.H, c.k_b = c.S * c.G * c.H;
    c.v_g = c.W, c.v_s = c.G * c.W, c.v_b = c.S * c.G * c.W;
    c.mask_type = c.padding_type = BA_NONE;
    if (s.masked) {  // (B or 1, N or 1, L or 1, S or 1), one byte each: steps of 0 where it broadcasts
        c.mask = mask.untyped_data(), c.mask_type = BA_BOOL;
        c.mask_s = md[3] > 1, c.mask_l = md[2] > 1 ? md[3] : 0;
        c.mask_n = md[1] > 1 ? md[2] * md[3] : 0, c.mask_b = md[0] > 1 ? md[1] * md[2] * md[3] : 0;
    }
    c.out = out, c.out_n = c.W, c.out_l = c.N * c.W, c.out_b = c.L * c.N * c.W;
    c.stats = stats;
    return c;
}

ffi::Error answer(int64_t status) {
    if (status == BA_OK) return ffi::Error::Success();
    if (status == BA_NO_MEMORY)
        return ffi::Error(ffi::ErrorCode::kResourceExhausted, "the attention kernels got no scratch memory");
    return ffi::Error(ffi::ErrorCode::kInternal, "the attention kernels refused the call");
}

ffi::Error forward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer mask,
                   ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::F32> stats, int64_t score, int64_t threads,
                   int64_t isa, bool causal, bool masked, double scale) {
    ba_call c = describe({score, threads, isa, causal, masked, scale}, q, k, v, mask, out->untyped_data(),
                         stats->typed_data());
    return answer(forward_kernel(&c));
}

ffi::Error backward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer mask, ffi::AnyBuffer out,
                    ffi::Buffer<ffi::F32> stats, ffi::AnyBuffer grad, ffi::Result<ffi::AnyBuffer> dq,
                    ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv, int64_t score, int64_t threads,
                    int64_t isa, bool causal, bool masked, double scale) {
    ba_call c = describe({score, threads, isa, causal, masked, scale}, q, k, v, mask, out.untyped_data(),
                         stats.typed_data());
    c.grad = grad.untyped_data(), c.grad_n = c.out_n, c.grad_l = c.out_l, c.grad_b = c.out_b;
    c.dq = dq->untyped_data(), c.dq_n = c.q_n, c.dq_l = c.q_l, c.dq_b = c.q_b;
    c.dk = dk->untyped_data(), c.dk_g = c.k_g, c.dk_s = c.k_s, c.dk_b = c.k_b;
    c.dv = dv->untyped_data(), c.dv_g = c.v_g, c.dv_s = c.v_s, c.dv_b = c.v_b;
    return answer(backward_kernel(&c));
}

}  // namespace

extern "C" BA_EXPORT int64_t ba_jax_abi() { return BA_ABI; }

extern "C" BA_EXPORT void ba_jax_use(Kernel forward_function, Kernel backward_function) {
    forward_kernel = forward_function, backward_kernel = backward_function;
}

#define BA_SETTINGS                                                                                              \
    Attr<int64_t>("score").Attr<int64_t>("threads").Attr<int64_t>("isa").Attr<bool>("causal").Attr<bool>("masked") \
        .Attr<double>("scale")

XLA_FFI_DEFINE_HANDLER_SYMBOL(ba_jax_forward, forward,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .BA_SETTINGS);

XLA_FFI_DEFINE_HANDLER_SYMBOL(ba_jax_backward, backward,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .BA_SETTINGS);
