"""Base models: loading them, and what they are."""
