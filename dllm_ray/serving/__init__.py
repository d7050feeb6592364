"""Samplers behind the OpenAI API: continuous batching, streaming, deployments on Ray Serve, a chat page."""
