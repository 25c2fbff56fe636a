"""Commands that carry a plan elsewhere: schema."""
