"""What is decided about a run while it runs: learning rates, when to stop, which adapter was best."""
