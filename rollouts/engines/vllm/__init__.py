"""How a vLLM server is started."""
