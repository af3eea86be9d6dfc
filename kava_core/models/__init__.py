"""Causal language models: loading, the teacher's recorded pass, the latent-reasoning student."""
