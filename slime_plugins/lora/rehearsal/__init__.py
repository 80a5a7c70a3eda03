"""LoRA RL without slime and without a GPU: a real Megatron model, real Ray actors, Hugging Face rollouts."""
