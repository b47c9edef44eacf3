"""Custom operators, registered once for every way in which torch runs one.

torch.compile and torch.export need a registered operator, which they keep as one node. torch.func needs an
``autograd.Function``, because a custom operator's own autograd does not know its transforms. In eager mode ordinary
tensors need neither: at small sizes the dispatcher would take longer than the arithmetic. :func:`register` derives all
of this, and the rules for vmap and for counting FLOPs, from one :class:`Definition`; :func:`register_inference` is for
operators that only inference needs.
"""

from .definition import Definition, Tensors
from .inference import register_inference
from .registration import register

__all__ = ["Definition", "Tensors", "register", "register_inference"]
