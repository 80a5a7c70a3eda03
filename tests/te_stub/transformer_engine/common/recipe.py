"""Names that Megatron subclasses or annotates with."""


class DelayedScaling:
    def __init__(self, *args, **kwargs):
        raise NotImplementedError("this stand-in has no fp8")


class Format:
    E4M3 = "e4m3"
    HYBRID = "hybrid"
