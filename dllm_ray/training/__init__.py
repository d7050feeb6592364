"""Training: a plain PyTorch loop (`loop`), strategies that spread a model over workers, and Ray Train (`trainer`)."""
