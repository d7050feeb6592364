"""Pictures of training and denoising in the terminal."""
