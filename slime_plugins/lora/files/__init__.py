"""Files from anyone, read without executing them; directories that appear whole or not at all."""
