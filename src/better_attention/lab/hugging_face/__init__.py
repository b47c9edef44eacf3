"""The lab's language model as a model of Hugging Face transformers."""
