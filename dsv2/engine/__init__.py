"""Inference: token ids in, token ids out, over the trainer's own model."""
