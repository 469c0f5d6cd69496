"""What transformers, PEFT and torch force on the method."""
