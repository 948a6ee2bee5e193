"""The public kernels: one import for everything that computes. Each op documents itself."""

__all__: list[str] = []
