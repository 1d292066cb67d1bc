"""Every method on the same tasks: metrics, intervals, per-task tables, convergence."""
