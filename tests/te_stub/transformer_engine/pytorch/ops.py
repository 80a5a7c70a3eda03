"""Named by Megatron in annotations only, as long as --use-te-op-fuser is off."""


class Sequential:
    pass


class FusibleOperation:
    pass
