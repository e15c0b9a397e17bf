"""`rollouts`: post-training of language models as one command. Importing it loads nothing: see the subpackages."""
