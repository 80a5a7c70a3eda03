"""A base model as Hugging Face stores it: names, tensors, fingerprint, merging into it. No Megatron."""
