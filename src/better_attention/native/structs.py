"""``cpp/api.h`` for Python: its numbers, its structures and its functions, by the same names and in the same order.

A test compares this file with what a C compiler makes of ``api.h``.
"""

from __future__ import annotations

import ctypes

import torch

ABI = 6
"""Version of the interface."""
OK, NO_MEMORY, NO_SUCH_ISA, NO_SUCH_SCORE, DECODES_ONLY = range(5)
"""What a function returns."""
FEW = 8
"""How many queries of a head count as decoding."""
ISAS = {"portable": 1, "neon": 2, "avx2": 3, "avx512": 4}
"""Instruction sets, slowest first; 0 stands for the best that there is."""
BEST_ISA = 0
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.bool: 2}
NO_MASK = 3
"""The element type of a mask that is not there."""
SCORES = {"softmax": 0, "expressive": 1}
"""The scores that the kernels compute."""

_Field = tuple[str, type]


# All fields are 8 bytes wide, so that no compiler puts padding between them.
def _integers(names: str) -> list[_Field]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _numbers(names: str) -> list[_Field]:
    return [(name, ctypes.c_double) for name in names.split()]


def _pointers(names: str) -> list[_Field]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class Call(ctypes.Structure):
    """``ba_call``: one attention call, forward or backward."""

    _fields_ = (
        *_integers("isa threads dtype score causal offset window"),
        *_numbers("scale dropout"),
        *_integers("seed batch_first batch_step B N G L S H W key_group value_group"),
        *_pointers("q k v"),
        *_integers("q_b q_n q_l k_b k_g k_s v_b v_g v_s"),
        *_pointers("k_scale v_scale"),
        *_integers("k_scale_b k_scale_g k_scale_s v_scale_b v_scale_g v_scale_s"),
        *_pointers("rotary_cos rotary_sin"),
        *_integers("rotary_s"),
        *_pointers("slopes"),
        *_integers("slopes_inside slopes_from"),
        *_pointers("mask"),
        *_integers("mask_type mask_b mask_n mask_l mask_s"),
        *_pointers("padding"),
        *_integers("padding_type padding_b padding_s"),
        *_pointers("out"),
        *_integers("out_b out_n out_l"),
        *_pointers("stats grad"),
        *_integers("grad_b grad_n grad_l"),
        *_pointers("delta dq dk dv"),
        *_integers("dq_b dq_n dq_l dk_b dk_g dk_s dv_b dv_g dv_s"),
    )


class Align(ctypes.Structure):
    """``ba_align``: the alignment kernel W_A on the values, forward or backward."""

    _fields_ = (
        *_integers("isa threads dtype causal B G S W"),
        *_pointers("weight"),
        *_integers("weight_g weight_i"),
        *_pointers("bias"),
        *_integers("bias_g"),
        *_pointers("value"),
        *_integers("value_b value_s value_g"),
        *_pointers("out grad"),
        *_integers("grad_b grad_s grad_g"),
        *_pointers("dvalue dweight"),
    )


class Layer(ctypes.Structure):
    """``ba_layer``: a whole layer's self-attention in inference."""

    _fields_ = (
        *_integers("isa threads score causal"),
        *_numbers("scale"),
        *_integers("B N L D"),
        *_pointers("x"),
        *_integers("x_b x_l"),
        *_pointers("wq bq wk bk wv bv wo bo wa ba"),
        *_integers("wa_i"),
        *_pointers("out"),
    )


class Step(ctypes.Structure):
    """``ba_step``: a decoder's step through a layer with a cache."""

    _fields_ = (
        *_integers("isa D"),
        ("attention", Call),
        *_pointers("x"),
        *_integers("x_b x_l"),
        *_pointers("wq bq wk bk wv bv wo bo new_cos new_sin out"),
    )


class Drop(ctypes.Structure):
    """``ba_drop``: dropout of numbers that are no weights, forward or backward."""

    _fields_ = (
        *_integers("isa threads"),
        *_numbers("dropout"),
        *_integers("seed batch_first batch_step B N L S"),
        *_pointers("x out"),
    )


FUNCTIONS: dict[str, type[ctypes.Structure] | None] = {
    "ba_abi": None,
    "ba_isas": None,
    "ba_pool": None,
    "ba_forward": Call,
    "ba_backward": Call,
    "ba_layer_forward": Layer,
    "ba_layer_step": Step,
    "ba_align_forward": Align,
    "ba_align_backward": Align,
    "ba_drop_numbers": Drop,
}
"""Every function, with the structure it takes a pointer to."""
