"""YAML and JSON <-> the nouns, and every message about a bad file."""
