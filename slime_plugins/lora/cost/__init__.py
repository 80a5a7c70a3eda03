"""What training will cost, from sizes alone: parameters, bytes on a rank, bytes per weight sync. Pure arithmetic."""
