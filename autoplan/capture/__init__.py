"""A user's model.py -> Graph."""
