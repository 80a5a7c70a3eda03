"""CPU stand-in for Transformer Engine 2.16.1, for tests: what Megatron's TE wrapper classes need, in plain torch.

Constructors, attributes, parameter names and return forms are those of that version; so is what its autograd functions
keep, free and refuse, as far as an adapter around them can notice. No fp8, no userbuffers, no dropout.
"""

__version__ = "2.16.1"

from . import common, pytorch  # noqa: F401
