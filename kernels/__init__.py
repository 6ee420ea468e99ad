"""Device code: Triton kernels and the functions they share. Imports triton only, never torch or tfkern."""
