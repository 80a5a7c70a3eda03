"""Training control in slime: flags, what cannot work, the loop's decisions, what the trainer does about them."""
