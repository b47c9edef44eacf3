/* The compiled kernels' whole interface: plain C over pointers and strides, no torch and no Python in it.
 *
 * Letters as everywhere in better_attention: B batch, N query heads, G pairs of key and value heads (N is a multiple of
 * G), L queries, S keys, H width of q and k, W width of v. Strides count elements; the last dimension (H, W) of every
 * tensor is contiguous. Nothing here checks shapes or memory: impl/native.py does. native/structs.py is this file
 * in Python, and a test compares the two.
 */
#ifndef BETTER_ATTENTION_API_H
#define BETTER_ATTENTION_API_H

#include <stdint.h>

#if defined(_WIN32)
#define BA_EXPORT __declspec(dllexport)
#else
#define BA_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { BA_ABI = 6 };                                                     /* counts incompatible changes of this file */
enum { BA_F32 = 0, BA_BF16 = 1, BA_BOOL = 2, BA_NONE = 3 };              /* element types; bool: 1 byte, 1 = attend */
enum { BA_SOFTMAX = 0, BA_EXPRESSIVE = 1 };                              /* scores */
/* what a kernel returns; the last: int8 and rotated caches and slopes serve a few queries without dropout, and
 * ba_forward alone */
enum { BA_OK = 0, BA_NO_MEMORY = 1, BA_NO_SUCH_ISA = 2, BA_NO_SUCH_SCORE = 3, BA_DECODES_ONLY = 4 };
enum { BA_FEW = 8 };              /* queries of a head that count as decoding */
enum { BA_BEST = 0, BA_PORTABLE = 1, BA_NEON = 2, BA_AVX2 = 3, BA_AVX512 = 4 }; /* instruction sets */

/* One attention call. All fields are 8 bytes wide, so that the layout is the same for every compiler. */
typedef struct {
    int64_t isa;                     /* BA_BEST, or one that ba_isas() reports */
    int64_t threads;                 /* at least 1 */
    int64_t dtype;                   /* of q, k, v, out and their gradients: BA_F32, BA_BF16 */
    int64_t score, causal;           /* causal: query l sees keys s <= l + offset */
    int64_t offset, window;          /* and only `window` of them, its own the last; 0: any number */
    double scale;                    /* z = scale * q.k */
    double dropout;                  /* probability, 0 to 1, that a weight is dropped; 1 drops all. dropout.hpp has */
    int64_t seed;                    /* the rule that says which, by this number */
    int64_t batch_first, batch_step; /* to that rule, batch element b is number batch_first + b batch_step; step 0: 1 */
    int64_t B, N, G, L, S, H, W;     /* S, H and W at least 1; the others may be 0 */
    int64_t key_group, value_group;  /* neighbouring pairs that share a head of keys, or of values; 0 as 1: none */
    const void *q, *k, *v;           /* equal in address, strides and groups: one tensor that is both */
    int64_t q_b, q_n, q_l;           /* strides of q (B, N, L, H) */
    int64_t k_b, k_g, k_s;           /* of k (B, G / key_group, S, H) */
    int64_t v_b, v_g, v_s;           /* of v (B, G / value_group, S, W) */
    const float *k_scale, *v_scale;  /* of their heads and keys, not negative: k and v are int8, times these; or NULL */
    int64_t k_scale_b, k_scale_g, k_scale_s, v_scale_b, v_scale_g, v_scale_s;
    const float *rotary_cos, *rotary_sin; /* (S, H/2): angles that turn features p and p + H/2 of each key, by the same */
    /* angle more from each key to the next one; or NULL */
    int64_t rotary_s;
    const float *slopes;             /* (N): ALiBi, the slope of each head; or NULL */
    int64_t slopes_inside;           /* 1: z + slope (s - p) in the place of z; 0: -slope |s - p| on the log weights */
    int64_t slopes_from;             /* where the first query stands among the keys: query l at p = l + slopes_from */
    const void *mask;                /* (B, N, L, S): bool, or added to the log weights (-inf hides; for the */
    int64_t mask_type;               /* expressive score so does the type's lowest number). BA_NONE: no mask */
    int64_t mask_b, mask_n, mask_l, mask_s; /* 0 where it broadcasts */
    const void *padding;             /* (B, S), the same */
    int64_t padding_type;
    int64_t padding_b, padding_s;
    void *out;                       /* (B, N, L, W) */
    int64_t out_b, out_n, out_l;
    float *stats;                    /* (B, N, L, 2), contiguous: the normaliser of each row and the shift of its
                                        exponent, written by ba_forward and read by ba_backward. A row without any
                                        weight has an infinite normaliser. May be NULL in ba_forward. */
    /* ba_backward alone */
    const void *grad;                /* of out (B, N, L, W) */
    int64_t grad_b, grad_n, grad_l;
    const float *delta;              /* (B, N, L), contiguous: of each row the sum over keys of w dL/dw, where it is known,
                                        as where other processes hold some of the keys; NULL: of grad and out. `out` is
                                        not read where it is given. */
    void *dq, *dk, *dv;              /* dv == NULL: k and v are one tensor, and dk its whole gradient (H == W). dk and dv
                                        have G heads: what belongs to one head of keys or values is not added up */
    int64_t dq_b, dq_n, dq_l, dk_b, dk_g, dk_s, dv_b, dv_g, dv_s;
} ba_call;

