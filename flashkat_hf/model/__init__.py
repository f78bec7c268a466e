"""The files of a checkpoint: the formula, its kernels, operators, layers, the config and the model."""
