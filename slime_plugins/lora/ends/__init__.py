"""The collective ends: adapters of a running, sharded model to PEFT directories and back."""
