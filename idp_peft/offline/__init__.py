"""Models, texts and tasks out of ordinary packages, for machines that reach no model hub."""
