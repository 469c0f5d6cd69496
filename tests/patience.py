"""How long a test waits for something that should come. Only a test that fails waits to the end, so that a busy machine
changes no outcome."""

PATIENCE = 900.0  # seconds
