from . import distributed, fp8, ops, router  # noqa: F401
from .module import DotProductAttention, GroupedLinear, LayerNorm, LayerNormLinear, Linear, RMSNorm  # noqa: F401
from .ops import LayerNormMLP  # noqa: F401
