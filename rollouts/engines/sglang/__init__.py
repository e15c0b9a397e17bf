"""How the real SGLang is started where there is no GPU. Runs in SGLang's own environment, never in the trainer's."""
