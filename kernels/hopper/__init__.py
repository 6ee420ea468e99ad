"""Kernels for Hopper (sm_90) in Gluon: TMA, asynchronous wgmma and warp specialisation, written out."""
