"""What runs inside the engines' server processes, where neither slime nor Megatron is. Stdlib only."""
