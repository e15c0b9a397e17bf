"""A small inference server over transformers that speaks the SGLang HTTP subset RL needs. See
docs/reference/engines.md."""
