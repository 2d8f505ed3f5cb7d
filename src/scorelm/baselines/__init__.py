"""Peers of score diffusion in the same trunk: each is an objective and a sampler, and everything else is shared."""
