"""What is trained for: what a loss needs of each sample, and the loss. No model, no process group."""
