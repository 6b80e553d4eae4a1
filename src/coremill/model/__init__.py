"""The student model, its checkpoint format, rotary embeddings and the decoding loop."""
