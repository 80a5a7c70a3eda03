"""Adapters in Hugging Face's names, layouts and files: export, verify, serve, ZeRO conversion."""
