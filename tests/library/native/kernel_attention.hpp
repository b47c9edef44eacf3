// One attention case: its tensors, a call of the kernels, and the check of everything that came back.
#ifndef KERNEL_ATTENTION_HPP
#define KERNEL_ATTENTION_HPP

#include "kernel_cases.hpp"
#include "kernel_oracle.hpp"

struct Inputs {
    Tensor q, k, v, grad, mask, padding; // v is empty where k serves as both
};

struct Outputs {
    int64_t status = -1;
    Tensor out, stats, dq, dk, dv;
    bool same(const Outputs &other) const {
        return out.same(other.out) && stats.same(other.stats) && dq.same(other.dq) && dk.same(other.dk) &&
               dv.same(other.dv);
    }
};

Inputs make_inputs(const Case &c);
ba_call make_call(const Case &c, const Inputs &in);
Outputs make_outputs(const Case &c, const Inputs &in, ba_call &call);
Outputs compute(const Case &c, const Inputs &in, int64_t isa, int64_t threads);
bool visible(const Case &c, const Inputs &in, int64_t b, int64_t n, int64_t l, int64_t s, double *bias);
std::vector<double> of_pairs(const Tensor &x, int64_t G, const Tensor *scale = nullptr);
Problem read(const Case &c, const Inputs &in);
void check(const Case &c, int64_t isa, const Outputs &o, const Answer &exact, Plain &plain, double more = 0);

#endif
