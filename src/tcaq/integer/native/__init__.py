"""What stands between integer kernels, compiled for this processor where it has a C compiler."""
