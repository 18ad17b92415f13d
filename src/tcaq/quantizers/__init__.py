"""Modules that own quantization parameters. All state exists from construction; nothing is born in `forward`."""
