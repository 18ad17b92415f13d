"""The stages of a quantization. Each computes a record and can apply one: resuming is applying the records and going on."""
