"""PEFT adapter directories: config, files, forms, checks. No Megatron."""
