"""Self-supervised face embeddings for medicine and anthropometry."""

__version__ = "0.1.0"
