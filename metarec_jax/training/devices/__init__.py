"""Many devices, several processes: who holds what, who waits for whom, what fits."""
