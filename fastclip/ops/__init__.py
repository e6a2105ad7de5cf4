"""Kernels as registered operators: tensors in, tensors out. Each op is one folder; importing one costs torch only."""