/* out[g][i][:] = sum_j weight[g][i][j] value[b][j][g][:] + bias[g][i], the alignment kernel W_A on the values. */
typedef struct {
    int64_t isa, threads, dtype;     /* of every tensor here */
    int64_t causal;                  /* only j <= i; the upper triangle of weight is not read */
    int64_t B, G, S, W;              /* G = 1: one kernel, W = D; else one for each head */
    const void *weight;              /* (G, S, S) */
    int64_t weight_g, weight_i;
    const void *bias;                /* (G, S), or NULL */
    int64_t bias_g;
    const void *value;               /* (B, S, G, W) */
    int64_t value_b, value_s, value_g;
    void *out;                       /* (B, S, G, W), contiguous */
    /* ba_align_backward alone: grad of out, and where the gradients go; NULL where one is not wanted */
    const void *grad;                /* (B, S, G, W) */
    int64_t grad_b, grad_s, grad_g;
    void *dvalue;                    /* (B, S, G, W), contiguous */
    void *dweight;                   /* (G, S, S), contiguous; its upper triangle is zero if causal */
} ba_align;

/* A whole layer's self-attention in inference, float32: out = W_O heads(W_Q x, W_K x, W_A W_V x), for small layers
 * whose cost is the way between operators. A weight that is NULL is the identity, a bias that is NULL is zero. */
typedef struct {
    int64_t isa, threads, score, causal;
    double scale;
    int64_t B, N, L, D;              /* N divides D */
    const void *x;                   /* (B, L, D) */
    int64_t x_b, x_l;
    const void *wq, *bq, *wk, *bk, *wv, *bv, *wo, *bo; /* weights (D, D), output feature by input feature, contiguous */
    const void *wa, *ba;             /* W_A (L, L) on the values and its bias (L), or NULL */
    int64_t wa_i;                    /* stride of W_A's rows */
    void *out;                       /* (B, L, D), contiguous */
} ba_layer;

/* A decoder's step through a layer, float32: the new tokens are projected and written behind the rows of a cache, and
 * attend to all of it; out = W_O heads. A bias that is NULL is zero. */
typedef struct {
    int64_t isa;
    int64_t D;                       /* N H = N W = D */
    ba_call attention;               /* over the cache. The last L rows of k and v are those of the new tokens, which are
                                        written here, with their scales; q and out are not looked at */
    const void *x;                   /* (B, L, D) */
    int64_t x_b, x_l;
    const void *wq, *bq, *wk, *bk, *wv, *bv, *wo, *bo; /* as in ba_layer; those of k and v give what the cache holds, and
                                        have as many rows as its heads have features */
    const float *new_cos, *new_sin;  /* (L, H/2), contiguous: angles that turn queries, and keys if they have a weight; or NULL */
    void *out;                       /* (B, L, D), contiguous */
} ba_step;

/* Dropout of numbers that are no weights: out = x / (1 - dropout), or 0 where dropout.hpp's rule says so, with one head
 * and `L` rows of `S` numbers in each batch element. Its gradient is the same function of the gradient of out. */
typedef struct {
    int64_t isa, threads;
    double dropout;
    int64_t seed, batch_first, batch_step; /* as in ba_call */
    int64_t B, N, L, S;              /* N = 1 */
    const float *x;                  /* (B, L, S), contiguous */
    float *out;                      /* (B, L, S), contiguous */
} ba_drop;

BA_EXPORT int64_t ba_abi(void);       /* BA_ABI of the library */
BA_EXPORT int64_t ba_isas(void);      /* bit i: instruction set i was built and this machine has it */
BA_EXPORT int64_t ba_pool(void);      /* 1: the OpenMP threads that torch uses serve us too, 0: our own */

/* The kernels: row F(name, structure) is exported as ba_NAME(const STRUCTURE *). dispatch.cpp, which includes this too,
 * passes each call on to the function NAME of its instruction set (kernels.hpp). */
#define BA_KERNELS(F)            \
    F(forward, ba_call)          \
    F(backward, ba_call)         \
    F(layer_forward, ba_layer)   \
    F(layer_step, ba_step)       \
    F(align_forward, ba_align)   \
    F(align_backward, ba_align)  \
    F(drop_numbers, ba_drop)

#define BA_EXPORT_KERNEL(name, structure) BA_EXPORT int64_t ba_##name(const structure *call);
BA_KERNELS(BA_EXPORT_KERNEL)

#ifdef __cplusplus
}
#endif
#endif
