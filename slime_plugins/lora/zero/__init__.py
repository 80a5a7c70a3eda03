"""Adapters rescued from DeepSpeed ZeRO checkpoints."""
