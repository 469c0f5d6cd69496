"""Datasets into documents, and documents into what a model reads of them."""
