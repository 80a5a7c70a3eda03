"""In place of flash-linear-attention on a CPU: the three names that slime's linear attention imports, in plain torch.

Strict: what slime does not ask for is an error. The delta rule is transformers' own.
"""
