"""Reference implementation of "An In-depth Investigation of Sparse Rate Reduction in Transformer-like Models"."""
