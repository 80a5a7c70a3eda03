"""What slime calls at its seams, one file per idea. ``slime_plugins.lora.slime`` has them by name."""
