"""The best plans, run for a few steps on the real ranks: what is predicted to be fastest, and what is."""
