"""Real integer execution: quantized layers on the integer units of the device."""

from tcaq.integer.lower import LayerExecution, Lowering, lower

__all__ = ["LayerExecution", "Lowering", "lower"]
