"""The denoiser (evidence in, posterior out) and the model that a user loads."""
