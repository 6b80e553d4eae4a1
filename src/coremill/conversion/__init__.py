"""The commands of the stages that run after training: export, convert, verify, GGUF and Hugging Face."""
