class QuantizedTensor:
    """Megatron asks isinstance(parameter, QuantizedTensor); there is never one."""
