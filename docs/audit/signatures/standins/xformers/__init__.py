"""In place of xformers, whose kernels want a GPU."""
