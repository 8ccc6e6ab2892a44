"""Training a small base model from nothing: autoencoder, CLIP towers and denoiser, one by one."""
