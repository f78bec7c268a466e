"""The files that a checkpoint carries: the formula, its kernels, operators, layers, the config and the model."""
