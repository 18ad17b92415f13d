"""Quantized layers: subclasses of torch's own, so that adapters, offloading and hooks still find them."""
