"""LoRA forms of linears, a file per library that they come from."""
