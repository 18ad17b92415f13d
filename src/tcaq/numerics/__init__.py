"""Tensors in, tensors out: the arithmetic of quantization, without modules and without diffusers."""
