"""Stable Diffusion's parts, and the denoising loss."""
