"""The Hub: pushing an adapter, and its model card."""
