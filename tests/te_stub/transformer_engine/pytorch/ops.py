"""Named by Megatron in annotations only, as long as --use-te-op-fuser is off."""


class Sequential:
    pass


class FusibleOperation:
    pass


class LayerNormMLP:
    """PEFT asks whether a linear is one of these; none is."""
