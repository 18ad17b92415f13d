"""Everything that knows diffusers: loading pipelines, their denoisers, units, sampling, and the quantizer plug-in."""
