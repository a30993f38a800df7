"""Megatron checkpoints: written from ONNX networks, read without trusting them."""
