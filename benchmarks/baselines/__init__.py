"""Others who do the same work: PyTorch as the released code writes it, SDPA, FlexAttention, libraries."""
