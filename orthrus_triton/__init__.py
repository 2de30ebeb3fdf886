"""orthrus_triton: lossless parallel decoding with a dual-view Transformer, on Triton kernels.
Importing touches no GPU and no environment variable."""

__version__ = "0.1.0"
