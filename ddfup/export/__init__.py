"""Networks as files for other runtimes: ONNX, and PyTorch's own ``pt2``; each is checked before it gets its name."""
