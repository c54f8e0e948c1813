"""Compare attribution methods on a data set: data, methods, metrics, the run, its table and its figure."""
