"""ALiBi of a layer, in one of two places: on the weight, as its authors have it, or inside the score.

With z = scale q.k, the head's slope m and the distance l - s of query and key, the un-normalised weight is

    place "weight":  f(z) e^{-m |l - s|}        place "score":  f(z - m (l - s))

where f(z) is exp(z) for softmax and z^2 / (1 + z^2) for the expressive score. For softmax under the causal triangle
both are one function. For the expressive score they are opposites: the first lets the weight of far keys fall, the
second lets it grow. Source: arXiv 2108.12409, section 3.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from better_attention.call.call import Call, compute_dtype
from better_attention.call.masks import together
from better_attention.errors import check_choice
from better_attention.positions import alibi_bias, alibi_features
from better_attention.scores import SCORES

PLACES = ("score", "weight")


def check_alibi(alibi: str | None, added_keys: bool) -> str | None:
    """``alibi`` if it is None or a place.

    Args:
        alibi: the layer's argument.
        added_keys: whether the layer adds keys that have no position.

    Raises:
        ValueError: another name, or added keys.
    """
    if alibi is None:
        return None
    if added_keys:
        raise ValueError(
            f"alibi={alibi!r} biases every key by its distance, and the keys of add_bias_kv and add_zero_attn have "
            "none: leave one of the two out."
        )
    return check_choice(alibi, "alibi", PLACES)


def placed(alibi: str | None, call: Call) -> Call:
    """``call`` with ALiBi where the layer has it.

    Raises:
        ValueError: inside the score without the causal triangle.
    """
    if alibi is None:
        return call
    return _inside(call) if alibi == "score" else _on_the_weight(call)


def _on_the_weight(call: Call) -> Call:
    q_BNLH, mask = call.q_BNLH, call.mask_BNLS
    sizes = q_BNLH.shape[1], q_BNLH.shape[2], call.k_BNSH.shape[2]
    bias_NLS = alibi_bias(*sizes, offset=call.offset, device=q_BNLH.device, dtype=compute_dtype(q_BNLH.dtype))
    if mask is not None and mask.dtype != torch.bool:
        # What hides by being the lowest number of its dtype would be an ordinary one in the sum's.
        mask = mask.masked_fill(SCORES[call.score].hides(mask), -math.inf)
    return replace(call, mask_BNLS=together(mask, bias_NLS[None]))


def _inside(call: Call) -> Call:
    if not call.causal:
        raise ValueError(
            "alibi='score' counts distances with a sign, -m (l - s), which has a meaning for keys s <= l alone: call "
            "the layer with is_causal=True (masks apply as well), or build it with alibi='weight'."
        )
    q_BNLH, k_BNSH = alibi_features(call.q_BNLH, call.k_BNSH, scale=call.scale, offset=call.offset)
    return replace(call, q_BNLH=q_BNLH, k_BNSH=k_BNSH, scale=1.0)
