"""Generation: solvers that make a step, paths that say which step, and the loop that joins them."""
