"""(nn.Module, Plan) -> the same module, run in parallel on PyTorch's own engine."""
